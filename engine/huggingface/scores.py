"""What our scalar head says and `score` of transformers' sequence classifiers does not: its bias,
and where a score is read.

Ours is w.h + b at the last token. Theirs is w.h at the last token that is not pad_token_id.
"""

import torch
import torch.distributed as dist
from torch import Tensor

from engine.huggingface.model_folder import ModelFolder
from engine.printable import say
from engine.ranks.parallel import Parallel
from models.huggingface.config import SCORE_BIAS_FIELD
from models.huggingface.tensors import PROJECT_OUT, SCORE, SCORE_BIAS, last_norm_bias
from models.sizes import GPTSize


def fold_bias(
    parameters: dict[str, Tensor], size: GPTSize, dtype: torch.dtype, parallel: Parallel
) -> float:
    """Take the head's bias out of this rank's parameters of a scalar network; return what scores
    are lower by without it, the same on all ranks.

    The bias b becomes (b / |w|^2) w, added to the last norm's bias: w.h grows by b, exactly in real
    numbers. With a projection P between them w stands for w P. Where that norm has no bias
    (RMSNorm), or w is all zeros, nothing can hold it: b comes back. `parameters` are replaced, not
    changed. dtype: of the weights that are written.
    """
    left = 0.0
    if SCORE_BIAS in parameters:
        left = float(parameters.pop(SCORE_BIAS))  # sync
        name = last_norm_bias(size)
        weight = parameters[SCORE].to(dtype).double()[0]
        if PROJECT_OUT in parameters:
            weight = weight @ parameters[PROJECT_OUT].to(dtype).double()
        if name is not None and left:
            # In double, where an fp32 w's square neither vanishes nor overflows.
            shift = left / weight.square().sum() * weight
            folded = (parameters[name].double() + shift).to(dtype)
            if folded.isfinite().all():  # sync
                parameters[name], left = folded, 0.0
    found = [0.0] * parallel.layout.pp
    dist.all_gather_object(found, left, group=parallel.pp_group)
    return sum(found)


def say_left_bias(left: float, family: str) -> None:
    """Say what a user of transformers has to add."""
    say(
        f"WARNING: scores in transformers are lower by {left:.9g}, the bias of the head, which no "
        f"weight of this {family} can hold; config.json has it as {SCORE_BIAS_FIELD}. Rankings and "
        "whitened advantages are the same without it."
    )


def say_where_scores_are_read(model: ModelFolder, eos_id: int) -> None:
    """Say where transformers reads a text's score before its end of text, and we at it."""
    if model.pad_id == eos_id:
        say(
            f"WARNING: pad_token_id {eos_id} is the end of text: transformers reads this model's "
            "score at the token before it, and here it is read at the end of text itself"
        )
