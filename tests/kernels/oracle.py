"""What the softmax kernels should give, in fp64 on the same rounded inputs."""

import math

import torch
from torch import Tensor


def exact_logprobs(
    logits: Tensor,
    labels: Tensor,
    *,
    temperature: float = 1.0,
    num_valid_vocab: int | None = None,
    ignore_index: int = -100,
) -> tuple[Tensor, Tensor]:
    """Log-prob and entropy [T] fp64 of logits [T, V], differentiable."""
    z = logits.double()[:, :num_valid_vocab] / temperature
    log_p = z.log_softmax(-1)
    ignored = labels == ignore_index
    picked = log_p.gather(1, labels.long().clamp(0, z.shape[1] - 1)[:, None])[:, 0]
    entropy = -torch.where(log_p > -math.inf, log_p.exp() * log_p, 0.0).sum(-1)
    return torch.where(ignored, 0.0, picked), torch.where(ignored, 0.0, entropy)


def random_rows(
    num_rows: int, num_columns: int, *, dtype: torch.dtype = torch.float32, scale: float = 4.0
) -> tuple[Tensor, Tensor]:
    """Logits [T, V] of the given standard deviation, and labels with the first and last column."""
    generator = torch.Generator().manual_seed(num_rows * 7919 + num_columns)
    logits = scale * torch.randn(num_rows, num_columns, generator=generator)
    labels = torch.randint(0, num_columns, (num_rows,), generator=generator)
    if num_rows > 1:
        labels[0], labels[-1] = 0, num_columns - 1
    return logits.to(dtype), labels


def largest_difference(a: Tensor, b: Tensor) -> float:
    """max |a - b| in fp64; 0 for empty tensors."""
    return (a.double() - b.double()).abs().max().item() if a.numel() else 0.0


def relative_difference(a: Tensor, b: Tensor) -> float:
    """Frobenius norm of a - b over that of b."""
    return ((a.double() - b.double()).norm() / b.double().norm()).item()
