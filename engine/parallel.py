"""How ranks share the work: a ParallelLayout from the configuration, a Parallel of this rank's
groups at run time."""

import contextlib
import datetime
import os
from collections.abc import Iterator
from dataclasses import dataclass

import torch
import torch.distributed as dist
from megatron.core import parallel_state, tensor_parallel

from engine.device import communication_backend, start_device
from engine.settings.layout import ParallelLayout

# The layout whose groups megatron's global state holds, and its reply group.
_built: "tuple[ParallelLayout, dist.ProcessGroup] | None" = None


@dataclass(frozen=True, kw_only=True)
class Parallel:
    """This rank's place among the ranks, and the groups it talks in."""

    layout: ParallelLayout
    device: torch.device
    seed: int
    rank: int
    world_size: int
    dp: int
    tp_rank: int
    pp_rank: int
    dp_rank: int
    tp_group: dist.ProcessGroup
    pp_group: dist.ProcessGroup
    dp_group: dist.ProcessGroup
    reply_group: dist.ProcessGroup
    """The ranks of pp_group again, for messages that wait for none of those there."""

    @property
    def is_writer(self) -> bool:
        """Whether this rank writes logs and files that are not sharded."""
        return self.rank == 0

    @property
    def is_first_stage(self) -> bool:
        """Whether this rank holds the embedding."""
        return self.pp_rank == 0

    @property
    def is_last_stage(self) -> bool:
        """Whether this rank holds the head, and so computes losses."""
        return self.pp_rank == self.layout.pp - 1

    @property
    def last_stage_rank(self) -> int:
        """The global rank of this pipeline's last stage: the source of what only it computes."""
        return parallel_state.get_pipeline_model_parallel_last_rank()


def rank_of_environment() -> int:
    """Return this process's global rank from torchrun's or srun's environment; 0 when launched
    alone."""
    return int(os.environ.get("RANK", os.environ.get("SLURM_PROCID", "0")))


def start_parallel(layout: ParallelLayout, seed: int, *, timeout_minutes: int = 30) -> Parallel:
    """Join the other ranks, build the process groups and seed this rank's generators.

    The ranks come from torchrun (RANK, WORLD_SIZE) or srun (SLURM_PROCID, SLURM_NTASKS with
    MASTER_ADDR); a process started by neither is a world of one. A second call in one process
    reuses the world.
    """
    device = start_device()
    rank = rank_of_environment()
    world_size = int(os.environ.get("WORLD_SIZE", os.environ.get("SLURM_NTASKS", "1")))
    layout.dp(world_size)  # or UserError, before any rank waits for another
    if not dist.is_initialized():
        os.environ.setdefault("MASTER_ADDR", "127.0.0.1")
        store = dist.HashStore() if world_size == 1 else None
        dist.init_process_group(
            communication_backend(device),
            store=store,
            rank=rank,
            world_size=world_size,
            timeout=datetime.timedelta(minutes=timeout_minutes),
            device_id=device if device.type == "cuda" else None,
        )
    return _join(layout, seed, device)


@contextlib.contextmanager
def other_layout(parallel: Parallel, layout: ParallelLayout) -> Iterator[Parallel]:
    """Build networks of another layout on the same ranks: yield this rank's place in that layout.

    Within the block megatron's global state is the other layout's, and modules built there keep its
    groups. All ranks enter together.
    """
    layout.dp(parallel.world_size)  # or UserError
    global _built
    kept_built = _built
    kept = {name: value for name, value in vars(parallel_state).items() if name[1:].isupper()}
    try:
        yield _join(layout, parallel.seed, parallel.device)
    finally:
        vars(parallel_state).update(kept)
        _built = kept_built
        seed_for_initialisation(parallel)


def _join(layout: ParallelLayout, seed: int, device: torch.device) -> Parallel:
    """Return this rank's place in a layout, with megatron's groups built and generators seeded."""
    reply_group = _build_groups(layout)
    parallel = Parallel(
        layout=layout,
        device=device,
        seed=seed,
        rank=dist.get_rank(),
        world_size=dist.get_world_size(),
        dp=layout.dp(dist.get_world_size()),
        tp_rank=parallel_state.get_tensor_model_parallel_rank(),
        pp_rank=parallel_state.get_pipeline_model_parallel_rank(),
        dp_rank=parallel_state.get_data_parallel_rank(),
        tp_group=parallel_state.get_tensor_model_parallel_group(),
        pp_group=parallel_state.get_pipeline_model_parallel_group(),
        dp_group=parallel_state.get_data_parallel_group(),
        reply_group=reply_group,
    )
    seed_for_initialisation(parallel)
    return parallel


def _build_groups(layout: ParallelLayout) -> dist.ProcessGroup:
    """Build megatron's process groups, and return the group for replies in this rank's pipeline.

    Stages that follow one another in a process keep those they have.
    """
    global _built
    if parallel_state.model_parallel_is_initialized():
        if _built is not None and _built[0] == layout:
            return _built[1]
        parallel_state.destroy_model_parallel()
    parallel_state.initialize_model_parallel(
        tensor_model_parallel_size=layout.tp,
        pipeline_model_parallel_size=layout.pp,
        virtual_pipeline_model_parallel_size=layout.virtual_pp if layout.virtual_pp > 1 else None,
        context_parallel_size=layout.cp,
        create_gloo_process_groups=False,
    )
    reply_group = parallel_state.get_pipeline_model_parallel_group()
    if layout.pp > 1:
        stride = dist.get_world_size() // layout.pp  # megatron deals ranks to stages in blocks
        for first in range(stride):  # every rank makes the groups of all pipelines
            group = dist.new_group(range(first, dist.get_world_size(), stride))
            if group is not dist.GroupMember.NON_GROUP_MEMBER:
                reply_group = group
    _built = layout, reply_group
    return reply_group


def seed_for_initialisation(parallel: Parallel) -> None:
    """Seed the generators alike on all data-parallel ranks, so that they draw the same initial
    weights."""
    _seed(parallel.seed + 1_009 * parallel.pp_rank)


def seed_for_head(parallel: Parallel) -> None:
    """Seed the generators alike on every rank and in every layout, to draw a scalar head: it is
    what a checkpoint of a language model leaves open in a reward model."""
    _seed(parallel.seed + 50_021)


def seed_for_step(parallel: Parallel, step: int) -> None:
    """Seed dropout from (seed, step, pipeline stage, data-parallel rank), at the start of an
    optimizer step.

    A resumed run so draws what an undisturbed one would, and checkpoints hold no generator state.
    tp ranks differ inside tensor-parallel regions only, as megatron wants it.
    """
    _seed(parallel.seed + 100_003 * (step + 1) + 1_009 * parallel.pp_rank + 101 * parallel.dp_rank)


def _seed(key: int) -> None:
    torch.manual_seed(key)
    tensor_parallel.model_parallel_cuda_manual_seed(key, force_reset_rng=True)
