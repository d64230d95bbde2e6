"""Library only: log-probabilities of given tokens, and the entropy, from logits that exist whole.

    log p_y = z_y - log sum_i e^(z_i)        H = -sum_i p_i log p_i        z = logits / temperature

The stages never hold whole logits: they come by linear_logprobs.py. Kept for models whose head is
not a matrix product, and because its benchmark beside other libraries measures the row kernels.
One read of the logits forward, one read and one write backward. The formulas of a row and of its
gradient are in row_state.py and row_gradient.py.
"""

from typing import Any

import torch
from torch import Tensor
from torch.autograd.function import once_differentiable

from kernels.row_gradient import row_gradient
from kernels.row_state import IGNORE_INDEX, RowSpec, empty_results, write_row_results


class _Logprobs(torch.autograd.Function):
    """logits to (log-prob, entropy); keeps the logits and 16 bytes a row for backward."""

    @staticmethod
    def forward(
        ctx: Any, logits: Tensor, labels: Tensor, spec: RowSpec
    ) -> tuple[Tensor, Tensor | None]:
        results = empty_results(len(logits), logits, spec.with_entropy)
        write_row_results(results, logits, labels, spec)
        ctx.save_for_backward(logits, labels, results.state)
        ctx.spec = spec
        ctx.set_materialize_grads(False)  # an entropy that is only logged costs no backward
        return results.logprobs, results.entropies

    @staticmethod
    @once_differentiable
    def backward(ctx: Any, *grads: Tensor | None) -> tuple[Tensor | None, ...]:
        if all(grad is None for grad in grads):
            return None, None, None
        logits, labels, state = ctx.saved_tensors
        return row_gradient(logits, labels, state, grads, ctx.spec), None, None


def logprobs(
    logits: Tensor,
    labels: Tensor,
    *,
    temperature: float = 1.0,
    num_valid_vocab: int | None = None,
    with_entropy: bool = False,
    ignore_index: int = IGNORE_INDEX,
) -> tuple[Tensor, Tensor | None]:
    """log softmax(logits / temperature) at the labels, and the entropy: ([T], [T] or None), fp32.

    logits: [T, V]; labels: [T] int. Columns from num_valid_vocab on are padding and take no part;
    a label among them has log-prob -inf. Rows labelled ignore_index give zeros. Differentiable in
    both outputs.
    """
    if logits.dim() != 2 or labels.shape != logits.shape[:1]:
        raise ValueError(
            f"expected logits [T, V] and labels [T], got {tuple(logits.shape)} "
            f"and {tuple(labels.shape)}"
        )
    spec = RowSpec(
        num_valid_vocab=logits.shape[1] if num_valid_vocab is None else num_valid_vocab,
        temperature=temperature,
        ignore_index=ignore_index,
        with_entropy=with_entropy,
    )
    return _Logprobs.apply(logits, labels, spec)
