"""Log-probabilities from hidden states and the LM head, without ever holding the logits.

    z = hidden W^T / temperature        log p_y and H as in row_state.py

Rows go through in chunks whose fp32 logits fit a workspace: a matrix product, then the row kernel.
Backward computes a chunk's logits again, turns them into dz in the same memory, and adds

    d hidden = dz W        d W += dz^T hidden   (fp32)

Forward and backward take four products, 8 T H V operations. The loss of a token may depend on its
own log-prob alone, as in SFT, pretraining and PPO's clipped loss. Its derivative is then known as
soon as the log-prob is. `linear_logprobs_loss` does it all in one pass: three products, 6 T H V.

Products of bf16 numbers are exact in fp32, so the fp32 logits are those of an fp32 head. Logits
rounded to bf16 would move log-probs by 2e-2 nats, which PPO would take for a change of policy.
"""

from collections.abc import Callable
from dataclasses import dataclass, replace
from typing import Any, NamedTuple

import torch
from torch import Tensor
from torch.autograd.function import once_differentiable

from kernels.joins import write_joined_results
from kernels.linear_chunks import Chunks, Gradients, LinearSpec, deliver
from kernels.row_merge import write_merged_results
from kernels.row_pass import row_pass
from kernels.row_state import (
    IGNORE_INDEX,
    RowSpec,
    empty_results,
    row_state,
    write_row_results,
)

TokenLoss = Callable[[Tensor, Tensor], Tensor | tuple[Tensor, ...]]
"""(log-probs [n], their rows [n] int64) to the loss of each of these tokens [n].

torch differentiates it, unless it gives (losses [n], their derivatives by the log-probs [n]). A
third tensor, terms [k, n], is what its owner wants to know of each token besides."""


@dataclass(frozen=True)
class ProportionalLoss:
    """The token loss slope x log-prob: its derivative is known before the log-prob is."""

    slope: Tensor
    """0-d, fp32."""

    def __call__(self, logprobs: Tensor, rows: Tensor) -> tuple[Tensor, Tensor]:
        """Return the losses [n] and their derivatives [n]."""
        return logprobs * self.slope, self.slope.expand(len(logprobs))


class _LinearLogprobs(torch.autograd.Function):
    """(hidden, weight) to (log-prob, entropy); keeps its inputs and 16 bytes a row."""

    @staticmethod
    def forward(
        ctx: Any, hidden: Tensor, weight: Tensor, labels: Tensor, spec: LinearSpec
    ) -> tuple[Tensor, Tensor | None]:
        chunks = Chunks(spec.joins.gather_hidden(hidden), weight, labels, spec)
        results = empty_results(chunks.num_rows, chunks.workspace, spec.rows.with_entropy)
        gather_states = spec.joins.gather_states
        for chunk, hidden_rows in chunks:
            logits, chunk_labels = chunks.logits(hidden_rows), chunks.labels[chunk]
            if gather_states is None:
                write_row_results(results.part(chunk), logits, chunk_labels, spec.rows)
            else:
                results.state[chunk] = row_state(logits, chunk_labels, spec.rows)
        if gather_states is not None:  # once for all chunks
            states = gather_states(results.state)
            write_merged_results(results, states, chunks.labels, spec.rows)
        ctx.save_for_backward(hidden, weight, labels, results.state)
        ctx.spec = spec
        ctx.set_materialize_grads(False)
        entropies = results.entropies
        return (
            _spread(chunks, results.logprobs),
            None if entropies is None else _spread(chunks, entropies),
        )

    @staticmethod
    @once_differentiable
    def backward(ctx: Any, *grads: Tensor | None) -> tuple[Tensor | None, ...]:
        needs = ctx.needs_input_grad[:2]
        if all(grad is None for grad in grads) or not any(needs):
            return (None,) * 4
        hidden, weight, labels, state = ctx.saved_tensors
        spec = ctx.spec
        chunks = Chunks(spec.joins.gather_hidden(hidden), weight, labels, spec)
        gradients = Gradients(chunks, total=spec.main_grad, needs=needs)
        picked = [None if g is None else chunks.picked(g) for g in grads]
        for chunk, hidden_rows in chunks:
            logits = chunks.logits(hidden_rows)
            chunk_grads = tuple(None if g is None else g[chunk] for g in picked)
            dz = chunks.logit_gradient(logits, chunk, state[chunk], chunk_grads)
            gradients.add(dz, chunk, hidden_rows)
        weight_grad = deliver(gradients.weight_result(), weight, spec)
        return gradients.hidden_result(), weight_grad, None, None


def _spread(chunks: Chunks, values: Tensor) -> Tensor:
    """Values [..., R] of the computed rows as [..., T], zero elsewhere."""
    index = chunks.spec.row_index
    if index is None:
        return values
    spread = values.new_zeros(*values.shape[:-1], len(chunks.hidden))
    return spread.index_copy_(-1, index, values)


def _joined(parts: list[Tensor]) -> Tensor:
    """The chunks' values [..., n] as [..., R]; those of a single chunk as they are."""
    return parts[0] if len(parts) == 1 else torch.cat(parts, dim=-1)


class _LinearLogprobsLoss(torch.autograd.Function):
    """Loss and terms in one pass; keeps the gradients and scales them in backward."""

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
        chunks = Chunks(spec.joins.gather_hidden(hidden), weight, labels, spec)
        needs = ctx.needs_input_grad[:2] if with_gradients else (False, False)
        gradients = Gradients(chunks, total=None, needs=needs)
        results = empty_results(chunks.num_rows, chunks.workspace, with_entropy=False)
        rows = spec.row_index
        if rows is None:
            rows = torch.arange(chunks.num_rows, device=hidden.device)
        found: list[_TokenValues] = []
        is_whole = spec.joins.gather_states is None
        for chunk, hidden_rows in chunks:
            logits, part = chunks.logits(hidden_rows), results.part(chunk)
            chunk_labels, dz = chunks.labels[chunk], None
            if isinstance(token_loss, ProportionalLoss) and any(needs) and is_whole:
                dz = chunks.memory_of_dz(logits)
                row_pass(logits, chunk_labels, token_loss.slope, part.logprobs, spec.rows, out=dz)
            else:
                write_joined_results(part, logits, chunk_labels, spec.rows, spec.joins)
            values = _token_values(token_loss, part.logprobs, rows[chunk])
            found.append(values)
            if any(needs):
                if dz is None:
                    grads = values.derivatives, None
                    dz = chunks.logit_gradient(logits, chunk, part.state, grads)
                gradients.add(dz, chunk, hidden_rows)
        if not found:  # no rows: what the caller gets has a shape all the same
            found.append(_token_values(token_loss, results.logprobs, rows))
        counts = chunks.labels != spec.rows.ignore_index
        losses = _joined([values.losses for values in found])
        loss = torch.where(counts, losses, 0.0).sum(dtype=chunks.workspace.dtype)
        ctx.save_for_backward(weight, gradients.hidden_result(), gradients.weight_result())
        ctx.spec = spec
        spread = _spread(chunks, _joined([values.terms for values in found]))
        ctx.mark_non_differentiable(spread)
        return loss, spread

    @staticmethod
    @once_differentiable
    def backward(ctx: Any, scale: Tensor, _: Tensor) -> tuple[Tensor | None, ...]:
        weight, hidden_grad, total = ctx.saved_tensors
        if hidden_grad is not None:
            hidden_grad = (hidden_grad * scale).to(hidden_grad.dtype)
        grads = hidden_grad, deliver(total, weight, ctx.spec, scale)
        return *grads, None, None, None, None


class _TokenValues(NamedTuple):
    """What a token loss says of n tokens; what it says of ignored rows counts for nothing."""

    losses: Tensor
    """[n]."""
    derivatives: Tensor
    """[n], by the log-probs."""
    terms: Tensor
    """[k, n], or the log-probs [n] where it has no terms."""


def _token_values(token_loss: TokenLoss, logprobs: Tensor, rows: Tensor) -> _TokenValues:
    """What the token loss says of the log-probs [n] of `rows` [n], without gradient."""
    with torch.enable_grad():
        leaf = logprobs.detach().requires_grad_()
        result = token_loss(leaf, rows)
        if not isinstance(result, tuple):
            (derivatives,) = torch.autograd.grad(result, leaf, torch.ones_like(result))
            result = result, derivatives
    losses, derivatives, *terms = (x.detach() for x in result)
    return _TokenValues(losses, derivatives, terms[0] if terms else logprobs.detach())


class _KnownDerivatives(torch.autograd.Function):
    """Log-probs [n] to their losses [n], whose derivatives [n] are given."""

    @staticmethod
    def forward(ctx: Any, logprobs: Tensor, losses: Tensor, derivatives: Tensor) -> Tensor:
        ctx.save_for_backward(derivatives)
        return losses.clone()

    @staticmethod
    @once_differentiable
    def backward(ctx: Any, grads: Tensor) -> tuple[Tensor | None, ...]:
        return grads * ctx.saved_tensors[0], None, None


def _loss_in_two_passes(
    hidden: Tensor, weight: Tensor, labels: Tensor, token_loss: TokenLoss, spec: LinearSpec
) -> tuple[Tensor, Tensor]:
    """The same loss for fp16: its dz would vanish before backward brings the loss scale."""
    logprob, _ = _LinearLogprobs.apply(hidden, weight, labels, spec)
    rows = spec.row_index
    if rows is None:
        rows = torch.arange(len(labels), device=labels.device)
    picked = logprob[rows]
    values = _token_values(token_loss, picked, rows)
    losses = _KnownDerivatives.apply(picked, values.losses, values.derivatives)
    loss = torch.where(labels[rows] != spec.rows.ignore_index, losses, 0.0).sum()
    spread = values.terms.new_zeros(*values.terms.shape[:-1], len(labels))
    return loss, spread.index_copy_(-1, rows, values.terms)


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

    Library only: of a whole vocabulary; networks call models/vocab_parallel.py.

    hidden: [T, H]; weight: [V, H]; labels: [T] int. row_index [R] int64 names the rows to compute;
    zeros come back for the others. Without it CPU tensors skip rows labelled ignore_index. On a GPU
    finding them would wait for the device, so all rows are computed. main_grad [V, H] takes the
    weight's gradient by addition, in its own precision, and autograd gets none.
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

    Library only: of a whole vocabulary; networks call models/vocab_parallel.py.

    token_loss(logprobs [n], rows [n]) gives the loss [n] of tokens from their own log-probs alone,
    for example `lambda logprobs, rows: -(weights[rows] * logprobs)`, which torch differentiates. Or
    it gives losses and derivatives: `(-weights[rows] * logprobs, -weights[rows])`. Where it gives
    terms [k, n] besides, those of all rows, [k, T], come back in place of the log-probs. It is
    called once a chunk and its losses are summed, so it knows its normalisers beforehand. The
    weight's fp32 gradient [V, H] is held until backward. fp16 takes two passes, for the sake of its
    loss scale. Other arguments as `linear_logprobs`.
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
