"""Where top-k and top-p cut a row of logits."""

import torch
from torch import Tensor

_WHOLE = 2**53


def truncation_thresholds(
    logits: Tensor,
    *,
    temperature: float,
    top_k: int = 0,
    top_p: float = 1.0,
    num_valid_vocab: int | None = None,
) -> Tensor:
    """[B] fp32: columns of [B, V] whose logit / temperature reaches this survive.

    top-k comes first; top-p then keeps the smallest set of the likeliest columns whose mass reaches
    top_p. Columns equal to the last one kept are kept as well. Sorts whole rows: for evaluation.
    """
    z = logits[:, :num_valid_vocab].float() * (1 / temperature)
    z = z.topk(top_k).values if 0 < top_k < z.shape[1] else z.sort(1, descending=True).values
    if top_p == 1:
        return z.amin(1)
    # Masses are summed as whole numbers of 2^-53, which are exact in any order: a scan of floats
    # gives other bits from run to run on a GPU.
    mass = z.softmax(1).double().mul(_WHOLE).long()
    # The likeliest column has no mass before it, so at least one column is kept.
    is_kept = mass.cumsum(1) - mass < int(top_p * _WHOLE)
    return z.masked_fill(~is_kept, torch.inf).amin(1)
