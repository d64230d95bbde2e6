"""From log-probs, values and scores to advantages, returns and their moments for whitening.

The batch is a padded one, [B, L] with a mask of contiguous responses, because that is what the
frameworks compute on; the packed form of the same tensors is its flat view. Every provider does the
whole job: KL penalty, scan and whitening statistics.
"""

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
    compiled,
    plain,
)
from kernels.gae import gae
from kernels.moments import masked_moments

_KL_COEF, _GAMMA, _LAM = 0.05, 0.99, 0.95
_PADDED = ("padded_logprobs", "padded_ref_logprobs", "padded_values", "scores", "padded_mask")

_SIZES = {
    "cuda": [
        {"sequences": 512, "length": 1024},
        {"sequences": 64, "length": 512},
        {"sequences": 2048, "length": 512},
        {"sequences": 8192, "length": 1024},
        {"sequences": 512, "length": 4096},
    ],
    "cpu": [{"sequences": 16, "length": 128}, {"sequences": 64, "length": 256}],
}


def _inputs(size: Size, device: torch.device) -> Inputs:
    num_sequences, length = size["sequences"], size["length"]
    shape = (num_sequences, length)
    column = torch.arange(length, device=device)
    # A prompt of a quarter, then responses from nothing to all of the rest.
    ends = torch.randint(length // 4 + 1, length + 1, (num_sequences, 1), device=device)
    mask = (column >= length // 4) & (column < ends)
    logprobs = -torch.rand(shape, device=device)
    padded = {
        "logprobs": logprobs,
        "ref_logprobs": logprobs + 0.1 * torch.randn(shape, device=device),
        "values": torch.randn(shape, device=device),
        "mask": mask,
    }
    starts = torch.arange(0, num_sequences * length + 1, length, device=device)
    return {
        **{f"padded_{name}": tensor for name, tensor in padded.items()},
        **{name: tensor.flatten() for name, tensor in padded.items()},
        "scores": torch.randn(num_sequences, device=device),
        "cu_seqlens": starts.int(),
        "upstream": {},
    }


def _exact(inputs: Inputs) -> dict[str, Expected]:
    tensors = [inputs[name] for name in _PADDED]
    doubles = [x.double() if x.is_floating_point() else x for x in tensors]
    advantages, returns, moments = _verl_loop(*doubles)
    return {
        "advantages": Expected(advantages, 1e-3),
        "returns": Expected(returns, 1e-3),
        "moments": Expected(moments, 1e-4, is_relative=True),
    }


def _cost(inputs: Inputs, mode: Mode) -> Cost:
    # Reads three floats and a byte of a token, writes four floats.
    return Cost(num_bytes=(4 * 7 + 1) * inputs["values"].numel())


def _ours(
    logprobs: Tensor, ref_logprobs: Tensor, values: Tensor, *others: Tensor
) -> tuple[Tensor, Tensor, Tensor]:
    result = gae(logprobs, ref_logprobs, values, *others, kl_coef=_KL_COEF, gamma=_GAMMA, lam=_LAM)
    return result.advantages, result.returns, result.stats


def _whole_job(
    scan: Callable[[Tensor, Tensor, Tensor], Tensor],
) -> Callable[..., tuple[Tensor, Tensor, Tensor]]:
    """Rewards, scan, returns and moments around scan(rewards, values, mask) -> advantages."""

    def compute(
        logprobs: Tensor, ref_logprobs: Tensor, values: Tensor, scores: Tensor, mask: Tensor
    ) -> tuple[Tensor, Tensor, Tensor]:
        is_last = mask & (mask.flip(1).cumsum(1).flip(1) == 1)
        rewards = -_KL_COEF * (logprobs - ref_logprobs) + is_last * scores[:, None]
        rewards, values = rewards * mask, values * mask
        advantages = scan(rewards, values, mask) * mask
        moments = masked_moments(advantages, mask)
        return advantages.flatten(), (advantages + values).flatten(), moments

    return compute


@_whole_job
def _plain_loop(rewards: Tensor, values: Tensor, mask: Tensor) -> Tensor:
    """A column a step, zeros beyond the response: the loop of TRL and OpenRLHF."""
    advantage, next_value, columns = 0.0, 0.0, []
    for t in range(rewards.shape[1] - 1, -1, -1):
        delta = rewards[:, t] + _GAMMA * next_value - values[:, t]
        advantage = delta + _GAMMA * _LAM * advantage
        next_value = values[:, t]
        columns.append(advantage)
    return torch.stack(columns[::-1], 1)


@_whole_job
def _verl_loop(rewards: Tensor, values: Tensor, mask: Tensor) -> Tensor:
    """A column a step, masked columns passed over: the loop of verl."""
    advantage, next_value, columns = 0.0, 0.0, []
    for t in range(rewards.shape[1] - 1, -1, -1):
        delta = rewards[:, t] + _GAMMA * next_value - values[:, t]
        is_response = mask[:, t].to(rewards.dtype)
        new = delta + _GAMMA * _LAM * advantage
        advantage = is_response * new + (1 - is_response) * advantage
        next_value = is_response * values[:, t] + (1 - is_response) * next_value
        columns.append(advantage)
    return torch.stack(columns[::-1], 1)


@_whole_job
def _doubling_scan(rewards: Tensor, values: Tensor, mask: Tensor) -> Tensor:
    """log2(L) steps, each composing the affine maps of twice as many columns."""
    # A_t = a_t A_{t+1} + delta_t with a_t = 0 where no response follows.
    follows = torch.nn.functional.pad(mask[:, 1:], (0, 1))
    next_values = torch.nn.functional.pad(values[:, 1:], (0, 1))
    b = rewards + _GAMMA * next_values - values
    a = _GAMMA * _LAM * follows
    step = 1
    while step < rewards.shape[1]:
        b = b + a * torch.nn.functional.pad(b[:, step:], (0, step))
        a = a * torch.nn.functional.pad(a[:, step:], (0, step), value=1.0)
        step *= 2
    return b


def _torchrl() -> Any:
    from torchrl.objectives.value.functional import vec_generalized_advantage_estimate

    def scan(rewards: Tensor, values: Tensor, mask: Tensor) -> Tensor:
        next_values = torch.nn.functional.pad(values[:, 1:], (0, 1))
        is_done = torch.zeros_like(mask)
        is_done[:, -1] = True
        columns = (values, next_values, rewards, is_done)
        return vec_generalized_advantage_estimate(_GAMMA, _LAM, *(x[..., None] for x in columns))[
            0
        ][..., 0]

    return _whole_job(scan)


GAE = Operation(
    name="gae",
    sizes=_SIZES,
    inputs=_inputs,
    arguments=("logprobs", "ref_logprobs", "values", "scores", "cu_seqlens", "mask"),
    outputs=("advantages", "returns", "moments"),
    modes=("forward",),
    exact=_exact,
    cost=_cost,
    providers=(
        Provider("trident", plain(_ours)),
        Provider("TRL, OpenRLHF: loop", plain(_plain_loop), arguments=_PADDED),
        Provider("verl: loop", plain(_verl_loop), arguments=_PADDED),
        Provider("torch doubling scan", plain(_doubling_scan), arguments=_PADDED),
        Provider("torch.compile", compiled(_doubling_scan), arguments=_PADDED, needs_gpu=True),
        Provider("torchrl", _torchrl, arguments=_PADDED),
    ),
)
