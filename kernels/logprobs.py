"""Log-probabilities of given tokens, and the entropy, from logits.

    log p_y = z_y - log sum_i e^(z_i)        H = -sum_i p_i log p_i        z = logits / temperature

One read of the logits forward, one read and one write backward; the formulas of a row, of a
vocabulary shard and of their gradients are in row_state.py and row_gradient.py.
"""

from collections.abc import Callable
from dataclasses import dataclass
from typing import Any, Literal

import torch
from torch import Tensor
from torch.autograd.function import once_differentiable

from kernels.row_gradient import row_gradient
from kernels.row_merge import write_merged_results
from kernels.row_state import (
    IGNORE_INDEX,
    RowResults,
    RowSpec,
    empty_results,
    itself,
    row_state,
    write_row_results,
)


def _at_once(tensor: Tensor) -> Callable[[], Tensor]:
    return lambda: tensor


@dataclass(frozen=True, kw_only=True)
class Joins:
    """What joins the shards of a vocabulary; the default is the whole vocabulary on one device."""

    gather_states: Callable[[Tensor], Tensor] | None = None
    """State [T, 4] of this shard to those of all shards [shards, T, 4]; None for a single one."""
    gather_hidden: Callable[[Tensor], Tensor] = itself
    """This rank's rows of the hidden states to all rows."""
    start_reduction: Callable[[Tensor], Callable[[], Tensor]] = _at_once
    """Begins to sum the hidden states' gradient over shards; the returned call waits for it."""


ONE_SHARD = Joins()


def write_joined_results(
    results: RowResults, logits: Tensor, labels: Tensor, spec: RowSpec, joins: Joins
) -> None:
    """Write the rows' results over the whole vocabulary from one shard of it, [T, V_local]."""
    if joins.gather_states is None:
        write_row_results(results, logits, labels, spec)
    else:
        states = joins.gather_states(row_state(logits, labels, spec))
        write_merged_results(results, states, labels, spec)


class _Logprobs(torch.autograd.Function):
    """logits to (log-prob, entropy); keeps the logits and 16 bytes a row for backward."""

    @staticmethod
    def forward(
        ctx: Any,
        logits: Tensor,
        labels: Tensor,
        spec: RowSpec,
        joins: Joins,
        overwrite_logits: bool,
    ) -> tuple[Tensor, Tensor | None]:
        results = empty_results(len(logits), logits, spec.with_entropy)
        write_joined_results(results, logits, labels, spec, joins)
        ctx.save_for_backward(logits, labels, results.state)
        ctx.spec, ctx.overwrite_logits = spec, overwrite_logits
        ctx.set_materialize_grads(False)  # an entropy that is only logged costs no backward
        return results.logprobs, results.entropies

    @staticmethod
    @once_differentiable
    def backward(ctx: Any, *grads: Tensor | None) -> tuple[Tensor | None, ...]:
        if all(grad is None for grad in grads):
            return (None,) * 5
        logits, labels, state = ctx.saved_tensors
        out = logits if ctx.overwrite_logits else None
        return row_gradient(logits, labels, state, grads, ctx.spec, out=out), None, None, None, None


def logprobs(
    logits: Tensor,
    labels: Tensor,
    *,
    temperature: float = 1.0,
    num_valid_vocab: int | None = None,
    with_entropy: bool = False,
    ignore_index: int = IGNORE_INDEX,
    overwrite_logits: bool = False,
) -> tuple[Tensor, Tensor | None]:
    """log softmax(logits / temperature) at the labels, and the entropy: ([T], [T] or None), fp32.

    logits: [T, V]; labels: [T] int. Columns from num_valid_vocab on are padding and take no part;
    a label among them has log-prob -inf. Rows labelled ignore_index give zeros. Differentiable in
    both outputs; overwrite_logits lets backward write the gradient over the logits.
    """
    check_rows(logits, labels)
    spec = RowSpec(
        num_valid_vocab=logits.shape[1] if num_valid_vocab is None else num_valid_vocab,
        temperature=temperature,
        ignore_index=ignore_index,
        with_entropy=with_entropy,
    )
    return shard_logprobs(logits, labels, spec, ONE_SHARD, overwrite_logits=overwrite_logits)


def shard_logprobs(
    logits: Tensor, labels: Tensor, spec: RowSpec, joins: Joins, *, overwrite_logits: bool = False
) -> tuple[Tensor, Tensor | None]:
    """`logprobs` and entropy [T] from one shard [T, V_local], joined to the others by `joins`."""
    return _Logprobs.apply(logits, labels, spec, joins, overwrite_logits)


def check_rows(matrix: Tensor, labels: Tensor) -> None:
    """Raise ValueError unless matrix is [T, n] with one label a row."""
    if matrix.dim() != 2 or labels.shape != matrix.shape[:1]:
        raise ValueError(
            f"expected a matrix [T, n] and labels [T], got {tuple(matrix.shape)} "
            f"and {tuple(labels.shape)}"
        )


def kl_estimate(
    logprobs: Tensor, ref_logprobs: Tensor, kind: Literal["k1", "k2", "k3"] = "k1"
) -> Tensor:
    """Per-token estimate of KL(policy || reference) from samples of the policy, same shape, nats.

    With r = logprobs - ref_logprobs (Schulman, "Approximating KL divergence"):
    k1 = r, unbiased, signed; k2 = r^2 / 2, biased, its gradient is unbiased for the KL's;
    k3 = e^-r - 1 + r, unbiased and never negative. Differentiable in both.
    """
    log_ratio = logprobs - ref_logprobs
    if kind == "k1":
        return log_ratio
    if kind == "k2":
        return 0.5 * log_ratio.square()
    if kind == "k3":
        # In fp64, because near r = 0 the sum cancels down to r^2 / 2, below the rounding of r.
        exact = log_ratio.double()
        return (torch.expm1(-exact) + exact).to(log_ratio.dtype)
    raise ValueError(f"kind {kind!r} is none of k1, k2, k3")
