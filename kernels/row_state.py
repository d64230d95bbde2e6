"""The softmax of a row of logits in four numbers, for one vocabulary shard and merged over shards.

With z = logits / temperature over the valid columns of a row and label y:

    m = max_i z_i        s = sum_i e^(z_i - m)        t = sum_i e^(z_i - m) (z_i - m)

    log p_y = (z_y - m) - log s            H = -sum_i p_i log p_i = log s - t / s

The four numbers (m, s, t, z_y) are the row's state. Shards of a vocabulary exchange nothing else:
with M = max over shards of m and w = e^(m - M),

    S = sum w s      T = sum w (t + s (m - M))      Z_y = sum z_y  (0 where another shard owns y)

H is formed from shifted logits because log sum e^z - sum p z loses eps * |z| when the logits are
large. A program of the kernel reads one row in blocks of [lanes, 16 bytes]: a thread has a whole
lane, so the maximum of a lane costs no exchange and is applied once to the columns of 16 bytes.
Every lane keeps its own (m, s, t), merged at the end of the row, and counts in powers of two:
e^a = 2^(a log2 e).

Where the row is the whole vocabulary, the same program writes its log p_y and H; the states of
shards are merged in row_merge.py.
"""

from dataclasses import dataclass
from typing import NamedTuple

import torch
import triton
import triton.language as tl
from torch import Tensor

from kernels.launch import config_for, uses_triton
from kernels.precision import accumulation_dtype, triton_dtype
from kernels.row_blocks import row_blocks, scaled
from kernels.traced import traced

IGNORE_INDEX = -100
LOG2_E = tl.constexpr(1.4426950408889634)
LN_2 = tl.constexpr(0.6931471805599453)
LOWEST = tl.constexpr(-1e30)
"""Stands for -inf in a running maximum, where -inf - -inf would be NaN; logits lie above it."""
NO_POWER = tl.constexpr(-1100.0)
"""2^x is 0 from here down in fp32 and fp64: bounds an exponent so that 0 * exponent stays 0."""


@dataclass(frozen=True, kw_only=True)
class RowSpec:
    """Which columns a row's softmax runs over, and at which temperature."""

    num_valid_vocab: int
    """Columns of the whole vocabulary that are real; those from here on are padding."""
    first_column: int = 0
    """Number of the shard's first column within the whole vocabulary."""
    temperature: float = 1.0
    """Divides the logits."""
    ignore_index: int = IGNORE_INDEX
    """Rows with this label give log-prob 0, entropy 0 and gradient 0."""
    with_entropy: bool = True
    """Whether H, and the state's t for it, is wanted; the kernel leaves t at 0 otherwise."""

    def __post_init__(self) -> None:
        if not self.temperature > 0:
            raise ValueError(f"temperature {self.temperature} must be positive")

    def num_valid_columns(self, num_columns: int) -> int:
        """How many of a shard's leading columns are real; 0 for a shard of padding alone."""
        return max(0, min(num_columns, self.num_valid_vocab - self.first_column))


class RowResults(NamedTuple):
    """What is known of T rows over the whole vocabulary."""

    state: Tensor
    """[T, 4] (m, s, t, z_y)."""
    logprobs: Tensor
    """[T] log p_y, 0 in ignored rows."""
    entropies: Tensor | None
    """[T] H, 0 in ignored rows; None where the spec does not want it."""

    def part(self, rows: slice) -> "RowResults":
        """Views of some of the rows."""
        entropies = None if self.entropies is None else self.entropies[rows]
        return RowResults(self.state[rows], self.logprobs[rows], entropies)


def empty_results(num_rows: int, like: Tensor, with_entropy: bool) -> RowResults:
    """Uninitialised results of num_rows rows in the accumulation dtype, on the device of `like`."""
    dtype = accumulation_dtype(like.dtype)
    return RowResults(
        like.new_empty((num_rows, 4), dtype=dtype),
        like.new_empty(num_rows, dtype=dtype),
        like.new_empty(num_rows, dtype=dtype) if with_entropy else None,
    )


@triton.jit
def row_outputs(m, s, t, label_logit, is_ignored):
    """(log p_y, H) of merged states."""
    s = tl.where(is_ignored, 1.0, s)
    log_s = tl.log(s)
    logprob = tl.where(is_ignored, 0.0, (label_logit - m) - log_s)
    return logprob, tl.where(is_ignored, 0.0, log_s - t / s)


@triton.jit
def _add_block(
    x,  # [lanes, columns] logits
    m,
    s,
    t,  # [lanes]
    to_powers,
    WITH_ENTROPY: tl.constexpr,
):
    """Every lane's (m, s, t) with its columns of one more block. m is before temperature."""
    top = tl.maximum(m, tl.max(x, 1))
    shift = (m - top) * to_powers
    w = tl.exp2(shift)
    difference = (x - top[:, None]) * to_powers
    e = tl.exp2(difference)
    if WITH_ENTROPY:
        t = w * (t + s * shift) + tl.sum(e * tl.maximum(difference, NO_POWER), 1)
    return top, s * w + tl.sum(e, 1), t


@triton.jit
def read_row(
    logits,  # [V_local], a row
    column_stride,
    num_columns,
    end,  # of the columns that count
    to_powers,
    WITH_ENTROPY: tl.constexpr,
    ACC: tl.constexpr,
    BLOCK: tl.constexpr,
    LANE: tl.constexpr,  # columns of a lane
    STAGES: tl.constexpr,  # blocks under way at a time
):
    """(m before temperature, s, t) of a row; m = LOWEST and s = t = 0 where no column counts."""
    LANES: tl.constexpr = BLOCK // LANE
    offsets = tl.arange(0, LANES)[:, None] * LANE + tl.arange(0, LANE)[None, :]
    m = tl.full([LANES], LOWEST, ACC)
    s = tl.zeros([LANES], ACC)
    t = tl.zeros([LANES], ACC)
    whole = end // BLOCK * BLOCK
    for start in tl.range(0, whole, BLOCK, num_stages=STAGES):
        x = tl.load(logits + (start + offsets) * column_stride)
        m, s, t = _add_block(x.to(ACC), m, s, t, to_powers, WITH_ENTROPY)
    if whole < end:
        # Loads end with the row, whose length is a multiple of 16 bytes where that of the valid
        # columns need not be: a mask in the middle of 16 bytes would cut them into single columns.
        columns = whole + offsets
        x = tl.load(logits + columns * column_stride, mask=columns < num_columns, other=0.0)
        x = tl.where(columns < end, x.to(ACC), -float("inf"))
        m, s, t = _add_block(x, m, s, t, to_powers, WITH_ENTROPY)
    top = tl.max(m, 0)
    shift = (m - top) * to_powers
    w = tl.exp2(shift)
    return top, tl.sum(w * s, 0), tl.sum(w * (t + s * shift), 0) * LN_2


@triton.jit
def _row_state_kernel(
    logits,  # [T, V_local]
    labels,  # [T]
    states,  # [T, 4] out
    logprobs,  # [T] out; None for a shard, as are entropies
    entropies,  # [T] out; None without entropy
    row_stride,
    column_stride,
    label_stride,
    num_columns,
    num_valid,  # valid columns of this shard
    first_column,
    num_valid_vocab,
    inv_temperature,
    ignore_index,
    WITH_ENTROPY: tl.constexpr,
    ACC: tl.constexpr,
    BLOCK: tl.constexpr,
    LANE: tl.constexpr,  # columns of a lane
    STAGES: tl.constexpr,  # blocks under way at a time
):
    # row * row_stride passes 2^31, and so does column * column_stride where columns are strided.
    row = tl.program_id(0).to(tl.int64)
    column_stride = tl.cast(column_stride, tl.int64)
    logits += row * row_stride
    label = tl.load(labels + row * label_stride).to(tl.int64)
    # A label that no shard owns has probability 0; one of another shard's adds 0 to the sum.
    local = label - first_column
    owned = (local >= 0) & (local < num_valid)
    nowhere = (label < 0) | (label >= num_valid_vocab)
    picked = tl.load(logits + local * column_stride, mask=owned, other=0.0).to(ACC)
    inv_temperature = tl.cast(inv_temperature, ACC)
    top, row_s, row_t = read_row(
        logits,
        column_stride,
        num_columns,
        tl.where(label == ignore_index, 0, num_valid),  # ignored rows are not read
        inv_temperature * LOG2_E,
        WITH_ENTROPY,
        ACC,
        BLOCK,
        LANE,
        STAGES,
    )
    row_m = tl.where(top == LOWEST, -float("inf"), top * inv_temperature)
    label_logit = tl.where(nowhere, -float("inf"), picked * inv_temperature)
    states += row * 4
    tl.store(states, row_m)
    tl.store(states + 1, row_s)
    tl.store(states + 2, row_t)
    tl.store(states + 3, label_logit)
    if logprobs is not None:
        logprob, entropy = row_outputs(row_m, row_s, row_t, label_logit, label == ignore_index)
        tl.store(logprobs + row, logprob)
        if entropies is not None:
            tl.store(entropies + row, entropy)


def lane_columns(block: int, *matrices: Tensor) -> int:
    """Columns of a thread's load of 16 bytes; 1 where rows do not lie in whole 16 bytes."""
    size = 16 // matrices[0].element_size()
    for matrix in matrices:
        row, column = matrix.stride()
        if column != 1 or row % size or matrix.shape[1] % size or matrix.data_ptr() % 16:
            return 1
    return min(block, size)


def _launch(
    logits: Tensor,
    labels: Tensor,
    state: Tensor,
    outputs: tuple[Tensor | None, Tensor | None],
    spec: RowSpec,
) -> None:
    """Write the state [T, 4] and the outputs (log-probs, entropies) [T] that are not None."""
    num_rows, num_columns = logits.shape
    config = config_for("row_state", num_columns, logits.device)
    if num_rows > 0:
        with torch.cuda.device_of(logits):
            _row_state_kernel[(num_rows,)](
                logits,
                labels,
                state,
                *outputs,
                *logits.stride(),
                labels.stride(0),
                num_columns,
                spec.num_valid_columns(num_columns),
                spec.first_column,
                spec.num_valid_vocab,
                1.0 / spec.temperature,
                spec.ignore_index,
                WITH_ENTROPY=spec.with_entropy,
                ACC=triton_dtype(state.dtype),
                BLOCK=config.block,
                LANE=lane_columns(config.block, logits),
                STAGES=config.num_stages,
                num_warps=config.num_warps,
            )


@traced("trident::row_state")
def _row_state(
    logits: Tensor,
    labels: Tensor,
    num_valid_vocab: int,
    first_column: int,
    temperature: float,
    ignore_index: int,
    with_entropy: bool,
) -> Tensor:
    spec = RowSpec(
        num_valid_vocab=num_valid_vocab,
        first_column=first_column,
        temperature=temperature,
        ignore_index=ignore_index,
        with_entropy=with_entropy,
    )
    if not uses_triton(logits):
        return _row_state_reference(logits, labels, spec)
    state = logits.new_empty((len(logits), 4), dtype=accumulation_dtype(logits.dtype))
    _launch(logits, labels, state, (None, None), spec)
    return state


@_row_state.register_fake
def _(logits: Tensor, labels: Tensor, *spec: object) -> Tensor:
    return logits.new_empty((logits.shape[0], 4), dtype=accumulation_dtype(logits.dtype))


def row_state(logits: Tensor, labels: Tensor, spec: RowSpec) -> Tensor:
    """State [T, 4] (m, s, t, z_y) fp32 of logits [T, V_local]; m = -inf without a valid column."""
    return _row_state(
        logits,
        labels,
        spec.num_valid_vocab,
        spec.first_column,
        spec.temperature,
        spec.ignore_index,
        spec.with_entropy,
    )


@traced("trident::row_results", writes=("state", "logprobs", "entropies"))
def _row_results(
    logits: Tensor,
    labels: Tensor,
    state: Tensor,
    logprobs: Tensor,
    entropies: Tensor | None,
    num_valid_vocab: int,
    temperature: float,
    ignore_index: int,
) -> None:
    spec = RowSpec(
        num_valid_vocab=num_valid_vocab,
        temperature=temperature,
        ignore_index=ignore_index,
        with_entropy=entropies is not None,
    )
    if uses_triton(logits):
        _launch(logits, labels, state, (logprobs, entropies), spec)
        return
    state.copy_(_row_state_reference(logits, labels, spec))
    logprob, entropy = logprobs_and_entropy(state, labels, spec)
    logprobs.copy_(logprob)
    if entropies is not None and entropy is not None:
        entropies.copy_(entropy)


def write_row_results(results: RowResults, logits: Tensor, labels: Tensor, spec: RowSpec) -> None:
    """Write the results of logits [T, V], the whole vocabulary."""
    _row_results(
        logits, labels, *results, spec.num_valid_vocab, spec.temperature, spec.ignore_index
    )


def logprobs_and_entropy(
    state: Tensor, labels: Tensor, spec: RowSpec
) -> tuple[Tensor, Tensor | None]:
    """log p_y [T] and, if the spec has it, H [T] of a merged state [T, 4], in plain torch."""
    m, s, t, label_logit = state.unbind(-1)
    ignored = labels == spec.ignore_index
    log_s = s.log()
    logprob = torch.where(ignored, 0.0, (label_logit - m) - log_s)
    if not spec.with_entropy:
        return logprob, None
    return logprob, torch.where(ignored, 0.0, log_s - t / s)


def label_logits(logits: Tensor, labels: Tensor, spec: RowSpec) -> Tensor:
    """[T] z_y in plain torch: 0 where another shard has the label, -inf where none has it."""
    num_valid = spec.num_valid_columns(logits.shape[1])
    local = labels.long() - spec.first_column
    owned = (local >= 0) & (local < num_valid)
    # A label no shard owns (padding, negative) has probability 0; one of another shard adds 0.
    nowhere = (labels < 0) | (labels >= spec.num_valid_vocab)
    elsewhere = torch.where(nowhere, -torch.inf, 0.0).to(accumulation_dtype(logits.dtype))
    if num_valid == 0:
        return elsewhere
    picked = logits.gather(1, local.clamp(0, num_valid - 1).unsqueeze(1)).squeeze(1)
    return torch.where(owned, scaled(picked, spec.temperature), elsewhere)


def exponentials(logits: Tensor, spec: RowSpec) -> tuple[Tensor, Tensor, Tensor]:
    """(e^(z - m) [T, valid columns] in memory of its own, m [T], t [T]) of some rows, in plain
    torch; t is 0 where the spec wants no entropy."""
    z = scaled(logits[:, : spec.num_valid_columns(logits.shape[1])], spec.temperature)
    m = z.amax(1)
    shifted = z - torch.where(m == -torch.inf, 0.0, m).unsqueeze(1)
    if not spec.with_entropy:
        return shifted.exp_(), m, torch.zeros_like(m)
    e = shifted.exp()
    return e, m, torch.where(e > 0, e * shifted, 0.0).sum(1)  # 0 * -inf is 0 here


def _row_state_reference(logits: Tensor, labels: Tensor, spec: RowSpec) -> Tensor:
    """`row_state` in plain torch."""
    state = logits.new_zeros((len(logits), 4), dtype=accumulation_dtype(logits.dtype))
    state[:, 3] = label_logits(logits, labels, spec)
    if spec.num_valid_columns(logits.shape[1]) == 0:
        state[:, 0] = -torch.inf
        return state
    for rows in row_blocks(logits):
        e, m, t = exponentials(logits[rows], spec)
        state[rows, 0], state[rows, 1], state[rows, 2] = m, e.sum(1), t
    return state
