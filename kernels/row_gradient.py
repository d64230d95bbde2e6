"""The gradient of a row of logits, from the row's merged state (row_state.py) and one more read.

    d log p_y / d z_i = [i = y] - p_i              d H / d z_i = -p_i (log p_i + H)

    p_i = e^(z_i - m) / s        z = logits / temperature

Summed over the upstream gradients g of log p_y and g_H of H, and divided by the temperature.
"""

import torch
import torch.nn.functional as F
import triton
import triton.language as tl
from torch import Tensor

from kernels.launch import config_for, uses_triton
from kernels.precision import triton_dtype
from kernels.row_blocks import row_blocks, scaled
from kernels.row_state import (
    LN_2,
    LOG2_E,
    NO_POWER,
    RowSpec,
)
from kernels.traced import traced


@triton.jit
def _logit_gradient(
    x,  # logits of a block
    is_label,
    m,
    log2_s,
    entropy,
    grad_logprob,
    grad_entropy,
    inv_temperature,
    HAS_ENTROPY_GRAD: tl.constexpr,
):
    """[i = y] g - p_i (g + g_H (log p_i + H)), with g and g_H divided by temperature already."""
    log2_p = (x * inv_temperature - m) * LOG2_E - log2_s
    slope = grad_logprob
    if HAS_ENTROPY_GRAD:
        slope += grad_entropy * (tl.maximum(log2_p, NO_POWER) * LN_2 + entropy)
    return tl.where(is_label, grad_logprob, 0.0) - tl.exp2(log2_p) * slope


@triton.jit
def write_row_gradient(
    logits,  # [V_local], a row
    out,  # [V_local], may lie over it
    column_stride,
    out_column_stride,
    num_columns,
    end,  # of the columns that count; 0 in an ignored row
    label,  # among these columns, int32; none where another shard has it
    m,
    log2_s,
    entropy,
    grad_logprob,
    grad_entropy,
    inv_temperature,
    HAS_ENTROPY_GRAD: tl.constexpr,
    OVERWRITES: tl.constexpr,
    ACC: tl.constexpr,
    BLOCK: tl.constexpr,
    STAGES: tl.constexpr,  # blocks under way at a time
):
    """Write the gradient [V_local] of a row of logits, 0 in its padding and in an ignored row.

    m, log2_s and entropy are those of the row's merged state (row_state.py: m after temperature,
    log2 of s, H in nats); the upstream gradients are divided by temperature already. The formula is
    at the top of this file.
    """
    # Loads end with the row, as in row_state.py; ignored rows are not read.
    num_read = tl.where(end > 0, num_columns, 0)
    whole = end // BLOCK * BLOCK
    offsets = tl.arange(0, BLOCK)
    for start in tl.range(0, whole, BLOCK, num_stages=STAGES):
        columns = start + offsets
        x = tl.load(logits + columns * column_stride).to(ACC)
        if OVERWRITES:
            # A narrower dz lies over logits that other warps of this program have yet to read.
            tl.debug_barrier()
        dz = _logit_gradient(
            x,
            columns == label,
            m,
            log2_s,
            entropy,
            grad_logprob,
            grad_entropy,
            inv_temperature,
            HAS_ENTROPY_GRAD,
        )
        tl.store(out + columns * out_column_stride, dz)
    for start in range(whole, num_columns, BLOCK):
        columns = start + offsets
        x = tl.load(logits + columns * column_stride, mask=columns < num_read, other=0.0).to(ACC)
        if OVERWRITES:
            tl.debug_barrier()
        dz = _logit_gradient(
            x,
            columns == label,
            m,
            log2_s,
            entropy,
            grad_logprob,
            grad_entropy,
            inv_temperature,
            HAS_ENTROPY_GRAD,
        )
        dz = tl.where(columns < end, dz, 0.0)  # padding and ignored rows: 0, also beside a NaN
        tl.store(out + columns * out_column_stride, dz, mask=columns < num_columns)


@triton.jit
def _row_gradient_kernel(
    logits,  # [T, V_local]
    labels,  # [T]
    states,  # [T, 4] merged
    grad_logprobs,  # [T], read with HAS_LOGPROB_GRAD
    grad_entropies,  # [T], read with HAS_ENTROPY_GRAD
    out,  # [T, V_local], may lie over the logits
    row_stride,
    column_stride,
    label_stride,
    out_row_stride,
    out_column_stride,
    grad_logprob_stride,  # 0 for one number that all rows share
    grad_entropy_stride,
    num_columns,
    num_valid,
    first_column,
    inv_temperature,
    ignore_index,
    HAS_LOGPROB_GRAD: tl.constexpr,
    HAS_ENTROPY_GRAD: tl.constexpr,
    OVERWRITES: tl.constexpr,
    ACC: tl.constexpr,
    BLOCK: tl.constexpr,
    STAGES: tl.constexpr,  # blocks under way at a time
):
    row = tl.program_id(0).to(tl.int64)  # and strides as in row_state.py
    column_stride = tl.cast(column_stride, tl.int64)
    out_column_stride = tl.cast(out_column_stride, tl.int64)
    logits += row * row_stride
    out += row * out_row_stride
    label = tl.load(labels + row * label_stride).to(tl.int64)
    is_ignored = label == ignore_index  # such a row's state is empty: m = -inf, s = 0
    m = tl.where(is_ignored, 0.0, tl.load(states + row * 4))
    s = tl.where(is_ignored, 1.0, tl.load(states + row * 4 + 1))
    log2_s = tl.log2(s)
    inv_temperature = tl.cast(inv_temperature, ACC)
    grad_logprob = tl.zeros([], ACC)
    grad_entropy = tl.zeros([], ACC)
    if HAS_LOGPROB_GRAD:
        grad_logprob = tl.load(grad_logprobs + row * grad_logprob_stride).to(ACC) * inv_temperature
    if HAS_ENTROPY_GRAD:
        grad_entropy = tl.load(grad_entropies + row * grad_entropy_stride).to(ACC) * inv_temperature
    entropy = log2_s * LN_2 - tl.load(states + row * 4 + 2) / s
    local = label - first_column
    owned = (local >= 0) & (local < num_valid)
    write_row_gradient(
        logits,
        out,
        column_stride,
        out_column_stride,
        num_columns,
        tl.where(is_ignored, 0, num_valid),
        tl.where(owned, local, -1).to(tl.int32),
        m,
        log2_s,
        entropy,
        grad_logprob,
        grad_entropy,
        inv_temperature,
        HAS_ENTROPY_GRAD,
        OVERWRITES,
        ACC,
        BLOCK,
        STAGES,
    )


@traced("trident::row_gradient_into", writes=("out",))
def _row_gradient_into(
    out: Tensor,
    logits: Tensor,
    labels: Tensor,
    state: Tensor,
    grad_logprobs: Tensor | None,
    grad_entropies: Tensor | None,
    num_valid_vocab: int,
    first_column: int,
    temperature: float,
    ignore_index: int,
) -> None:
    spec = RowSpec(
        num_valid_vocab=num_valid_vocab,
        first_column=first_column,
        temperature=temperature,
        ignore_index=ignore_index,
    )
    if not uses_triton(logits):
        grads = grad_logprobs, grad_entropies
        _write_row_gradient_reference(out, logits, labels, state, grads, spec)
        return
    num_rows, num_columns = logits.shape
    config = config_for("row_gradient", num_columns, logits.device)
    if num_rows > 0:
        with torch.cuda.device_of(logits):
            _row_gradient_kernel[(num_rows,)](
                logits,
                labels,
                state.contiguous(),
                grad_logprobs,
                grad_entropies,
                out,
                *logits.stride(),
                labels.stride(0),
                *out.stride(),
                0 if grad_logprobs is None else grad_logprobs.stride(0),
                0 if grad_entropies is None else grad_entropies.stride(0),
                num_columns,
                spec.num_valid_columns(num_columns),
                first_column,
                1.0 / temperature,
                ignore_index,
                HAS_LOGPROB_GRAD=grad_logprobs is not None,
                HAS_ENTROPY_GRAD=grad_entropies is not None,
                OVERWRITES=out.data_ptr() == logits.data_ptr(),
                ACC=triton_dtype(state.dtype),
                BLOCK=config.block,
                STAGES=config.num_stages,
                num_warps=config.num_warps,
            )


def row_gradient(
    logits: Tensor,
    labels: Tensor,
    state: Tensor,
    grads: tuple[Tensor | None, ...],
    spec: RowSpec,
    *,
    out: Tensor | None = None,
) -> Tensor:
    """Gradient [T, V_local] of the logits, from the merged state [T, 4].

    grads: those of the log-prob and of the entropy, [T] each or None. out: where to write it; may
    share the logits' storage if it begins where they begin and its rows where their rows do.
    """
    out = torch.empty_like(logits) if out is None else out
    _row_gradient_into(
        out,
        logits,
        labels,
        state,
        *grads,
        spec.num_valid_vocab,
        spec.first_column,
        spec.temperature,
        spec.ignore_index,
    )
    return out


def row_gradient_reference(
    logits: Tensor,
    labels: Tensor,
    state: Tensor,
    grads: tuple[Tensor | None, ...],
    spec: RowSpec,
) -> Tensor:
    """`row_gradient` in plain torch, in the accumulation dtype."""
    num_valid = spec.num_valid_columns(logits.shape[1])
    ignored = labels == spec.ignore_index
    grads = tuple(
        None if g is None else torch.where(ignored, 0.0, g) / spec.temperature for g in grads
    )
    m, s, t, _ = state.unbind(-1)
    shifted = scaled(logits[:, :num_valid], spec.temperature) - m.unsqueeze(1)
    gradient = torch.zeros((), dtype=state.dtype)
    if grads[1] is not None:
        log_p = shifted - s.log().unsqueeze(1)
        p, entropy = log_p.exp(), (s.log() - t / s).unsqueeze(1)
        gradient = -grads[1].unsqueeze(1) * torch.where(p > 0, p * (log_p + entropy), 0.0 * p)
    if grads[0] is not None:
        of_label = label_gradient(shifted.exp_(), labels, s, grads[0], spec)
        gradient = of_label if grads[1] is None else gradient.add_(of_label)
    if ignored.any():
        gradient[ignored] = 0.0  # whatever their state is
    return (
        F.pad(gradient, (0, logits.shape[1] - num_valid))
        if num_valid < logits.shape[1]
        else gradient
    )


def label_gradient(e: Tensor, labels: Tensor, s: Tensor, slopes: Tensor, spec: RowSpec) -> Tensor:
    """Turn e^(z - m) [T, valid columns] into slopes x d log p_y / d z, in its memory, in plain
    torch; s, slopes: [T]."""
    e.mul_((-slopes / s).unsqueeze(1))
    local = labels.long() - spec.first_column
    owned = (local >= 0) & (local < e.shape[1])
    if e.shape[1] > 0:
        at_label = torch.where(owned, slopes, 0.0).to(e.dtype)
        e.scatter_add_(1, local.clamp(0, e.shape[1] - 1).unsqueeze(1), at_label.unsqueeze(1))
    return e


def _write_row_gradient_reference(
    out: Tensor,
    logits: Tensor,
    labels: Tensor,
    state: Tensor,
    grads: tuple[Tensor | None, ...],
    spec: RowSpec,
) -> None:
    """Write the reference's gradient by blocks of rows, each of which lies over its own logits."""
    for rows in row_blocks(logits):
        some = tuple(None if g is None else g[rows] for g in grads)
        out[rows] = row_gradient_reference(logits[rows], labels[rows], state[rows], some, spec)
