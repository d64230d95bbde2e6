"""PPO's clipped value loss of T tokens with its metrics, forward and backward."""

import torch
from torch import Tensor

from benchmarks.kernel_suite.operation import (
    Cost,
    Expected,
    Inputs,
    Mode,
    Operation,
    Provider,
    Size,
    compiled,
    plain,
)
from kernels.value_loss import value_loss

_CLIP = 0.2
_SIZES = {
    "cuda": [{"tokens": 131072}, {"tokens": 8192}, {"tokens": 1048576}],
    "cpu": [{"tokens": 8192}, {"tokens": 131072}],
}


def _inputs(size: Size, device: torch.device) -> Inputs:
    tokens = size["tokens"]
    values, change, returns = (torch.randn(tokens, device=device) for _ in range(3))
    mask = torch.rand(tokens, device=device) < 0.5
    return {
        "values": values,
        "old_values": values + 0.1 * change,  # which moved a little since the rollout
        "returns": returns,
        "mask": mask,
        "num_tokens": mask.sum(),
        "upstream": {"loss": torch.ones((), device=device)},
    }


def _exact(inputs: Inputs) -> dict[str, Expected]:
    values, old_values, returns = (
        inputs[name].detach().double().requires_grad_() for name in VALUE_LOSS.arguments[:3]
    )
    loss, _ = _plain_loss(values, old_values, returns, inputs["mask"], inputs["num_tokens"])
    (gradient,) = torch.autograd.grad(loss, values)
    return {
        "loss": Expected(loss.detach(), 1e-4),
        "values_grad": Expected(gradient, 1e-3, is_relative=True),
    }


def _cost(inputs: Inputs, mode: Mode) -> Cost:
    # Reads three floats and a byte of a token, writes its derivative.
    return Cost(num_bytes=(4 * 4 + 1) * inputs["mask"].numel())


def _ours(*arguments: Tensor) -> tuple[Tensor, Tensor]:
    result = value_loss(*arguments, cliprange=_CLIP)
    return result.loss, result.clip_fraction


def _plain_loss(
    values: Tensor, old_values: Tensor, returns: Tensor, mask: Tensor, num_tokens: Tensor
) -> tuple[Tensor, Tensor]:
    """A masked mean as TRL, verl and OpenRLHF take it, with the same metrics as ours."""
    near = values.clamp(old_values - _CLIP, old_values + _CLIP)
    far_error, near_error = (values - returns).square(), (near - returns).square()
    loss = 0.5 * (torch.maximum(far_error, near_error) * mask).sum() / num_tokens
    with torch.no_grad():
        errors = returns - values
        metrics = (
            ((near_error > far_error) * mask).sum() / num_tokens,
            (returns * mask).sum() / num_tokens,
            (returns.square() * mask).sum() / num_tokens,
            (errors * mask).sum() / num_tokens,
            (errors.square() * mask).sum() / num_tokens,
        )
    return loss, torch.stack(metrics)


VALUE_LOSS = Operation(
    name="value_loss",
    sizes=_SIZES,
    inputs=_inputs,
    arguments=("values", "old_values", "returns", "mask", "num_tokens"),
    outputs=("loss", "metrics"),
    gradients=("values",),
    modes=("forward+backward",),
    exact=_exact,
    cost=_cost,
    providers=(
        Provider("trident", plain(_ours)),
        Provider("TRL, verl, OpenRLHF: torch", plain(_plain_loss)),
        Provider("torch.compile", compiled(_plain_loss), needs_gpu=True),
    ),
)
