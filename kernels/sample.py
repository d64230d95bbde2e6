"""Sampling by Gumbel-max: one read of the logits gives the token, its log-prob and logsumexp.

    token = argmax over columns of  z + g,   z = logits / temperature,   g = -log(-log(1 - u))

draws from softmax(z) (Gumbel 1954; Maddison et al. 2014). The noise g of a column is that of
philox.py: a sample depends on its own logits and (seed, sample index, position) alone, not on the
batch around it, the vocabulary shards or the order of the work.
"""

from typing import NamedTuple

import torch
import triton
import triton.language as tl
from torch import Tensor

from kernels.launch import next_power_of_2, num_warps_for, uses_triton
from kernels.philox import SampleKey, log_survival_reference, row_noise
from kernels.traced import traced
from kernels.truncation import truncation_thresholds

_BLOCK = 2048  # columns a program reads; a row is merged from several programs
_NO_COLUMN = tl.constexpr(2**31 - 1)  # sorts after every column
# Words of a core's working set on the CPU: torch gives a second core what exceeds this.
_PHILOX_WORDS = 1 << 15


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
def _store_state(state, value, logit, logsumexp, column):
    tl.store(state, value.to(tl.int32, bitcast=True))
    tl.store(state + 1, logit.to(tl.int32, bitcast=True))
    tl.store(state + 2, logsumexp.to(tl.int32, bitcast=True))
    tl.store(state + 3, column.to(tl.int32))


@triton.jit
def _logsumexp(x):
    """logsumexp of a block; -inf if it holds nothing else."""
    m = tl.max(x)
    shift = tl.where(m == float("-inf"), 0.0, m)
    return shift + tl.log(tl.sum(tl.exp(x - shift)))


@triton.jit(do_not_specialize=["seed", "first_column", "num_columns", "num_chunks"])
def _sample_kernel(
    states,  # [chunks, B, 4]
    logits,  # [B, V]
    sample_index,  # [B]
    position,  # [B]
    thresholds,  # [B] or None
    inverse_temperature,
    seed_ptr,  # [] or None: then the number
    seed,
    first_column,
    num_columns,
    num_chunks,
    row_stride,
    GREEDY: tl.constexpr,
    BLOCK: tl.constexpr,
):
    # One program a row and chunk of columns; chunks begin at a multiple of 4 global columns.
    row = (tl.program_id(0) // num_chunks).to(tl.int64)
    chunk = tl.program_id(0) % num_chunks
    num_rows = tl.num_programs(0) // num_chunks
    first_quad = first_column // 4 + chunk * (BLOCK // 4)
    column = first_quad * 4 + tl.arange(0, BLOCK)
    local = column - first_column
    valid = (local >= 0) & (local < num_columns)
    z = tl.load(logits + row * row_stride + local, mask=valid, other=float("-inf"))
    z = z.to(tl.float32) * inverse_temperature
    perturbed = z
    if not GREEDY:
        if seed_ptr is not None:
            seed = tl.load(seed_ptr)
        quads = (first_quad + tl.arange(0, BLOCK // 4)).to(tl.uint32)
        perturbed += row_noise(
            tl.cast(seed, tl.int64),
            tl.load(sample_index + row).to(tl.int64),
            tl.load(position + row),
            quads,
        )
        if thresholds is not None:
            kept = z >= tl.load(thresholds + row)
            perturbed = tl.where(kept, perturbed, float("-inf"))
    perturbed = tl.where(perturbed == perturbed, perturbed, float("-inf"))  # NaN never wins
    best = tl.max(perturbed)
    best_column = tl.min(tl.where(valid & (perturbed == best), column, _NO_COLUMN))
    logit = tl.sum(tl.where(column == best_column, z, 0.0))
    state = states + (chunk.to(tl.int64) * num_rows + row) * 4
    _store_state(state, best, logit, _logsumexp(z), best_column)


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
    column = tl.load(state + 3, mask=inside, other=_NO_COLUMN)
    best = tl.max(value)
    best_column = tl.min(tl.where(value == best, column, _NO_COLUMN))
    logit = tl.max(tl.where(column == best_column, logit, float("-inf")))
    logsumexp = _logsumexp(logsumexp)
    if merged is not None:
        _store_state(merged + row * 4, best, logit, logsumexp, best_column)
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


@traced("trident::sample_state")
def _chunk_states(
    logits: Tensor,
    sample_index: Tensor,
    position: Tensor,
    thresholds: Tensor | None,
    temperature: float,
    seed_tensor: Tensor | None,
    seed: int,
    first_column: int,
    num_columns: int,
) -> Tensor:
    """[chunks, B, 4] states of the chunks of the first num_columns columns of logits."""
    num_rows = len(logits)
    num_chunks = max(1, triton.cdiv(first_column % 4 + num_columns, _BLOCK))
    states = torch.empty(num_chunks, num_rows, 4, dtype=torch.int32, device=logits.device)
    if num_rows > 0:
        with torch.cuda.device_of(logits):
            _sample_kernel[(num_rows * num_chunks,)](
                states,
                logits if logits.stride(1) == 1 else logits.contiguous(),
                sample_index.contiguous(),
                position.contiguous(),
                thresholds,
                1 / temperature if temperature > 0 else 1.0,
                seed_tensor,
                seed,
                first_column,
                num_columns,
                num_chunks,
                logits.stride(0) if logits.stride(1) == 1 else logits.shape[1],
                GREEDY=temperature == 0,
                BLOCK=_BLOCK,
                num_warps=num_warps_for(_BLOCK),
            )
    return states


@_chunk_states.register_fake
def _(
    logits: Tensor,
    sample_index: Tensor,
    position: Tensor,
    thresholds: Tensor | None,
    temperature: float,
    seed_tensor: Tensor | None,
    seed: int,
    first_column: int,
    num_columns: int,
) -> Tensor:
    num_chunks = max(1, triton.cdiv(first_column % 4 + num_columns, _BLOCK))
    return logits.new_empty(num_chunks, len(logits), 4, dtype=torch.int32)


def sample_state_reference(
    logits: Tensor,
    key: SampleKey,
    *,
    temperature: float,
    first_column: int,
    num_columns: int,
    thresholds: Tensor | None,
) -> Tensor:
    """[B, 4] state of the first num_columns columns in plain torch: specification and CPU path."""
    states = [torch.empty(0, 4, dtype=torch.int32)]
    # Some rows at a time: their hundred passes of integer arithmetic stay in each core's cache.
    num_rows = max(1, 4 * _PHILOX_WORDS * torch.get_num_threads() // max(1, num_columns))
    for start in range(0, len(logits), num_rows):
        rows = slice(start, start + num_rows)
        z = logits[rows, :num_columns].float() * (1 / (temperature or 1.0))
        some = SampleKey(key.seed, key.sample_index[rows], key.position[rows])
        cut = None if thresholds is None else thresholds[rows, None]
        states.append(_state_of_rows(z, None if temperature == 0 else some, first_column, cut))
    return torch.cat(states)


def _state_of_rows(
    z: Tensor, key: SampleKey | None, first_column: int, thresholds: Tensor | None
) -> Tensor:
    """[R, 4] state of logits / temperature [R, n] fp32; without a key it is greedy."""
    if z.shape[1] == 0:
        nothing = torch.full((len(z), 3), -torch.inf)
        column = torch.full((len(z), 1), _NO_COLUMN.value, dtype=torch.int32)
        return torch.cat((nothing.view(torch.int32), column), dim=1)
    largest = z.amax(1, keepdim=True)
    largest = largest.masked_fill(largest == -torch.inf, 0.0)
    mass = (z - largest).exp_()
    logsumexp = largest + mass.sum(1, keepdim=True).log_()
    if key is None:
        value, column = z.max(1, keepdim=True)  # the first of equals
    else:
        # z + g = log(mass) + largest - log(-log(1 - u)) is largest where log(1 - u) / mass is:
        # one logarithm a column instead of two, and the exponential serves twice.
        if thresholds is not None:
            mass.masked_fill_(z < thresholds, 0.0)
        survival = log_survival_reference(key, first_column, z.shape[1])
        best, column = survival.div_(mass).max(1, keepdim=True)
        value = largest - best.neg_().log_()
    value = torch.where(value.isnan(), -torch.inf, value)
    floats = torch.cat((value, z.gather(1, column), logsumexp), dim=1)
    return torch.cat((floats.view(torch.int32), (column + first_column).int()), dim=1)


def merge_states_reference(states: Tensor) -> Tensor:
    """[B, 4] state of whole rows from [N, B, 4] states of their parts, in plain torch."""
    value, logit, logsumexp = states[..., :3].view(torch.float32).unbind(2)
    column = states[..., 3]
    best = value.amax(0)
    # Equal values go to the lowest column, as in one read of the whole row.
    best_column = torch.where(value == best, column, _NO_COLUMN.value).amin(0)
    best_logit = torch.where(column == best_column, logit, -torch.inf).amax(0)
    floats = torch.stack((best, best_logit, logsumexp.logsumexp(0)), dim=1)
    return torch.cat((floats.view(torch.int32), best_column[:, None]), dim=1)


def sample_state(
    logits: Tensor,
    key: SampleKey,
    *,
    temperature: float,
    first_column: int = 0,
    num_valid_vocab: int | None = None,
    thresholds: Tensor | None = None,
) -> Tensor:
    """[N, B, 4] int32 states of the N parts in which one vocabulary shard is read.

    Columns: best perturbed value, its scaled logit, logsumexp (fp32 bits), its global column.
    logits [B, V_shard] holds global columns first_column on; thresholds as `truncation_thresholds`
    gives them for the whole vocabulary. A shard of padding alone is fine.
    """
    num_columns = logits.shape[1]
    if num_valid_vocab is not None:
        num_columns = min(max(num_valid_vocab - first_column, 0), num_columns)
    if uses_triton(logits):
        return _chunk_states(
            logits,
            key.sample_index,
            key.position,
            thresholds,
            temperature,
            *((key.seed, 0) if isinstance(key.seed, Tensor) else (None, key.seed)),
            first_column,
            num_columns,
        )
    return sample_state_reference(
        logits,
        key,
        temperature=temperature,
        first_column=first_column,
        num_columns=num_columns,
        thresholds=thresholds,
    )[None]


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
