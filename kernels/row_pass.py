"""Log-prob and gradient of a row in one program, where the loss is a known slope x log-prob.

    dz_i = slope ([i = y] - p_i) / temperature        p, y, z as in row_state.py

The two kernels of row_state.py and row_gradient.py read the logits from memory twice. Here a
program reads its row a second time right after the first, while the row is still in the cache of
the second level. An H100's 50 MB hold one fp32 row of GPT-2's vocabulary, 0.2 MB, for each of its
132 multiprocessors. So a program takes a whole one of them.
"""

import torch
import triton
import triton.language as tl
from torch import Tensor

from kernels.launch import config_for, uses_triton
from kernels.precision import triton_dtype
from kernels.row_blocks import row_blocks
from kernels.row_gradient import label_gradient, write_row_gradient
from kernels.row_state import (
    LOG2_E,
    LOWEST,
    RowSpec,
    exponentials,
    label_logits,
    lane_columns,
    logprobs_and_entropy,
    read_row,
    row_outputs,
)


@triton.jit
def _row_pass_kernel(
    logits,  # [T, V]
    labels,  # [T]
    slopes,  # 0-d
    logprobs,  # [T] out
    out,  # [T, V], may lie over the logits
    row_stride,
    column_stride,
    label_stride,
    out_row_stride,
    out_column_stride,
    num_columns,
    num_valid,
    inv_temperature,
    ignore_index,
    OVERWRITES: tl.constexpr,
    ACC: tl.constexpr,
    BLOCK: tl.constexpr,
    LANE: tl.constexpr,  # columns of a lane
    STAGES: tl.constexpr,  # blocks under way at a time
):
    row = tl.program_id(0).to(tl.int64)  # and strides as in row_state.py
    column_stride = tl.cast(column_stride, tl.int64)
    out_column_stride = tl.cast(out_column_stride, tl.int64)
    logits += row * row_stride
    label = tl.load(labels + row * label_stride).to(tl.int64)
    is_ignored = label == ignore_index
    owned = (label >= 0) & (label < num_valid)
    picked = tl.load(logits + label * column_stride, mask=owned, other=0.0).to(ACC)
    inv_temperature = tl.cast(inv_temperature, ACC)
    slope = tl.load(slopes).to(ACC) * inv_temperature
    end = tl.where(is_ignored, 0, num_valid)  # ignored rows are not read
    top, s, t = read_row(
        logits, column_stride, num_columns, end, inv_temperature * LOG2_E, False, ACC, BLOCK, LANE,
        STAGES,
    )  # fmt: skip
    m = tl.where(top == LOWEST, -float("inf"), top * inv_temperature)
    label_logit = tl.where(owned, picked * inv_temperature, -float("inf"))
    logprob, _ = row_outputs(m, s, t, label_logit, is_ignored)
    tl.store(logprobs + row, logprob)
    write_row_gradient(
        logits,
        out + row * out_row_stride,
        column_stride,
        out_column_stride,
        num_columns,
        end,
        tl.where(owned, label, -1).to(tl.int32),
        tl.where(is_ignored, 0.0, m),
        tl.log2(tl.where(is_ignored, 1.0, s)),
        0.0,
        slope,
        0.0,
        inv_temperature,
        False,
        OVERWRITES,
        ACC,
        BLOCK,
        STAGES,
    )


def row_pass(
    logits: Tensor, labels: Tensor, slope: Tensor, logprobs: Tensor, spec: RowSpec, *, out: Tensor
) -> None:
    """Write log p_y [T] and the gradient of the sum of slope x log p_y by logits [T, V] to `out`.

    slope: 0-d; the logits are of the whole vocabulary. `out` may lie over them as in row_gradient.
    """
    if not uses_triton(logits):
        _row_pass_reference(logits, labels, slope, logprobs, spec, out)
        return
    num_rows, num_columns = logits.shape
    config = config_for("row_pass", num_columns, logits.device)
    if num_rows > 0:
        with torch.cuda.device_of(logits):
            _row_pass_kernel[(num_rows,)](
                logits,
                labels,
                slope,
                logprobs,
                out,
                *logits.stride(),
                labels.stride(0),
                *out.stride(),
                num_columns,
                spec.num_valid_columns(num_columns),
                1.0 / spec.temperature,
                spec.ignore_index,
                OVERWRITES=out.data_ptr() == logits.data_ptr(),
                ACC=triton_dtype(logprobs.dtype),
                BLOCK=config.block,
                LANE=lane_columns(config.block, logits),
                STAGES=config.num_stages,
                num_warps=config.num_warps,
            )


def _row_pass_reference(
    logits: Tensor, labels: Tensor, slope: Tensor, logprobs: Tensor, spec: RowSpec, out: Tensor
) -> None:
    """`row_pass` in plain torch, which reads a block of rows once for both."""
    slopes = torch.where(labels == spec.ignore_index, 0.0, slope / spec.temperature)
    for rows in row_blocks(logits):
        label_logit = label_logits(logits[rows], labels[rows], spec)
        e, m, t = exponentials(logits[rows], spec)
        s = e.sum(1)
        state = torch.stack((m, s, t, label_logit), dim=-1)
        logprobs[rows], _ = logprobs_and_entropy(state, labels[rows], spec)
        gradient = label_gradient(e, labels[rows], s, slopes[rows], spec)
        gradient[labels[rows] == spec.ignore_index] = 0.0
        out[rows, : gradient.shape[1]] = gradient  # perhaps over the logits, read by now
        out[rows, gradient.shape[1] :] = 0.0
