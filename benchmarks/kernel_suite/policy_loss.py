"""PPO's clipped policy and value losses of T tokens with their metrics, forward and backward."""

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
from kernels.moments import Whitening
from kernels.ppo_loss import ppo_loss

_CLIP = 0.2
_POLICY = ("logprobs", "old_logprobs", "advantages")
_VALUE = ("values", "old_values", "returns")

_SIZES = {
    "cuda": [{"tokens": 131072}, {"tokens": 8192}, {"tokens": 1048576}],
    "cpu": [{"tokens": 8192}, {"tokens": 131072}],
}


def _inputs(size: Size, device: torch.device) -> Inputs:
    inputs = {name: torch.randn(size["tokens"], device=device) for name in _POLICY + _VALUE}
    for name in ("logprobs", "values"):  # which moved a little since the rollout
        inputs[f"old_{name}"] = inputs[name] + 0.1 * inputs[f"old_{name}"]
    mask = torch.rand(size["tokens"], device=device) < 0.5
    return inputs | {
        "mask": mask,
        "num_tokens": mask.sum(),
        "mean": torch.tensor(0.1, device=device),
        "rstd": torch.tensor(1.2, device=device),
        "upstream": {
            "policy_loss": torch.ones((), device=device),
            "value_loss": torch.ones((), device=device),
        },
    }


def _exact(inputs: Inputs) -> dict[str, Expected]:
    doubles = {
        name: x.detach().double() if x.is_floating_point() else x
        for name, x in inputs.items()
        if isinstance(x, Tensor)
    }
    leaves = [doubles[name].requires_grad_() for name in PPO_LOSS.gradients]
    policy_loss, value_loss, _ = _plain_losses(*(doubles[name] for name in PPO_LOSS.arguments))
    gradients = torch.autograd.grad(policy_loss + value_loss, leaves)
    return {
        "policy_loss": Expected(policy_loss.detach(), 1e-4),
        "value_loss": Expected(value_loss.detach(), 1e-4),
        **{
            f"{name}_grad": Expected(gradient, 1e-3, is_relative=True)
            for name, gradient in zip(PPO_LOSS.gradients, gradients, strict=True)
        },
    }


def _cost(inputs: Inputs, mode: Mode) -> Cost:
    # Reads six floats and a byte of a token, writes two derivatives.
    return Cost(num_bytes=(4 * 8 + 1) * inputs["mask"].numel())


def _ours(*arguments: Tensor) -> tuple[Tensor, Tensor, Tensor]:
    policy, value = arguments[:3], arguments[3:6]
    mask, num_tokens, mean, rstd = arguments[6:]
    whitening = Whitening(mean, rstd)
    first, second = ppo_loss(policy, value, mask, num_tokens, whitening=whitening)
    return first.loss, second.loss, first.clip_fraction


def _plain_losses(*arguments: Tensor) -> tuple[Tensor, Tensor, Tensor]:
    """Masked means as TRL, verl and OpenRLHF take them, with the same metrics as ours."""
    logprobs, old_logprobs, advantages, values, old_values, returns = arguments[:6]
    mask, num_tokens, mean, rstd = arguments[6:]
    advantages = (advantages - mean) * rstd
    log_ratio = logprobs - old_logprobs
    ratio = log_ratio.exp()
    unclipped, clipped = -advantages * ratio, -advantages * ratio.clamp(1 - _CLIP, 1 + _CLIP)
    policy_loss = (torch.maximum(unclipped, clipped) * mask).sum() / num_tokens
    near = values.clamp(old_values - _CLIP, old_values + _CLIP)
    far_error, near_error = (values - returns).square(), (near - returns).square()
    value_loss = 0.5 * (torch.maximum(far_error, near_error) * mask).sum() / num_tokens
    with torch.no_grad():
        errors = returns - values
        metrics = (
            ((clipped > unclipped) * mask).sum() / num_tokens,
            (-log_ratio * mask).sum() / num_tokens,
            ((ratio - 1 - log_ratio) * mask).sum() / num_tokens,
            torch.where(mask, ratio, torch.inf).min(),
            torch.where(mask, ratio, -torch.inf).max(),
            ((near_error > far_error) * mask).sum() / num_tokens,
            (returns * mask).sum() / num_tokens,
            (returns.square() * mask).sum() / num_tokens,
            (errors * mask).sum() / num_tokens,
            (errors.square() * mask).sum() / num_tokens,
        )
    return policy_loss, value_loss, torch.stack(metrics)


PPO_LOSS = Operation(
    name="ppo_loss",
    sizes=_SIZES,
    inputs=_inputs,
    arguments=(*_POLICY, *_VALUE, "mask", "num_tokens", "mean", "rstd"),
    outputs=("policy_loss", "value_loss", "metrics"),
    gradients=("logprobs", "values"),
    modes=("forward+backward",),
    exact=_exact,
    cost=_cost,
    providers=(
        Provider("trident", plain(_ours)),
        Provider("TRL, verl, OpenRLHF: torch", plain(_plain_losses)),
        Provider("torch.compile", compiled(_plain_losses), needs_gpu=True),
    ),
)
