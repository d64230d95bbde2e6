"""PPO's clipped policy loss of T tokens: the loss, its gradient by the log-probs, the metrics."""

from collections.abc import Callable
from typing import Any

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
    plain,
)
from kernels.moments import Whitening
from kernels.policy_loss import policy_metrics, policy_token_losses

_CLIP = 0.2
_SIZES = {
    "cuda": [{"tokens": 131072}, {"tokens": 8192}, {"tokens": 1048576}],
    "cpu": [{"tokens": 8192}, {"tokens": 131072}],
}


def _inputs(size: Size, device: torch.device) -> Inputs:
    tokens = size["tokens"]
    logprobs, change, advantages = torch.randn(3, tokens, device=device)
    mask = torch.ones(tokens, dtype=torch.bool, device=device)  # the head computes no others
    return {
        "logprobs": logprobs,
        "old_logprobs": logprobs + 0.1 * change,  # which moved a little since the rollout
        "advantages": advantages.clone(),
        "rows": torch.arange(tokens, device=device),
        "mask": mask,
        "num_tokens": mask.sum(),
        "mean": torch.tensor(0.1, device=device),
        "rstd": torch.tensor(1.2, device=device),
    }


def _exact(inputs: Inputs) -> dict[str, Expected]:
    arguments = (
        x.detach().double() if x.is_floating_point() else x
        for x in (inputs[name] for name in POLICY_LOSS.arguments)
    )
    loss, gradient, _ = _plain_gradient(*arguments)
    return {
        "loss": Expected(loss, 1e-4),
        "gradient": Expected(gradient, 1e-3, is_relative=True),
    }


def _cost(inputs: Inputs, mode: Mode) -> Cost:
    # Reads three floats and a byte of a token, writes its derivative.
    return Cost(num_bytes=(4 * 4 + 1) * inputs["mask"].numel())


def _ours(*arguments: Tensor) -> tuple[Tensor, Tensor, Tensor]:
    """As the head calls it, on the rows that it computes."""
    *policy, rows, mask, num_tokens, mean, rstd = arguments
    logprobs, old_logprobs, advantages = policy
    _, derivatives, terms = policy_token_losses(
        (logprobs, old_logprobs, advantages),
        rows,
        num_tokens,
        cliprange=_CLIP,
        whitening=Whitening(mean, rstd),
    )
    metrics = policy_metrics(terms, mask, num_tokens)
    return metrics.loss, derivatives, metrics.clip_fraction


def _plain_loss(*arguments: Tensor) -> tuple[Tensor, Tensor]:
    """A masked mean as TRL, verl and OpenRLHF take it, with the same metrics as ours."""
    logprobs, old_logprobs, advantages, _, mask, num_tokens, mean, rstd = arguments
    advantages = (advantages - mean) * rstd
    log_ratio = logprobs - old_logprobs
    ratio = log_ratio.exp()
    unclipped, clipped = -advantages * ratio, -advantages * ratio.clamp(1 - _CLIP, 1 + _CLIP)
    loss = (torch.maximum(unclipped, clipped) * mask).sum() / num_tokens
    with torch.no_grad():
        metrics = (
            ((clipped > unclipped) * mask).sum() / num_tokens,
            ((ratio - 1 - log_ratio) * mask).sum() / num_tokens,
            torch.where(mask, ratio, torch.inf).min(),
            torch.where(mask, ratio, -torch.inf).max(),
        )
    return loss, torch.stack(metrics)


def _with_gradient(loss_of: Callable[..., Any]) -> Callable[..., tuple[Tensor, Tensor, Tensor]]:
    """The loss, its gradient by the log-probs as autograd finds it, and the metrics."""

    def run(logprobs: Tensor, *rest: Tensor) -> tuple[Tensor, Tensor, Tensor]:
        with torch.enable_grad():
            leaf = logprobs.detach().requires_grad_()
            loss, metrics = loss_of(leaf, *rest)
            (gradient,) = torch.autograd.grad(loss, leaf)
        return loss.detach(), gradient, metrics

    return run


_plain_gradient = _with_gradient(_plain_loss)


def _compiled() -> Callable[..., Any]:
    return _with_gradient(torch.compile(_plain_loss, dynamic=False))


POLICY_LOSS = Operation(
    name="policy_loss",
    sizes=_SIZES,
    inputs=_inputs,
    arguments=(
        "logprobs",
        "old_logprobs",
        "advantages",
        "rows",
        "mask",
        "num_tokens",
        "mean",
        "rstd",
    ),
    outputs=("loss", "gradient", "metrics"),
    modes=("forward",),  # the gradient is an output
    exact=_exact,
    cost=_cost,
    providers=(
        Provider("trident", plain(_ours)),
        Provider("TRL, verl, OpenRLHF: torch", plain(_plain_gradient)),
        Provider("torch.compile", _compiled, needs_gpu=True),
    ),
)
