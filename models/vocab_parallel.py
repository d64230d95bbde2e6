"""Joins vocabulary shards: token log-probs and entropy under tensor parallelism.

Every rank holds a block of the LM head's rows, in rank order and of equal size. The maths of a
shard is in kernels/; here are the only collectives over shards: one all-gather of 16 bytes a token,
and the sum of the hidden states' gradient.
"""

from collections.abc import Callable
from functools import partial

import torch.distributed as dist
from torch import Tensor
from torch.distributed import ProcessGroup

from kernels.joins import Joins
from kernels.linear_chunks import LinearSpec
from kernels.linear_logprobs import (
    TokenLoss,
    shard_linear_logprobs,
    shard_linear_logprobs_loss,
)
from kernels.philox import GROUP, SampleKey
from kernels.row_state import IGNORE_INDEX, RowSpec
from kernels.sample import Sample, check_sampling, merge_samples, merge_states
from kernels.sample_state import sample_state
from kernels.truncation import truncation_thresholds


def _gather_states(state: Tensor, group: ProcessGroup) -> Tensor:
    """The shards' states [tp, T, n], in rank order: the same bits on every rank, in every run."""
    # End to end: gloo refuses an output with a dimension of its own for the ranks.
    states = state.new_empty(group.size() * len(state), *state.shape[1:])
    dist.all_gather_into_tensor(states, state.contiguous(), group=group)
    return states.view(group.size(), *state.shape)


def _waited(work: dist.Work, result: Tensor) -> Tensor:
    """The result of a collective, once it is there."""
    work.wait()
    return result


def _joins(group: ProcessGroup | None, *, sequence_parallel: bool = False) -> Joins:
    """The collectives of a group; none for a single shard."""
    if group is None or group.size() == 1:
        return Joins()
    tp = group.size()

    def gather_states(state: Tensor) -> Tensor:
        return _gather_states(state, group)

    def gather_hidden(hidden: Tensor) -> Tensor:
        rows = hidden.new_empty(len(hidden) * tp, hidden.shape[1])
        dist.all_gather_into_tensor(rows, hidden.contiguous(), group=group)
        return rows

    def start_all_reduce(gradient: Tensor) -> Callable[[], Tensor]:
        work = dist.all_reduce(gradient, group=group, async_op=True)
        return partial(_waited, work, gradient)

    def start_reduce_scatter(gradient: Tensor) -> Callable[[], Tensor]:
        mine = gradient.new_empty(len(gradient) // tp, gradient.shape[1])
        work = dist.reduce_scatter_tensor(mine, gradient, group=group, async_op=True)
        return partial(_waited, work, mine)

    if sequence_parallel:
        return Joins(
            gather_states=gather_states,
            gather_hidden=gather_hidden,
            start_reduction=start_reduce_scatter,
        )
    return Joins(gather_states=gather_states, start_reduction=start_all_reduce)


def _row_spec(
    num_columns: int,
    group: ProcessGroup | None,
    *,
    temperature: float,
    num_valid_vocab: int | None,
    ignore_index: int = IGNORE_INDEX,
    with_entropy: bool = False,
) -> RowSpec:
    """The columns this rank holds of a vocabulary of num_columns a rank."""
    rank, tp = (0, 1) if group is None else (group.rank(), group.size())
    return RowSpec(
        num_valid_vocab=num_columns * tp if num_valid_vocab is None else num_valid_vocab,
        first_column=rank * num_columns,
        temperature=temperature,
        ignore_index=ignore_index,
        with_entropy=with_entropy,
    )


def _linear_spec(
    weight: Tensor,
    group: ProcessGroup | None,
    *,
    sequence_parallel: bool,
    rows: RowSpec,
    row_index: Tensor | None,
    workspace_bytes: int | None,
) -> LinearSpec:
    """The collectives of the group, and where megatron wants this weight's gradient.

    megatron's DistributedDataParallel reads `weight.grad` in a hook on the weight's autograd node
    and adds it to `weight.main_grad`. The head's gradient goes to main_grad directly, in fp32, and
    never through weight.grad. `grad_added_to_main_grad` stays False: the hook then still adds what
    other users of the weight send through autograd, tied embeddings above all. So a gradient that
    took another path is never dropped. With overlapped reduction the hook insists on finding a
    gradient: zeros, unless the embeddings of this stage provide one (`zero_out_wgrad`).
    """
    is_hooked = hasattr(weight, "grad_added_to_main_grad")
    return LinearSpec(
        rows=rows,
        joins=_joins(group, sequence_parallel=sequence_parallel),
        workspace_bytes=workspace_bytes,
        row_index=row_index,
        main_grad=getattr(weight, "main_grad", None),
        returns_zero_weight_grad=is_hooked and not getattr(weight, "zero_out_wgrad", False),
    )


def vocab_parallel_linear_logprobs(  # noqa: PLR0913
    hidden: Tensor,
    weight: Tensor,
    labels: Tensor,
    *,
    group: ProcessGroup | None,
    sequence_parallel: bool = False,
    temperature: float = 1.0,
    num_valid_vocab: int | None = None,
    with_entropy: bool = False,
    ignore_index: int = IGNORE_INDEX,
    row_index: Tensor | None = None,
    workspace_bytes: int | None = None,
) -> tuple[Tensor, Tensor | None]:
    """Log-probs [T] fp32 and entropy [T] (or None) from hidden states, on every rank.

    hidden: [T, H], the same on all ranks, or with sequence_parallel this rank's rows [T / tp, H].
    weight: this rank's rows [V / tp, H] of the head. labels, row_index: of all T rows. The weight's
    gradient is added to `weight.main_grad` in fp32 where there is one.
    """
    rows = _row_spec(
        len(weight),
        group,
        temperature=temperature,
        num_valid_vocab=num_valid_vocab,
        ignore_index=ignore_index,
        with_entropy=with_entropy,
    )
    spec = _linear_spec(
        weight,
        group,
        sequence_parallel=sequence_parallel,
        rows=rows,
        row_index=row_index,
        workspace_bytes=workspace_bytes,
    )
    return shard_linear_logprobs(hidden, weight, labels, spec)


def vocab_parallel_linear_logprobs_loss(  # noqa: PLR0913
    hidden: Tensor,
    weight: Tensor,
    labels: Tensor,
    token_loss: TokenLoss,
    *,
    group: ProcessGroup | None,
    sequence_parallel: bool = False,
    temperature: float = 1.0,
    num_valid_vocab: int | None = None,
    ignore_index: int = IGNORE_INDEX,
    row_index: Tensor | None = None,
    workspace_bytes: int | None = None,
) -> tuple[Tensor, Tensor]:
    """Loss [] and log-probs [T], or the token loss's terms [k, T], in one pass, on every rank.

    Only the loss has a gradient. token_loss as in `kernels.linear_logprobs.linear_logprobs_loss`,
    the same on all ranks; other arguments as `vocab_parallel_linear_logprobs`.
    """
    rows = _row_spec(
        len(weight),
        group,
        temperature=temperature,
        num_valid_vocab=num_valid_vocab,
        ignore_index=ignore_index,
    )
    spec = _linear_spec(
        weight,
        group,
        sequence_parallel=sequence_parallel,
        rows=rows,
        row_index=row_index,
        workspace_bytes=workspace_bytes,
    )
    return shard_linear_logprobs_loss(hidden, weight, labels, token_loss, spec)


def vocab_parallel_sample(  # noqa: PLR0913
    logits_shard: Tensor,
    *,
    group: ProcessGroup | None,
    temperature: float,
    seed: int | Tensor,
    sample_index: Tensor,
    position: Tensor,
    top_k: int = 0,
    top_p: float = 1.0,
    num_valid_vocab: int | None = None,
) -> Sample:
    """`kernels.sample.sample` from the whole vocabulary: the same tokens on every rank.

    logits_shard: this rank's columns [B, V / tp], a multiple of 8 where tp > 1 (else ValueError).
    Gathers 16 bytes a row; top-k and top-p gather the logits besides, to find the exact cut.
    """
    check_sampling(temperature, top_k, top_p, seed)
    shards = None if group is None or group.size() == 1 else group
    if shards and logits_shard.shape[1] % GROUP.value:  # on every rank: none waits for another
        raise ValueError(
            f"a rank of {shards.size()} holds {logits_shard.shape[1]} columns of the vocabulary, "
            f"which must be a multiple of {GROUP.value} to sample from"
        )
    thresholds = None
    if temperature > 0 and (top_k > 0 or top_p < 1):
        logits = _gather_states(logits_shard, shards).transpose(0, 1) if shards else logits_shard
        thresholds = truncation_thresholds(
            logits.flatten(1),  # [B, V]
            temperature=temperature,
            top_k=top_k,
            top_p=top_p,
            num_valid_vocab=num_valid_vocab,
        )
    states = sample_state(
        logits_shard,
        SampleKey(seed, sample_index, position),
        temperature=temperature,
        first_column=0 if group is None else group.rank() * logits_shard.shape[1],
        num_valid_vocab=num_valid_vocab,
        thresholds=thresholds,
    )
    return merge_samples(_gather_states(merge_states(states), shards) if shards else states)
