"""Library only: KL(policy || reference) of every row, exact over the vocabulary, from two logits.

PPO's penalty is the estimate from the sampled tokens (kl_estimate.py), as in the paper. This is
kept for whoever distils a model or wants the penalty without the noise of the sample.

With p = softmax(z), q = softmax(z'), each with its own maximum m and sum s, and

    t = sum_i e^(z_i - m_p) [(z_i - m_p) - (z'_i - m_q)]

    KL = t / s_p - log s_p + log s_q
    d KL / d z_i = p_i ((log p_i - log q_i) - KL)        d KL / d z'_i = q_i - p_i

A row's state is (m_p, s_p, m_q, s_q, t). Parts of a row merge by

    S = sum w s        T = sum w_p (t + s_p [(m_p - M_p) - (m_q - M_q)])        w = e^(m - M)

The kernels keep one state a lane of 16 bytes and count in powers of two, as in row_state.py.
"""

from typing import Any

import torch
import triton
import triton.language as tl
from torch import Tensor
from torch.autograd.function import once_differentiable

from kernels.launch import config_for, uses_triton
from kernels.precision import accumulation_dtype, triton_dtype
from kernels.row_state import (
    LN_2,
    LOG2_E,
    LOWEST,
    NO_POWER,
    RowSpec,
    lane_columns,
)
from kernels.traced import traced


@triton.jit
def _add_block(
    x,  # [lanes, columns] logits
    y,  # [lanes, columns] ref_logits
    m_p,
    s_p,
    m_q,
    s_q,
    t,  # [lanes]
    to_powers,
):
    """Every lane's state with its columns of one more block. m_p, m_q are before temperature."""
    top_p = tl.maximum(m_p, tl.max(x, 1))
    top_q = tl.maximum(m_q, tl.max(y, 1))
    shift_p = (m_p - top_p) * to_powers
    shift_q = (m_q - top_q) * to_powers
    w_p = tl.exp2(shift_p)
    d_p = (x - top_p[:, None]) * to_powers
    d_q = (y - top_q[:, None]) * to_powers
    e_p = tl.exp2(d_p)
    t = tl.where(w_p > 0, w_p * (t + s_p * (shift_p - shift_q)), 0.0)
    t += tl.sum(tl.where(e_p > 0, e_p * (d_p - d_q), 0.0), 1)  # p = 0 adds nothing, whatever q is
    s_p = s_p * w_p + tl.sum(e_p, 1)
    s_q = s_q * tl.exp2(shift_q) + tl.sum(tl.exp2(d_q), 1)
    return top_p, s_p, top_q, s_q, t


@triton.jit
def _kl_state_kernel(
    logits,  # [T, V]
    ref_logits,  # [T, V]
    states,  # [T, 5] out
    row_stride,
    column_stride,
    ref_row_stride,
    ref_column_stride,
    num_columns,
    num_valid,
    inv_temperature,
    ACC: tl.constexpr,
    BLOCK: tl.constexpr,
    LANE: tl.constexpr,  # columns of a lane
    STAGES: tl.constexpr,  # blocks under way at a time
):
    row = tl.program_id(0).to(tl.int64)
    logits += row * row_stride
    ref_logits += row * ref_row_stride
    inv_temperature = tl.cast(inv_temperature, ACC)
    to_powers = inv_temperature * LOG2_E
    LANES: tl.constexpr = BLOCK // LANE
    offsets = tl.arange(0, LANES)[:, None] * LANE + tl.arange(0, LANE)[None, :]
    m_p = tl.full([LANES], LOWEST, ACC)
    m_q = tl.full([LANES], LOWEST, ACC)
    s_p = tl.zeros([LANES], ACC)
    s_q = tl.zeros([LANES], ACC)
    t = tl.zeros([LANES], ACC)
    whole = num_valid // BLOCK * BLOCK
    for start in tl.range(0, whole, BLOCK, num_stages=STAGES):
        columns = (start + offsets).to(tl.int64)
        x = tl.load(logits + columns * column_stride).to(ACC)
        y = tl.load(ref_logits + columns * ref_column_stride).to(ACC)
        m_p, s_p, m_q, s_q, t = _add_block(x, y, m_p, s_p, m_q, s_q, t, to_powers)
    if whole < num_valid:
        columns = (whole + offsets).to(tl.int64)
        within = columns < num_columns  # loads end with the row, as in row_state.py
        x = tl.load(logits + columns * column_stride, mask=within, other=0.0).to(ACC)
        y = tl.load(ref_logits + columns * ref_column_stride, mask=within, other=0.0).to(ACC)
        x = tl.where(columns < num_valid, x, -float("inf"))
        y = tl.where(columns < num_valid, y, -float("inf"))
        m_p, s_p, m_q, s_q, t = _add_block(x, y, m_p, s_p, m_q, s_q, t, to_powers)
    top_p = tl.max(m_p, 0)
    top_q = tl.max(m_q, 0)
    shift_p = (m_p - top_p) * to_powers
    shift_q = (m_q - top_q) * to_powers
    w_p = tl.exp2(shift_p)
    states += row * 5
    tl.store(states, tl.where(top_p == LOWEST, -float("inf"), top_p * inv_temperature))
    tl.store(states + 1, tl.sum(w_p * s_p, 0))
    tl.store(states + 2, tl.where(top_q == LOWEST, -float("inf"), top_q * inv_temperature))
    tl.store(states + 3, tl.sum(tl.exp2(shift_q) * s_q, 0))
    t = tl.where(w_p > 0, w_p * (t + s_p * (shift_p - shift_q)), 0.0)
    tl.store(states + 4, tl.sum(t, 0) * LN_2)


@triton.jit
def _logit_gradient(
    log2_p,
    log2_q,
    kl,
    grad,
    OF_REF: tl.constexpr,
):
    p = tl.exp2(log2_p)
    if OF_REF:
        return grad * (tl.exp2(log2_q) - p)
    return grad * p * ((tl.maximum(log2_p, NO_POWER) - tl.maximum(log2_q, NO_POWER)) * LN_2 - kl)


@triton.jit
def _kl_gradient_kernel(
    logits,  # [T, V]
    ref_logits,  # [T, V]
    states,  # [T, 5]
    grads,  # [T]
    out,  # [T, V], contiguous
    row_stride,
    column_stride,
    ref_row_stride,
    ref_column_stride,
    num_columns,
    num_valid,
    inv_temperature,
    OF_REF: tl.constexpr,  # gradient of ref_logits, else of logits
    ACC: tl.constexpr,
    BLOCK: tl.constexpr,
    STAGES: tl.constexpr,  # blocks under way at a time
):
    row = tl.program_id(0).to(tl.int64)
    logits += row * row_stride
    ref_logits += row * ref_row_stride
    inv_temperature = tl.cast(inv_temperature, ACC)
    m_p = tl.load(states + row * 5)
    s_p = tl.load(states + row * 5 + 1)
    m_q = tl.load(states + row * 5 + 2)
    log2_s_p = tl.log2(s_p)
    log2_s_q = tl.log2(tl.load(states + row * 5 + 3))
    kl = tl.load(states + row * 5 + 4) / s_p + (log2_s_q - log2_s_p) * LN_2
    grad = tl.load(grads + row).to(ACC) * inv_temperature
    offsets = tl.arange(0, BLOCK)
    whole = num_valid // BLOCK * BLOCK
    for start in tl.range(0, whole, BLOCK, num_stages=STAGES):
        columns = (start + offsets).to(tl.int64)
        x = tl.load(logits + columns * column_stride).to(ACC)
        y = tl.load(ref_logits + columns * ref_column_stride).to(ACC)
        log2_p = (x * inv_temperature - m_p) * LOG2_E - log2_s_p
        log2_q = (y * inv_temperature - m_q) * LOG2_E - log2_s_q
        dz = _logit_gradient(log2_p, log2_q, kl, grad, OF_REF)
        tl.store(out + row * num_columns + columns, dz)
    for start in range(whole, num_columns, BLOCK):
        columns = (start + offsets).to(tl.int64)
        within = columns < num_columns
        x = tl.load(logits + columns * column_stride, mask=within, other=0.0).to(ACC)
        y = tl.load(ref_logits + columns * ref_column_stride, mask=within, other=0.0).to(ACC)
        log2_p = (x * inv_temperature - m_p) * LOG2_E - log2_s_p
        log2_q = (y * inv_temperature - m_q) * LOG2_E - log2_s_q
        dz = _logit_gradient(log2_p, log2_q, kl, grad, OF_REF)
        dz = tl.where(columns < num_valid, dz, 0.0)  # padding: 0, also beside a NaN
        tl.store(out + row * num_columns + columns, dz, mask=within)


@traced("trident::kl_state")
def _kl_state(
    logits: Tensor,
    ref_logits: Tensor,
    num_valid_vocab: int,
    temperature: float,
) -> Tensor:
    spec = RowSpec(num_valid_vocab=num_valid_vocab, temperature=temperature)
    if not uses_triton(logits):
        return _kl_state_reference(logits, ref_logits, spec)
    num_rows, num_columns = logits.shape
    states = logits.new_empty(num_rows, 5, dtype=accumulation_dtype(logits.dtype))
    config = config_for("kl_state", num_columns, logits.device)
    if num_rows > 0:
        with torch.cuda.device_of(logits):
            _kl_state_kernel[(num_rows,)](
                logits,
                ref_logits,
                states,
                *logits.stride(),
                *ref_logits.stride(),
                num_columns,
                spec.num_valid_columns(num_columns),
                1.0 / temperature,
                ACC=triton_dtype(states.dtype),
                BLOCK=config.block,
                LANE=lane_columns(config.block, logits, ref_logits),
                STAGES=config.num_stages,
                num_warps=config.num_warps,
            )
    return states


@_kl_state.register_fake
def _(logits: Tensor, ref_logits: Tensor, *spec: object) -> Tensor:
    return logits.new_empty(logits.shape[0], 5, dtype=accumulation_dtype(logits.dtype))


@traced("trident::kl_gradient")
def _kl_gradient(
    logits: Tensor,
    ref_logits: Tensor,
    state: Tensor,
    grads: Tensor,
    num_valid_vocab: int,
    temperature: float,
    of_ref: bool,
) -> Tensor:
    spec = RowSpec(num_valid_vocab=num_valid_vocab, temperature=temperature)
    num_rows, num_columns = logits.shape
    out = (ref_logits if of_ref else logits).new_empty(num_rows, num_columns)
    if not uses_triton(logits):
        return out.copy_(
            _kl_gradient_reference(logits, ref_logits, state, grads, spec, of_ref=of_ref)
        )
    config = config_for("kl_gradient", num_columns, logits.device)
    if num_rows > 0:
        with torch.cuda.device_of(logits):
            _kl_gradient_kernel[(num_rows,)](
                logits,
                ref_logits,
                state.contiguous(),
                grads.contiguous(),
                out,
                *logits.stride(),
                *ref_logits.stride(),
                num_columns,
                spec.num_valid_columns(num_columns),
                1.0 / temperature,
                OF_REF=of_ref,
                ACC=triton_dtype(state.dtype),
                BLOCK=config.block,
                STAGES=config.num_stages,
                num_warps=config.num_warps,
            )
    return out


@_kl_gradient.register_fake
def _(logits: Tensor, ref_logits: Tensor, *rest: object) -> Tensor:
    of_ref = rest[-1]
    return (ref_logits if of_ref else logits).new_empty(logits.shape)


def _spec_arguments(spec: RowSpec) -> tuple[int, float]:
    return spec.num_valid_vocab, spec.temperature


class _FullKL(torch.autograd.Function):
    """Two sets of logits to KL [T]; keeps them and 20 bytes a row for backward."""

    @staticmethod
    def forward(
        ctx: Any,
        logits: Tensor,
        ref_logits: Tensor,
        spec: RowSpec,
    ) -> Tensor:
        state = _kl_state(logits, ref_logits, *_spec_arguments(spec))
        ctx.save_for_backward(logits, ref_logits, state)
        ctx.spec = spec
        _, s_p, _, s_q, t = state.unbind(-1)
        return t / s_p - s_p.log() + s_q.log()

    @staticmethod
    @once_differentiable
    def backward(ctx: Any, grads: Tensor) -> tuple[Tensor | None, ...]:
        tensors, spec = ctx.saved_tensors, _spec_arguments(ctx.spec)
        needs = ctx.needs_input_grad
        logits = _kl_gradient(*tensors, grads, *spec, False) if needs[0] else None
        ref_logits = _kl_gradient(*tensors, grads, *spec, True) if needs[1] else None
        return logits, ref_logits, None


def _kl_state_reference(logits: Tensor, ref_logits: Tensor, spec: RowSpec) -> Tensor:
    """State [T, 5] (m_p, s_p, m_q, s_q, t) in plain torch."""
    num_valid = spec.num_valid_columns(logits.shape[1])
    dtype = accumulation_dtype(logits.dtype)
    z, ref_z = (x[:, :num_valid].to(dtype) / spec.temperature for x in (logits, ref_logits))
    m_p, m_q = z.amax(1, keepdim=True), ref_z.amax(1, keepdim=True)
    e_p, e_q = (z - m_p).exp(), (ref_z - m_q).exp()
    t = torch.where(e_p > 0, e_p * ((z - m_p) - (ref_z - m_q)), 0.0).sum(1)
    return torch.stack((m_p[:, 0], e_p.sum(1), m_q[:, 0], e_q.sum(1), t), dim=-1)


def _kl_gradient_reference(
    logits: Tensor,
    ref_logits: Tensor,
    state: Tensor,
    grads: Tensor,
    spec: RowSpec,
    *,
    of_ref: bool,
) -> Tensor:
    """Gradient of the logits, or of ref_logits, in plain torch and the accumulation dtype."""
    m_p, s_p, m_q, s_q, t = (column.unsqueeze(1) for column in state.unbind(-1))
    z, ref_z = (x.to(state.dtype) / spec.temperature for x in (logits, ref_logits))
    log_p, log_q = (z - m_p) - s_p.log(), (ref_z - m_q) - s_q.log()
    p = log_p.exp()
    kl = t / s_p - s_p.log() + s_q.log()
    gradient = log_q.exp() - p if of_ref else torch.where(p > 0, p * (log_p - log_q - kl), 0.0 * p)
    gradient[:, spec.num_valid_columns(z.shape[1]) :] = 0.0
    return grads.unsqueeze(1) * gradient / spec.temperature


def full_kl(
    logits: Tensor,
    ref_logits: Tensor,
    *,
    temperature: float = 1.0,
    num_valid_vocab: int | None = None,
) -> Tensor:
    """KL(softmax(logits / temperature) || softmax(ref_logits / temperature)) [T] fp32, in nats.

    logits, ref_logits: [T, V]; columns from num_valid_vocab on are padding and take no part.
    Differentiable in both. Raises ValueError unless both are two-dimensional and alike.
    """
    if logits.dim() != 2 or logits.shape != ref_logits.shape:
        raise ValueError(
            f"logits and ref_logits must be [T, V] alike, got {tuple(logits.shape)} "
            f"and {tuple(ref_logits.shape)}"
        )
    spec = RowSpec(
        num_valid_vocab=logits.shape[1] if num_valid_vocab is None else num_valid_vocab,
        temperature=temperature,
    )
    return _FullKL.apply(logits, ref_logits, spec)
