"""What a network that trains has beside its weights: gradients, in buffers that data-parallel ranks
sum."""

from typing import Any

from megatron.core.distributed import DistributedDataParallel, DistributedDataParallelConfig

from engine.ranks.device import choices_for
from engine.training.network import Network


def make_trainable(network: Network) -> None:
    """Give a network gradients: dropout on, and megatron's data-parallel wrapper around every
    chunk."""
    parallel = network.parallel
    # Without other replicas there is nothing to overlap.
    gains = parallel.num_replicas > 1 and choices_for(parallel.device).overlaps_replicas
    overlaps_reduce, overlaps_gather = parallel.layout.overlaps(gains=gains)
    config = DistributedDataParallelConfig(
        grad_reduce_in_fp32=True,
        use_distributed_optimizer=True,
        overlap_grad_reduce=overlaps_reduce,
        overlap_param_gather=overlaps_gather,
        bucket_size=parallel.layout.bucket_elements,
        average_in_collective=False,
        check_for_nan_in_grad=False,  # alarms and loss scaling look at the norm instead
    )

    def wrap(number: int, module: Any) -> DistributedDataParallel:
        # On the first pipeline chunk buckets are reduced and gathered one by one; megatron makes
        # one of the others, whose communication falls into bubbles. An fp32 head has a bucket of
        # its own all the same: not every backend gathers two dtypes in one message.
        is_one = number > 0 and len({p.dtype for p in module.parameters()}) == 1
        chunk = DistributedDataParallel(network.config, config, module, disable_bucketing=is_one)
        _await_head(chunk)
        _gather_scalar_head_last(chunk)
        return chunk

    with parallel.active():
        network.become_trainable(wrap)


def _gather_scalar_head_last(chunk: DistributedDataParallel) -> None:
    """Have an fp32 head's weights gathered behind the 16-bit ones, where that overlaps.

    megatron starts with the last bucket of its list, whose parameters are read first; but the head
    has a bucket of its own behind all others, for its dtype, and is read last.
    """
    if chunk.use_forward_hook and len(chunk.buffers) > 1 and len(chunk.bucket_groups) > 1:
        *others, head = chunk.bucket_groups
        head.next_param_gather_bucket_group = None
        others[0].next_param_gather_bucket_group = head


def _await_head(chunk: DistributedDataParallel) -> None:
    """Have a last stage's head waited for before it is read, where weights are gathered meanwhile.

    megatron waits for the weights of a module when that is called. The head's are read without
    calling it (models/gpt.py), after the last norm; on a stage of its own they have their own
    bucket.
    """
    head = getattr(chunk.module, "output_layer", None)
    if head is None or not chunk.use_forward_hook:
        return
    wait = chunk._make_forward_pre_hook()
    decoder = chunk.module.decoder
    # Where norms come after what they read there is no final one.
    last_norm = decoder.final_layernorm or decoder.layers[-1].pre_mlp_layernorm
    last_norm.register_forward_pre_hook(lambda *_: wait(head))
