"""Sampling by Gumbel-max: one read of the logits gives the token, its log-prob and logsumexp.

A token is drawn from softmax(z), z = logits / temperature, as `sample_state.py` says. It depends on
the logits of its row and (seed, sample index, position) alone. The batch around it, the vocabulary
shards and the order of the work are all the same to it. Here the states of a row's parts become its
sample.
"""

from typing import NamedTuple

import torch
import triton
import triton.language as tl
from torch import Tensor

from kernels.launch import next_power_of_2, uses_triton
from kernels.philox import SampleKey
from kernels.sample_state import NO_COLUMN, block_logsumexp, sample_state, store_state
from kernels.traced import traced
from kernels.truncation import truncation_thresholds


class Sample(NamedTuple):
    """One sampled token a row."""

    tokens: Tensor
    """[B] int64 global column."""
    logprobs: Tensor
    """[B] fp32 log-prob of the token under softmax(logits / temperature), before top-k and top-p.

    This is the one PPO's ratio needs. Greedy sampling reports it at temperature 1.
    """
    logsumexp: Tensor
    """[B] fp32 logsumexp of logits / temperature over the valid columns."""


@triton.jit
def _merge_kernel(
    merged,  # [B, 4]; None for the three after it, which are None otherwise
    tokens,  # [B]
    logprobs,
    logsumexps,
    states,  # [N, B, 4]
    num_states,
    STATES: tl.constexpr,
):
    row = tl.program_id(0).to(tl.int64)
    n = tl.arange(0, STATES)
    inside = n < num_states
    state = states + (n.to(tl.int64) * tl.num_programs(0) + row) * 4
    value = tl.load(state, mask=inside, other=0).to(tl.float32, bitcast=True)
    value = tl.where(inside, value, float("-inf"))
    logit = tl.load(state + 1, mask=inside, other=0).to(tl.float32, bitcast=True)
    logsumexp = tl.load(state + 2, mask=inside, other=0).to(tl.float32, bitcast=True)
    logsumexp = tl.where(inside, logsumexp, float("-inf"))
    column = tl.load(state + 3, mask=inside, other=NO_COLUMN)
    best = tl.max(value)
    best_column = tl.min(tl.where(value == best, column, NO_COLUMN))
    logit = tl.max(tl.where(column == best_column, logit, float("-inf")))
    logsumexp = block_logsumexp(logsumexp)
    if merged is not None:
        store_state(merged + row * 4, best, logit, logsumexp, best_column)
    else:
        tl.store(tokens + row, best_column.to(tl.int64))
        tl.store(logprobs + row, logit - logsumexp)
        tl.store(logsumexps + row, logsumexp)


def _launch_merge(outputs: tuple[Tensor | None, ...], states: Tensor) -> None:
    num_states, num_rows, _ = states.shape
    if num_rows > 0:
        with torch.cuda.device_of(states):
            _merge_kernel[(num_rows,)](
                *outputs,
                states.contiguous(),
                num_states,
                STATES=next_power_of_2(num_states),
                num_warps=1,
            )


@traced("trident::merge_sample_states")
def _merge_states(states: Tensor) -> Tensor:
    """[B, 4] state of a shard's rows from [N, B, 4] of their parts."""
    merged = torch.empty(states.shape[1:], dtype=torch.int32, device=states.device)
    _launch_merge((merged, None, None, None), states)
    return merged


@traced("trident::merge_samples")
def _merge_samples(states: Tensor) -> tuple[Tensor, Tensor, Tensor]:
    """The fields of the sample of whole rows, [B] each, from [N, B, 4] of their parts."""
    outputs = _empty_sample(states)
    _launch_merge((None, *outputs), states)
    return outputs


def _empty_sample(states: Tensor) -> tuple[Tensor, Tensor, Tensor]:
    tokens = states.new_empty(states.shape[1], dtype=torch.int64)
    logprobs = states.new_empty(states.shape[1], dtype=torch.float32)
    return tokens, logprobs, torch.empty_like(logprobs)


@_merge_states.register_fake
def _(states: Tensor) -> Tensor:
    return torch.empty_like(states[0])


_merge_samples.register_fake(_empty_sample)


def merge_states_reference(states: Tensor) -> Tensor:
    """[B, 4] state of whole rows from [N, B, 4] states of their parts, in plain torch."""
    value, logit, logsumexp = states[..., :3].view(torch.float32).unbind(2)
    column = states[..., 3]
    best = value.amax(0)
    # Equal values go to the lowest column, as in one read of the whole row.
    best_column = torch.where(value == best, column, NO_COLUMN.value).amin(0)
    best_logit = torch.where(column == best_column, logit, -torch.inf).amax(0)
    floats = torch.stack((best, best_logit, logsumexp.logsumexp(0)), dim=1)
    return torch.cat((floats.view(torch.int32), best_column[:, None]), dim=1)


def merge_states(states: Tensor) -> Tensor:
    """[B, 4] state of a shard, 16 bytes a row, from [N, B, 4] states of its parts."""
    if len(states) == 1:
        return states[0]
    return _merge_states(states) if uses_triton(states) else merge_states_reference(states)


def merge_samples(states: Tensor) -> Sample:
    """The sample of whole rows from [N, B, 4] states of their N parts or shards, in order."""
    if uses_triton(states):
        return Sample(*_merge_samples(states))
    state = merge_states(states)
    _, logit, logsumexp = state[:, :3].view(torch.float32).unbind(1)
    return Sample(state[:, 3].long(), logit - logsumexp, logsumexp.clone())


def check_sampling(temperature: float, top_k: int, top_p: float, seed: int | Tensor) -> None:
    """Raise ValueError for a value out of range; a seed on the device is not looked at."""
    is_seed = isinstance(seed, Tensor) or 0 <= seed < 2**63
    if temperature < 0 or top_k < 0 or not 0 < top_p <= 1 or not is_seed:
        raise ValueError(
            f"temperature {temperature} and top_k {top_k} must not be negative, top_p {top_p} must "
            f"lie in (0, 1] and seed {seed} in [0, 2^63)"
        )


def sample(
    logits: Tensor,
    *,
    temperature: float,
    seed: int | Tensor,
    sample_index: Tensor,
    position: Tensor,
    top_k: int = 0,
    top_p: float = 1.0,
    num_valid_vocab: int | None = None,
) -> Sample:
    """One token a row of logits [B, V], its log-prob and the row's logsumexp.

    Library only: of a whole vocabulary; generation calls models/vocab_parallel.py.

    sample_index, position [B] and seed as in `SampleKey`. temperature 0 is greedy, the lowest
    column of equals. top_k 0 and top_p 1 keep every column. A row with NaN gives some valid column
    and a NaN log-prob. Raises ValueError for a value out of range.
    """
    check_sampling(temperature, top_k, top_p, seed)
    thresholds = None
    if temperature > 0 and (top_k > 0 or top_p < 1):
        thresholds = truncation_thresholds(
            logits,
            temperature=temperature,
            top_k=top_k,
            top_p=top_p,
            num_valid_vocab=num_valid_vocab,
        )
    states = sample_state(
        logits,
        SampleKey(seed, sample_index, position),
        temperature=temperature,
        num_valid_vocab=num_valid_vocab,
        thresholds=thresholds,
    )
    return merge_samples(states)
