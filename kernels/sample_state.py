"""The state of a draw: what a part of a row's columns says about the token that the row draws.

A token is to have probability softmax(z), z = logits / temperature. Gumbel-max does so with one
noise g = -log(-log(1 - u)) a column: argmax of z + g (Gumbel 1954; Maddison et al. 2014). Here the
columns are cut into groups of 8, from global column 0 on, and drawn in two steps:

    mass_G = sum over the columns c of group G of e^(z_c)
    group  = argmax over groups of            log(mass_G) + g_G    P(G) = mass_G / sum of all masses
    token  = argmax over the group's columns of       z_c + g_c    P(c | G) = e^(z_c) / mass_G

Each step is Gumbel-max, and the noises of groups and columns are independent. So the chain rule
gives P(c) = P(G) P(c | G) = e^(z_c) / sum of all masses: softmax exactly, from V / 8 + 8 noises a
row instead of V. Columns that top-k or top-p cut away, or beyond the vocabulary, have no mass.

The noise is that of philox.py: a sample depends on its own logits and (seed, sample index,
position) alone. A state is 16 bytes, whatever it stands for, and parts merge (sample.py): the group
with the largest value wins, its token with it. So a group must not lie in two parts.
"""

import torch
import triton
import triton.language as tl
from torch import Tensor

from kernels.launch import num_warps_for, uses_triton
from kernels.philox import (
    GROUP,
    MAX_COLUMNS,
    SampleKey,
    column_log_survival,
    column_noise,
    group_log_survival,
    group_noise,
)
from kernels.traced import traced

_BLOCK = 2048  # columns a program reads; a row is merged from several programs
_QUAD = tl.constexpr(4 * GROUP.value)  # columns of the four groups that share a counter
_CACHED_COLUMNS = 1 << 19  # whose masses, 2 MiB, fit the cache of a core
NO_COLUMN = tl.constexpr(2**31 - 1)  # sorts after every column


@triton.jit
def store_state(state, value, logit, logsumexp, column):
    """Write the four int32 words of a state: fp32 bits of three numbers, and the column."""
    tl.store(state, value.to(tl.int32, bitcast=True))
    tl.store(state + 1, logit.to(tl.int32, bitcast=True))
    tl.store(state + 2, logsumexp.to(tl.int32, bitcast=True))
    tl.store(state + 3, column.to(tl.int32))


@triton.jit
def block_logsumexp(x):
    """logsumexp of a block; -inf if it holds nothing else."""
    m = tl.max(x)
    shift = tl.where(m == float("-inf"), 0.0, m)
    return shift + tl.log(tl.sum(tl.exp(x - shift)))


@triton.jit
def _group_logsumexps(z, least):
    """logsumexp of each row of z [G, 8], of all its columns and of those that reach least.

    Shifted by the group's own maximum: other shards and blocks give the same bits.
    """
    m = tl.max(z, 1)
    shift = tl.where(m == float("-inf"), 0.0, m)
    mass = tl.exp(z - shift[:, None])
    whole = shift + tl.log(tl.sum(mass, 1))
    kept = whole
    if least is not None:
        kept = shift + tl.log(tl.sum(tl.where(z >= least, mass, 0.0), 1))
    return whole, kept


@triton.jit
def _best_of(perturbed, valid, number, last):
    """The largest value and the lowest valid number that has it; last where none is valid."""
    perturbed = tl.where(perturbed == perturbed, perturbed, float("-inf"))  # NaN never wins
    best = tl.max(perturbed)
    return best, tl.min(tl.where(valid & (perturbed == best), number, last))


@triton.jit
def _load_scaled(row_logits, local, num_columns, inverse_temperature):
    """The logits / temperature of columns of this shard, and which of them there are."""
    valid = (local >= 0) & (local < num_columns)
    z = tl.load(row_logits + local, mask=valid, other=float("-inf"))
    return z.to(tl.float32) * inverse_temperature, valid


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
    # One program a row and chunk of columns; chunks begin at a multiple of 32 global columns.
    row = (tl.program_id(0) // num_chunks).to(tl.int64)
    chunk = tl.program_id(0) % num_chunks
    num_rows = tl.num_programs(0) // num_chunks
    state = states + (chunk.to(tl.int64) * num_rows + row) * 4
    row_logits = logits + row * row_stride
    first_quad = first_column // _QUAD + chunk * (BLOCK // _QUAD)
    group = first_quad * 4 + tl.arange(0, BLOCK // GROUP)
    column = group[:, None] * GROUP + tl.arange(0, GROUP)[None, :]
    z, valid = _load_scaled(row_logits, column - first_column, num_columns, inverse_temperature)
    if GREEDY:
        best, best_column = _best_of(z, valid, column, NO_COLUMN)
        logit = tl.sum(tl.where(column == best_column, z, 0.0))
        store_state(state, best, logit, block_logsumexp(z), best_column)
    else:
        if seed_ptr is not None:
            seed = tl.load(seed_ptr)
        seed = tl.cast(seed, tl.int64)
        index, token = tl.load(sample_index + row).to(tl.int64), tl.load(position + row)
        least = None
        if thresholds is not None:
            least = tl.load(thresholds + row)
        whole, mass = _group_logsumexps(z, least)
        quads = first_quad + tl.arange(0, BLOCK // _QUAD)
        first = group * GROUP - first_column
        is_held = (first >= 0) & (first < num_columns)
        best, best_group = _best_of(
            mass + group_noise(seed, index, token, quads),
            is_held,
            group,
            first_quad * 4 + BLOCK // GROUP - 1,
        )
        eight = best_group * GROUP + tl.arange(0, GROUP)
        z8, valid8 = _load_scaled(
            row_logits, eight - first_column, num_columns, inverse_temperature
        )
        noise = column_noise(
            seed, index, token, best_group * (GROUP // 4) + tl.arange(0, GROUP // 4)
        )
        if least is not None:
            noise = tl.where(z8 >= least, noise, float("-inf"))
        _, best_column = _best_of(z8 + noise, valid8, eight, NO_COLUMN)
        logit = tl.sum(tl.where(eight == best_column, z8, 0.0))
        store_state(state, best, logit, block_logsumexp(whole), best_column)


def _num_chunks(first_column: int, num_columns: int) -> int:
    return max(1, triton.cdiv(first_column % _QUAD.value + num_columns, _BLOCK))


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
    num_chunks = _num_chunks(first_column, num_columns)
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
    num_chunks = _num_chunks(first_column, num_columns)
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
    if num_columns == 0:
        nothing = torch.full((len(logits), 3), -torch.inf)
        column = torch.full((len(logits), 1), NO_COLUMN.value, dtype=torch.int32)
        return torch.cat((nothing.view(torch.int32), column), dim=1)
    logits, scale = logits[:, :num_columns], 1 / (temperature or 1.0)
    cut = None if thresholds is None else thresholds[:, None]
    mass, kept_mass, largest = _group_masses(logits, scale, cut if temperature > 0 else None)
    logsumexp = largest + mass.sum(1, keepdim=True).log_()
    if temperature == 0:
        value, column = logits.max(1, keepdim=True)  # the first of equals
        value = logit = value.float()
    else:
        value, group = _draw_group(kept_mass, key, first_column)
        value += largest
        column = _draw_column(logits, scale, cut, key, group, first_column)
        logit = logits.gather(1, column).float() * scale
    value = torch.where(value.isnan(), -torch.inf, value)
    floats = torch.cat((value, logit, logsumexp), dim=1)
    return torch.cat((floats.view(torch.int32), (column + first_column).int()), dim=1)


def _row_chunks(num_rows: int, num_columns: int) -> list[slice]:
    """Rows to take at a time: what they need beside the logits stays in each core's cache."""
    step = max(1, _CACHED_COLUMNS * torch.get_num_threads() // num_columns)
    return [slice(start, start + step) for start in range(0, num_rows, step)]


def _group_masses(
    logits: Tensor, scale: float, cut: Tensor | None
) -> tuple[Tensor, Tensor, Tensor]:
    """Groups' masses [B, G], whole and kept, over e^largest; and largest [B, 1], the row's z."""
    num_rows, num_columns = logits.shape
    largest = logits.amax(1, keepdim=True).float().mul_(scale)
    largest.masked_fill_(largest == -torch.inf, 0.0)
    num_groups = triton.cdiv(num_columns, GROUP.value)
    mass = torch.empty(num_rows, num_groups)
    kept = mass if cut is None else torch.empty_like(mass)
    chunks = _row_chunks(num_rows, num_columns)
    buffer = torch.zeros(min(num_rows, chunks[0].stop if chunks else 0), num_groups * GROUP.value)
    for rows in chunks:
        padded = buffer[: len(mass[rows])]  # with nothing beyond the last column
        columns = padded[:, :num_columns]
        # e^(z - largest): scale, shift and dtype in one pass.
        torch.add(largest[rows].neg(), logits[rows], alpha=scale, out=columns).exp_()
        torch.sum(padded.unflatten(1, (-1, GROUP.value)), 2, out=mass[rows])
        if cut is not None:
            columns.masked_fill_(logits[rows].float() * scale < cut[rows], 0.0)
            torch.sum(padded.unflatten(1, (-1, GROUP.value)), 2, out=kept[rows])
    return mass, kept, largest


def _draw_group(mass: Tensor, key: SampleKey, first_column: int) -> tuple[Tensor, Tensor]:
    """The largest log(mass) + g of a row's groups [B, G], and which it is: [B, 1] both."""
    num_rows, num_groups = mass.shape
    best, group = mass.new_empty(num_rows, 1), torch.empty(num_rows, 1, dtype=torch.int64)
    for rows in _row_chunks(num_rows, num_groups * GROUP.value):
        some = SampleKey(key.seed, key.sample_index[rows], key.position[rows])
        # log(mass) - log(-log(1 - u)) is largest where log(1 - u) / mass is: a logarithm less.
        survival = group_log_survival(some, first_column // GROUP.value, num_groups)
        torch.max(survival.div_(mass[rows]), 1, keepdim=True, out=(best[rows], group[rows]))
    return best.neg_().log_().neg_(), group


def _draw_column(
    logits: Tensor,
    scale: float,
    cut: Tensor | None,
    key: SampleKey,
    group: Tensor,
    first_column: int,
) -> Tensor:
    """The column [B, 1] of its group that each row draws; the group's first if all are cut."""
    columns = group * GROUP.value + torch.arange(GROUP.value)
    z = logits.gather(1, columns.clamp(max=logits.shape[1] - 1)).float() * scale
    is_cut = columns >= logits.shape[1] if cut is None else (columns >= logits.shape[1]) | (z < cut)
    survival = column_log_survival(key, group + first_column // GROUP.value)
    perturbed = z - survival.neg_().log_()
    perturbed.masked_fill_(is_cut | perturbed.isnan(), -torch.inf)
    return columns.gather(1, perturbed.max(1, keepdim=True).indices)


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

    Columns: best perturbed value, scaled logit of the token, logsumexp (fp32 bits), the token as a
    global column. logits [B, V_shard] holds global columns first_column on; thresholds as
    `truncation_thresholds` gives them for the whole vocabulary. A shard of padding alone is fine.
    Raises ValueError for a shard that begins within a group.
    """
    num_columns = logits.shape[1]
    if first_column % GROUP.value or first_column + num_columns > MAX_COLUMNS:
        raise ValueError(
            f"a vocabulary shard of columns {first_column} to {first_column + num_columns} must "
            f"begin at a multiple of {GROUP.value} and end at {MAX_COLUMNS} or before"
        )
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
