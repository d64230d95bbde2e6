"""A step's gradients as one number, their norm: found on the device, for the host to read once."""

import torch
from torch import Tensor


def sum_of_squares(gradients: list[Tensor], is_counted: Tensor) -> Tensor:
    """Return the sum [1] of the squares of fp32 gradients, not finite where any of them is not.

    is_counted [n] is 1 for a gradient that counts, and 0 for a copy of one that counts on another
    rank: it adds nothing unless it is not finite, for 0 x inf and 0 x NaN are NaN. Launches a
    handful of kernels however many gradients there are, and nothing waits for them.
    """
    if not gradients:  # a rank that owns nothing but padding
        return torch.zeros(1, device=is_counted.device)
    squares = torch.stack(torch._foreach_norm(gradients)).square()
    return (squares * is_counted).sum().view(1)


def scale_gradients(gradients: list[Tensor], factor: float) -> None:
    """Multiply gradients in place, where that changes them."""
    if gradients and factor != 1.0:
        torch._foreach_mul_(gradients, factor)
