"""Log-probabilities from hidden states and the LM head, without ever holding the logits.

    z = hidden W^T / temperature        log p_y and H as in logprobs.py

Rows go through in chunks whose fp32 logits fit a workspace: a matrix product, then the row kernel.
Backward computes a chunk's logits again, turns them into dz in the same memory, and adds

    d hidden = dz W        d W += dz^T hidden   (fp32)

Forward and backward take four products, 8 T H V operations. Where the loss of a token depends on
its own log-prob alone (SFT, pretraining, PPO's clipped loss), its derivative is known as soon as
the log-prob is, and `linear_logprobs_loss` does it all in one pass: three products, 6 T H V.

Products of bf16 numbers are exact in fp32, so the fp32 logits are those of an fp32 head. Logits
rounded to bf16 would move log-probs by 2e-2 nats, which PPO would take for a change of policy.
"""

from collections.abc import Callable, Iterator
from dataclasses import dataclass, replace
from typing import Any

import torch
from torch import Tensor
from torch.autograd.function import once_differentiable

from kernels.logprobs import Joins
from kernels.row_gradient import row_gradient
from kernels.row_state import (
    IGNORE_INDEX,
    RowSpec,
    accumulation_dtype,
    logprobs_and_entropy,
    row_state,
)
from kernels.workspace import logit_workspace

TokenLoss = Callable[[Tensor, Tensor], Tensor]
"""(log-probs [n], their rows [n] int64) to the loss of each of these tokens [n]."""


@dataclass(frozen=True, kw_only=True)
class LinearSpec:
    """How hidden states and weight become log-probs: all but the differentiated tensors."""

    rows: RowSpec
    joins: Joins = Joins()
    workspace_bytes: int | None = None
    """Bound of the memory of a chunk of logits; None for the device's own."""
    row_index: Tensor | None = None
    """Rows to compute [R] int64, of the gathered hidden states; None for all of them."""
    main_grad: Tensor | None = None
    """Buffer [V, H] the weight's gradient is added to; None to return it to autograd."""
    returns_zero_weight_grad: bool = False
    """With main_grad: give autograd zeros for the weight, for hooks that want a gradient."""


def _matmul(a: Tensor, b: Tensor, out: Tensor) -> Tensor:
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


class _Chunks:
    """The rows of one call, cut into chunks that share one workspace of fp32 logits."""

    def __init__(self, hidden: Tensor, weight: Tensor, labels: Tensor, spec: LinearSpec) -> None:
        self.hidden, self.weight, self.labels, self.spec = hidden, weight, labels, spec
        self.num_rows = len(hidden) if spec.row_index is None else len(spec.row_index)
        dtype = accumulation_dtype(weight.dtype)
        self.workspace = logit_workspace(self.num_rows, weight, dtype, spec.workspace_bytes)
        self.size = len(self.workspace)

    def __iter__(self) -> Iterator[slice]:
        for start in range(0, self.num_rows, max(1, self.size)):
            yield slice(start, min(start + self.size, self.num_rows))

    def pick(self, tensor: Tensor, chunk: slice) -> Tensor:
        """The chunk's rows of a tensor [T, ...]."""
        index = self.spec.row_index
        return tensor[chunk] if index is None else tensor.index_select(0, index[chunk])

    def logits(self, chunk: slice) -> Tensor:
        """The chunk's logits [n, V_local] in the workspace."""
        out = self.workspace[: chunk.stop - chunk.start]
        return _matmul(self.pick(self.hidden, chunk), self.weight.t(), out)

    def logit_gradient(
        self, logits: Tensor, chunk: slice, state: Tensor, grads: tuple[Tensor | None, ...]
    ) -> Tensor:
        """dz [n, V_local] in the weight's dtype, over the memory of the chunk's logits."""
        # A row of dz takes the front part of the bytes of its row of logits.
        out = logits.view(self.weight.dtype)[:, : logits.shape[1]]
        labels = self.pick(self.labels, chunk)
        return row_gradient(logits, labels, state, grads, self.spec.rows, out=out)

    def write_hidden_gradient(self, total: Tensor, dz: Tensor, chunk: slice) -> None:
        """Write this shard's part of the chunk's hidden gradient, rounded once, into [T, H]."""
        index = self.spec.row_index
        if index is None:
            torch.mm(dz, self.weight, out=total[chunk])
        else:
            total.index_copy_(0, index[chunk], dz @ self.weight)


class _Gradients:
    """The gradients of hidden and weight while chunks add to them; None for one not needed."""

    def __init__(self, chunks: _Chunks, *, total: Tensor | None, needs: tuple[bool, bool]) -> None:
        self.chunks = chunks
        weight, dtype = chunks.weight, chunks.workspace.dtype
        self.hidden = chunks.hidden.new_zeros(chunks.hidden.shape) if needs[0] else None
        self.weight = None
        if needs[1]:
            fits = total is not None and total.dtype == dtype
            self.weight = total if fits else torch.zeros_like(weight, dtype=dtype)
        self.wait: Callable[[], Tensor | None] | None = None

    def add(self, dz: Tensor, chunk: slice) -> None:
        """Add a chunk; with the last one the hidden gradient's reduction runs under dW."""
        if self.hidden is not None:
            self.chunks.write_hidden_gradient(self.hidden, dz, chunk)
            if chunk.stop == self.chunks.num_rows:
                self.wait = self.chunks.spec.joins.start_reduction(self.hidden)
        if self.weight is not None:
            add_matmul(self.weight, dz.t(), self.chunks.pick(self.chunks.hidden, chunk))

    def hidden_result(self) -> Tensor | None:
        """The gradient of this rank's hidden states, summed over shards."""
        if self.hidden is None:
            return None
        if self.wait is None:  # no rows, but the other shards are waiting
            self.wait = self.chunks.spec.joins.start_reduction(self.hidden)
        return self.wait()


def _deliver(
    total: Tensor | None, weight: Tensor, spec: LinearSpec, scale: Tensor | None = None
) -> Tensor | None:
    """What autograd gets for the weight, once main_grad, if there is one, has the gradient."""
    if total is None:
        return None
    if spec.main_grad is None:
        return (total if scale is None else total * scale).to(weight.dtype)
    if scale is not None:
        spec.main_grad.addcmul_(total, scale)
    elif total is not spec.main_grad:
        spec.main_grad.add_(total)
    return torch.zeros_like(weight) if spec.returns_zero_weight_grad else None


class _LinearLogprobs(torch.autograd.Function):
    """(hidden, weight) to (log-prob, entropy); keeps its inputs and 16 bytes a row."""

    @staticmethod
    def forward(
        ctx: Any, hidden: Tensor, weight: Tensor, labels: Tensor, spec: LinearSpec
    ) -> tuple[Tensor, Tensor | None]:
        chunks = _Chunks(spec.joins.gather_hidden(hidden), weight, labels, spec)
        state = chunks.workspace.new_empty(chunks.num_rows, 4)
        for chunk in chunks:
            state[chunk] = row_state(chunks.logits(chunk), chunks.pick(labels, chunk), spec.rows)
        state = spec.joins.merge_states(state)
        ctx.save_for_backward(hidden, weight, labels, state)
        ctx.spec = spec
        ctx.set_materialize_grads(False)
        everything = slice(0, chunks.num_rows)
        logprob, entropy = logprobs_and_entropy(state, chunks.pick(labels, everything), spec.rows)
        return _spread(chunks, logprob), None if entropy is None else _spread(chunks, entropy)

    @staticmethod
    @once_differentiable
    def backward(ctx: Any, *grads: Tensor | None) -> tuple[Tensor | None, ...]:
        needs = ctx.needs_input_grad[:2]
        if all(grad is None for grad in grads) or not any(needs):
            return (None,) * 4
        hidden, weight, labels, state = ctx.saved_tensors
        spec = ctx.spec
        chunks = _Chunks(spec.joins.gather_hidden(hidden), weight, labels, spec)
        gradients = _Gradients(chunks, total=spec.main_grad, needs=needs)
        for chunk in chunks:
            logits = chunks.logits(chunk)
            picked = tuple(None if g is None else chunks.pick(g, chunk) for g in grads)
            gradients.add(chunks.logit_gradient(logits, chunk, state[chunk], picked), chunk)
        return gradients.hidden_result(), _deliver(gradients.weight, weight, spec), None, None


def _spread(chunks: _Chunks, values: Tensor) -> Tensor:
    """Values [R] of the computed rows as [T], zero elsewhere."""
    if chunks.spec.row_index is None:
        return values
    return values.new_zeros(len(chunks.hidden)).index_copy(0, chunks.spec.row_index, values)


class _LinearLogprobsLoss(torch.autograd.Function):
    """Loss and log-probs in one pass; keeps the gradients and scales them in backward."""

    @staticmethod
    def forward(
        ctx: Any,
        hidden: Tensor,
        weight: Tensor,
        labels: Tensor,
        token_loss: TokenLoss,
        spec: LinearSpec,
        with_gradients: bool,
    ) -> tuple[Tensor, Tensor]:
        chunks = _Chunks(spec.joins.gather_hidden(hidden), weight, labels, spec)
        needs = ctx.needs_input_grad[:2] if with_gradients else (False, False)
        gradients = _Gradients(chunks, total=None, needs=needs)
        loss = chunks.workspace.new_zeros(())
        logprobs = chunks.workspace.new_zeros(chunks.num_rows)
        rows = spec.row_index
        if rows is None:
            rows = torch.arange(chunks.num_rows, device=hidden.device)
        for chunk in chunks:
            chunk_labels = chunks.pick(labels, chunk)
            logits = chunks.logits(chunk)
            state = spec.joins.merge_states(row_state(logits, chunk_labels, spec.rows))
            logprobs[chunk], _ = logprobs_and_entropy(state, chunk_labels, spec.rows)
            chunk_loss, derivative = _loss_and_derivative(
                token_loss, logprobs[chunk], rows[chunk], chunk_labels != spec.rows.ignore_index
            )
            loss += chunk_loss
            if any(needs):
                dz = chunks.logit_gradient(logits, chunk, state, (derivative, None))
                gradients.add(dz, chunk)
        ctx.save_for_backward(weight, gradients.hidden_result(), gradients.weight)
        ctx.spec = spec
        spread = _spread(chunks, logprobs)
        ctx.mark_non_differentiable(spread)
        return loss, spread

    @staticmethod
    @once_differentiable
    def backward(ctx: Any, scale: Tensor, _: Tensor) -> tuple[Tensor | None, ...]:
        weight, hidden_grad, total = ctx.saved_tensors
        if hidden_grad is not None:
            hidden_grad = (hidden_grad * scale).to(hidden_grad.dtype)
        grads = hidden_grad, _deliver(total, weight, ctx.spec, scale)
        return *grads, None, None, None, None


def _loss_and_derivative(
    token_loss: TokenLoss, logprobs: Tensor, rows: Tensor, counts: Tensor
) -> tuple[Tensor, Tensor]:
    """The loss [] summed over the rows that count, and d loss / d logprobs [n]."""
    with torch.enable_grad():
        leaf = logprobs.detach().requires_grad_()
        loss = torch.where(counts, token_loss(leaf, rows), 0.0).sum()
        (derivative,) = torch.autograd.grad(loss, leaf)
    return loss.detach(), derivative


def _loss_in_two_passes(
    hidden: Tensor, weight: Tensor, labels: Tensor, token_loss: TokenLoss, spec: LinearSpec
) -> tuple[Tensor, Tensor]:
    """The same loss for fp16: its dz would vanish before backward brings the loss scale."""
    logprob, _ = _LinearLogprobs.apply(hidden, weight, labels, spec)
    rows = spec.row_index
    if rows is None:
        rows = torch.arange(len(labels), device=labels.device)
    counts = labels[rows] != spec.rows.ignore_index
    loss = torch.where(counts, token_loss(logprob[rows], rows), 0.0).sum()
    return loss, logprob.detach()


def linear_logprobs(
    hidden: Tensor,
    weight: Tensor,
    labels: Tensor,
    *,
    temperature: float = 1.0,
    num_valid_vocab: int | None = None,
    with_entropy: bool = False,
    ignore_index: int = IGNORE_INDEX,
    workspace_bytes: int | None = None,
    row_index: Tensor | None = None,
    main_grad: Tensor | None = None,
) -> tuple[Tensor, Tensor | None]:
    """log softmax(hidden @ weight.T / temperature) at the labels, and the entropy, [T] fp32 each.

    hidden: [T, H]; weight: [V, H]; labels: [T] int. row_index [R] int64 names the rows to compute,
    zeros come back for the others; without it CPU tensors skip rows labelled ignore_index, while on
    a GPU, where finding them would wait for the device, all rows are computed. main_grad [V, H]
    takes the weight's gradient by addition, in its own precision, and autograd gets none.
    """
    rows = RowSpec(
        num_valid_vocab=len(weight) if num_valid_vocab is None else num_valid_vocab,
        temperature=temperature,
        ignore_index=ignore_index,
        with_entropy=with_entropy,
    )
    spec = LinearSpec(
        rows=rows, workspace_bytes=workspace_bytes, row_index=row_index, main_grad=main_grad
    )
    return shard_linear_logprobs(hidden, weight, labels, spec)


def linear_logprobs_loss(
    hidden: Tensor,
    weight: Tensor,
    labels: Tensor,
    token_loss: TokenLoss,
    *,
    temperature: float = 1.0,
    num_valid_vocab: int | None = None,
    ignore_index: int = IGNORE_INDEX,
    workspace_bytes: int | None = None,
    row_index: Tensor | None = None,
    main_grad: Tensor | None = None,
) -> tuple[Tensor, Tensor]:
    """Loss [] and log-probs [T] (without gradient), the gradients computed in the same pass.

    token_loss(logprobs [n], rows [n]) gives the loss [n] of tokens from their own log-probs alone,
    for example `lambda logprobs, rows: -(weights[rows] * logprobs)`; torch differentiates it. It is
    called once a chunk and summed, so its normalisers are known beforehand. The weight's fp32
    gradient [V, H] is held until backward. fp16 takes two passes, for the sake of its loss scale.
    Other arguments as `linear_logprobs`.
    """
    rows = RowSpec(
        num_valid_vocab=len(weight) if num_valid_vocab is None else num_valid_vocab,
        temperature=temperature,
        ignore_index=ignore_index,
        with_entropy=False,
    )
    spec = LinearSpec(
        rows=rows, workspace_bytes=workspace_bytes, row_index=row_index, main_grad=main_grad
    )
    return shard_linear_logprobs_loss(hidden, weight, labels, token_loss, spec)


@torch.compiler.disable  # matrix products and kernels alone: nothing for a compiler to fuse
def shard_linear_logprobs(
    hidden: Tensor, weight: Tensor, labels: Tensor, spec: LinearSpec
) -> tuple[Tensor, Tensor | None]:
    """`linear_logprobs` and entropy [T] from one shard of the weight [V_local, H]."""
    _check(hidden, weight)
    return _LinearLogprobs.apply(hidden, weight, labels, _compacted(labels, spec))


@torch.compiler.disable  # matrix products and kernels alone: nothing for a compiler to fuse
def shard_linear_logprobs_loss(
    hidden: Tensor, weight: Tensor, labels: Tensor, token_loss: TokenLoss, spec: LinearSpec
) -> tuple[Tensor, Tensor]:
    """`linear_logprobs_loss` from one shard of the weight [V_local, H]."""
    _check(hidden, weight)
    spec = _compacted(labels, spec)
    if weight.dtype == torch.float16:
        return _loss_in_two_passes(hidden, weight, labels, token_loss, spec)
    return _LinearLogprobsLoss.apply(
        hidden, weight, labels, token_loss, spec, torch.is_grad_enabled()
    )


def _compacted(labels: Tensor, spec: LinearSpec) -> LinearSpec:
    """The spec with the rows that are not ignored; only on CPU, where counting them is free."""
    if spec.row_index is not None or labels.is_cuda:
        return spec
    return replace(spec, row_index=(labels != spec.rows.ignore_index).nonzero().squeeze(1))


def _check(hidden: Tensor, weight: Tensor) -> None:
    if hidden.dim() != 2 or weight.dim() != 2 or hidden.shape[1] != weight.shape[1]:
        raise ValueError(
            f"expected hidden [T, H] and weight [V, H], got {tuple(hidden.shape)} "
            f"and {tuple(weight.shape)}"
        )
    if hidden.dtype != weight.dtype:
        raise ValueError(f"hidden is {hidden.dtype} and weight {weight.dtype}; they must agree")
