"""The matrix products of the LM head, chunk by chunk of the rows: logits, and both gradients.

A chunk's fp32 logits lie in a workspace that all chunks share, and dz, the logits' gradient, over
them. Sums over rows are in fp32, and where a buffer is given, in it.
"""

from collections.abc import Callable, Iterator
from dataclasses import dataclass

import torch
from torch import Tensor

from kernels.joins import ONE_SHARD, Joins
from kernels.precision import accumulation_dtype
from kernels.row_gradient import row_gradient
from kernels.row_state import RowSpec
from kernels.workspace import logit_workspace


@dataclass(frozen=True, kw_only=True)
class LinearSpec:
    """How hidden states and weight become log-probs: all but the differentiated tensors."""

    rows: RowSpec
    joins: Joins = ONE_SHARD
    workspace_bytes: int | None = None
    """Bound of the memory of a chunk of logits; None for the device's own."""
    row_index: Tensor | None = None
    """Rows to compute [R] int64, of the gathered hidden states; None for all of them."""
    main_grad: Tensor | None = None
    """Buffer [V, H] the weight's gradient is added to; None to return it to autograd."""
    returns_zero_weight_grad: bool = False
    """With main_grad: give autograd zeros for the weight, for hooks that want a gradient."""


def matmul(a: Tensor, b: Tensor, out: Tensor) -> Tensor:
    """out = a @ b, summed in out's precision or better, without rounding in between."""
    if a.dtype == out.dtype:
        return torch.mm(a, b, out=out)
    if a.is_cuda:
        return torch.mm(a, b, out_dtype=out.dtype, out=out)
    return torch.mm(a.to(out.dtype), b.to(out.dtype), out=out)


def add_matmul(total: Tensor, a: Tensor, b: Tensor) -> None:
    """total += a @ b, in total's precision."""
    if a.dtype == total.dtype:
        total.addmm_(a, b)
    elif a.is_cuda:
        torch.addmm(total, a, b, out_dtype=total.dtype, out=total)
    else:
        total.addmm_(a.to(total.dtype), b.to(total.dtype))


class Chunks:
    """The rows of one call, cut into chunks that share one workspace of fp32 logits."""

    def __init__(self, hidden: Tensor, weight: Tensor, labels: Tensor, spec: LinearSpec) -> None:
        self.hidden, self.weight, self.spec = hidden, weight, spec
        self.labels = self.picked(labels)  # of the rows to compute, as are the chunks
        self.num_rows = len(self.labels)
        dtype = accumulation_dtype(weight.dtype)
        self.workspace = logit_workspace(self.num_rows, weight, dtype, spec.workspace_bytes)
        self.size = len(self.workspace)

    def __iter__(self) -> Iterator[tuple[slice, Tensor]]:
        """Yield each chunk and its hidden states [n, H]."""
        index = self.spec.row_index
        for start in range(0, self.num_rows, max(1, self.size)):
            chunk = slice(start, min(start + self.size, self.num_rows))
            yield (
                chunk,
                self.hidden[chunk] if index is None else self.hidden.index_select(0, index[chunk]),
            )

    def picked(self, tensor: Tensor) -> Tensor:
        """The rows to compute of a tensor [T, ...]."""
        index = self.spec.row_index
        return tensor if index is None else tensor.index_select(0, index)

    def logits(self, hidden: Tensor) -> Tensor:
        """The logits [n, V_local] of a chunk's hidden states, in the workspace."""
        return matmul(hidden, self.weight.t(), self.workspace[: len(hidden)])

    def memory_of_dz(self, logits: Tensor) -> Tensor:
        """Room for dz [n, V_local] in the weight's dtype over the logits: a row of it takes the
        front part of the bytes of its row of them."""
        return logits.view(self.weight.dtype)[:, : logits.shape[1]]

    def logit_gradient(
        self, logits: Tensor, chunk: slice, state: Tensor, grads: tuple[Tensor | None, ...]
    ) -> Tensor:
        """dz [n, V_local] in the weight's dtype, over the memory of the chunk's logits."""
        out = self.memory_of_dz(logits)
        return row_gradient(logits, self.labels[chunk], state, grads, self.spec.rows, out=out)

    def write_hidden_gradient(self, total: Tensor, dz: Tensor, chunk: slice) -> None:
        """Write this shard's part of the chunk's hidden gradient, rounded once, into [T, H]."""
        index = self.spec.row_index
        if index is None:
            torch.mm(dz, self.weight, out=total[chunk])
        else:
            total.index_copy_(0, index[chunk], dz @ self.weight)


class Gradients:
    """The gradients of hidden and weight while chunks add to them; None for one not needed."""

    def __init__(self, chunks: Chunks, *, total: Tensor | None, needs: tuple[bool, bool]) -> None:
        self.chunks = chunks
        self.hidden: Tensor | None = None
        if needs[0]:
            every_row_is_written = chunks.spec.row_index is None
            new = chunks.hidden.new_empty if every_row_is_written else chunks.hidden.new_zeros
            self.hidden = new(chunks.hidden.shape)
        self.needs_weight = needs[1]
        fits = total is not None and total.dtype == chunks.workspace.dtype
        self.weight = total if fits and self.needs_weight else None
        self.wait: Callable[[], Tensor | None] | None = None

    def add(self, dz: Tensor, chunk: slice, hidden: Tensor) -> None:
        """Add a chunk; with the last one the hidden gradient's reduction runs under dW."""
        if self.hidden is not None:
            self.chunks.write_hidden_gradient(self.hidden, dz, chunk)
            if chunk.stop == self.chunks.num_rows:
                self.wait = self.chunks.spec.joins.start_reduction(self.hidden)
        if self.weight is not None:
            add_matmul(self.weight, dz.t(), hidden)
        elif self.needs_weight:  # the first chunk's product needs no zeros to be added to
            dtype = self.chunks.workspace.dtype
            self.weight = matmul(
                dz.t(), hidden, hidden.new_empty(self.chunks.weight.shape, dtype=dtype)
            )

    def hidden_result(self) -> Tensor | None:
        """The gradient of this rank's hidden states, summed over shards."""
        if self.hidden is None:
            return None
        if self.wait is None:  # no rows, but the other shards are waiting
            self.wait = self.chunks.spec.joins.start_reduction(self.hidden)
        return self.wait()

    def weight_result(self) -> Tensor | None:
        """The weight's gradient [V_local, H] in the precision of the sums."""
        if self.weight is None and self.needs_weight:  # no rows
            self.weight = torch.zeros_like(self.chunks.weight, dtype=self.chunks.workspace.dtype)
        return self.weight


def deliver(
    total: Tensor | None, weight: Tensor, spec: LinearSpec, scale: Tensor | None = None
) -> Tensor | None:
    """What autograd gets for the weight, once main_grad, if there is one, has the gradient."""
    if total is None:
        return None
    if spec.main_grad is None:
        if scale is None:
            return total.to(weight.dtype)
        return torch.mul(total, scale, out=torch.empty_like(weight))  # rounded as it is written
    if scale is not None:
        spec.main_grad.addcmul_(total, scale)
    elif total is not spec.main_grad:
        spec.main_grad.add_(total)
    return torch.zeros_like(weight) if spec.returns_zero_weight_grad else None
