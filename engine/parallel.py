"""How ranks share the work: a ParallelLayout from the configuration, a Parallel of this rank's
groups at run time."""

import contextlib
import datetime
import itertools
import json
import os
from collections.abc import Callable, Iterator
from dataclasses import dataclass, field
from typing import Any

import torch
import torch.distributed as dist
from megatron.core import parallel_state, tensor_parallel

from engine import failure
from engine.config import UserError
from engine.device import communication_backend, meta_device, start_device
from engine.environment import rank_of_environment, world_size_of_environment
from engine.gloo_threads import keep_out_of_openmp
from engine.lone_rank import LONE, lone_groups
from engine.settings.layout import ParallelLayout

# megatron's memory for gathered activations: one, whatever the layout.
_SHARED = ("_GLOBAL_MEMORY_BUFFER", "_GLOBAL_SYMMETRIC_MEMORY_BUFFER")


# What one collective may take before the ranks in it end: one of them is lost. Our choice, as
# megatron's, and no option, for what one rank does for the others is waited for elsewhere
# (said_by_first_rank).
_TIMEOUT = datetime.timedelta(minutes=30)
_LONGEST_WAIT = datetime.timedelta(days=7)
_said = itertools.count()  # what the first rank has said so far, the same number on every rank


@dataclass(frozen=True, kw_only=True)
class _Groups:
    """The process groups of a layout: megatron's global state, and what it does not make."""

    state: dict[str, Any]
    reply_group: dist.ProcessGroup


# By world and layout: stages that follow one another in a process share what is built.
_joined: dict[tuple[Any, ParallelLayout], _Groups] = {}


@dataclass(frozen=True, kw_only=True)
class Parallel:
    """This rank's place among the ranks in one layout, and the groups it talks in there."""

    layout: ParallelLayout
    device: torch.device
    seed: int
    rank: int
    world_size: int
    dp: int
    tp_rank: int
    pp_rank: int
    dp_rank: int
    cp_rank: int
    tp_group: dist.ProcessGroup
    pp_group: dist.ProcessGroup
    dp_group: dist.ProcessGroup
    """The ranks that hold the same part of the model and of every row."""
    cp_group: dist.ProcessGroup
    replica_group: dist.ProcessGroup
    """The ranks that hold the same part of the model, dp and cp together: they reduce gradients and
    share the optimizer's state."""
    reply_group: dist.ProcessGroup
    """The ranks of pp_group again, for messages that wait for none of those there."""
    last_stage_rank: int
    """The global rank of this pipeline's last stage: the source of what only it computes."""
    state: dict[str, Any] = field(repr=False, compare=False)
    """The global variables that megatron finds its groups in."""

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
    def num_replicas(self) -> int:
        """Copies of the model: dp x cp."""
        return self.dp * self.layout.cp

    @property
    def replica_rank(self) -> int:
        """Which of them this rank is a part of."""
        return self.dp_rank * self.layout.cp + self.cp_rank

    @contextlib.contextmanager
    def active(self) -> Iterator[None]:
        """Run a block in which megatron sees this layout's groups.

        megatron looks its groups up in global variables, so whatever calls it on a network does so
        in a block of that network's layout. Blocks nest; all ranks of the layout enter together.
        """
        kept = _megatron_state()
        vars(parallel_state).update(self.state)
        try:
            yield
        finally:
            vars(parallel_state).update(kept)


def open_store(timeout: datetime.timedelta) -> dist.Store:
    """Return the store through which this launch's ranks meet, at MASTER_ADDR:MASTER_PORT, without
    waiting for them.

    Rank 0 opens it where torchrun has not. Raises dist.DistError when nothing answers there.
    """
    is_torchruns = os.environ.get("TORCHELASTIC_USE_AGENT_STORE") == "True"
    return dist.TCPStore(
        os.environ.get("MASTER_ADDR", "127.0.0.1"),
        int(os.environ.get("MASTER_PORT", "29500")),
        is_master=rank_of_environment() == 0 and not is_torchruns,
        timeout=timeout,
        wait_for_workers=False,
    )


def start_parallel(layout: ParallelLayout, seed: int) -> Parallel:
    """Join the other ranks, build the process groups and seed this rank's generators.

    The ranks come from torchrun (RANK, WORLD_SIZE) or srun (SLURM_PROCID, SLURM_STEP_NUM_TASKS;
    MASTER_ADDR and MASTER_PORT are recipes/slurm/launch.sh's); a process started by neither is a
    world of one. A second call in one process reuses the world.
    """
    device = start_device()
    rank = rank_of_environment()
    world_size = world_size_of_environment()
    layout.dp(world_size)  # or UserError, before any rank waits for another
    if not dist.is_initialized():
        os.environ.setdefault("MASTER_ADDR", "127.0.0.1")
        store = dist.HashStore() if world_size == 1 else None
        # No device_id: with it every group is split off the world by all ranks at once, whether
        # anyone uses it or not, and megatron makes 3,200 groups for tp 8 x pp 16 on 1,024 ranks.
        # And a pipeline's messages, which have a communicator for each pair of ranks and group,
        # would share one with all else of a group and run one after the other.
        dist.init_process_group(
            communication_backend(device) if world_size > 1 else LONE,
            store=store,
            rank=rank,
            world_size=world_size,
            timeout=_TIMEOUT,
        )
        if world_size > 1:
            failure.listen()
    parallel = _join(layout, seed, device)
    vars(parallel_state).update(parallel.state)
    seed_for_initialisation(parallel)
    return parallel


def rearranged(parallel: Parallel, layout: ParallelLayout) -> Parallel:
    """Return this rank's place when the same ranks are laid out in another way; all call together.

    Networks of both layouts live side by side. The layout that was current stays so.
    """
    layout.dp(parallel.world_size)  # or UserError
    return _join(layout, parallel.seed, parallel.device)


def said_by_first_rank(say: Callable[[], str]) -> str:
    """Return what `say` returns on rank 0, where alone it is called; all ranks call together.

    So is whatever one looks up on a file system, which may show each rank another state. The others
    wait through the store, and as long as it takes: a collective that waits ends the run after its
    timeout. A UserError on rank 0 is raised on all, another exception is a RuntimeError there, and
    where rank 0 leaves (a signal has asked it to), all leave. A process that has joined no ranks is
    its own first.
    """
    if not dist.is_initialized():
        return say()
    key = f"said_by_first_rank/{next(_said)}"
    store = dist.distributed_c10d._get_default_store()
    if dist.get_rank() > 0:
        store.wait([key], _LONGEST_WAIT)
        answer = json.loads(store.get(key))
        if store.add(f"{key}/readers", 1) == dist.get_world_size() - 1:
            store.set(f"{key}/read", "")
        if "error" in answer:
            raise UserError(answer["error"])
        if "failure" in answer:
            failure.wait_for_end()  # whose error on screen shall be rank 0's own
            raise RuntimeError(f"rank 0 failed: {answer['failure']}")
        if "status" in answer:
            raise SystemExit(answer["status"])
        return answer["text"]
    try:
        text = say()
    except UserError as error:
        _say_and_go(store, key, {"error": str(error)})
        raise
    except SystemExit as leaving:
        _say_and_go(store, key, {"status": leaving.code})
        raise
    except BaseException as error:
        _say_and_go(store, key, {"failure": repr(error)})
        raise
    store.set(key, json.dumps({"text": text}))
    return text


def _say_and_go(store: dist.Store, key: str, answer: dict[str, Any]) -> None:
    """Set an answer and wait until all have read it: the store may go with this process."""
    store.set(key, json.dumps(answer))
    if dist.get_world_size() > 1:
        with contextlib.suppress(dist.DistStoreError):  # a rank is lost
            store.wait([f"{key}/read"], datetime.timedelta(minutes=1))


@contextlib.contextmanager
def pretended_rank(
    layout: ParallelLayout, *, world_size: int, tp_rank: int, pp_rank: int
) -> Iterator[Parallel]:
    """Be one rank of `world_size` that are not there, of the first data-parallel replica: networks
    built within the block lie on the meta device, with the groups they would have.

    torch's fake backend joins at once and its collectives do nothing. Raises RuntimeError where
    this process has joined real ranks.
    """
    from torch.testing._internal.distributed.fake_pg import FakeStore  # registers the backend

    if dist.is_initialized():
        raise RuntimeError("this process is a rank of a real world")
    layout.dp(world_size)  # or UserError
    # megatron deals ranks to tp first, then to dp, then to pp.
    rank = tp_rank + pp_rank * (world_size // layout.pp)
    with meta_device() as device:
        dist.init_process_group("fake", store=FakeStore(), rank=rank, world_size=world_size)
        try:
            parallel = _join(layout, 0, device)
            with parallel.active():
                yield parallel
        finally:
            end_parallel()


def end_parallel() -> None:
    """Leave the other ranks and forget the groups, where this process has joined any."""
    _joined.clear()
    failure.part()
    if dist.is_initialized():
        parallel_state.destroy_model_parallel()
        dist.destroy_process_group()


def _join(layout: ParallelLayout, seed: int, device: torch.device) -> Parallel:
    """Return this rank's place in a layout, with megatron's groups built."""
    groups = _groups_of(layout)
    kept = _megatron_state()
    vars(parallel_state).update(groups.state)
    try:
        return Parallel(
            layout=layout,
            device=device,
            seed=seed,
            rank=dist.get_rank(),
            world_size=dist.get_world_size(),
            dp=layout.dp(dist.get_world_size()),
            tp_rank=parallel_state.get_tensor_model_parallel_rank(),
            pp_rank=parallel_state.get_pipeline_model_parallel_rank(),
            dp_rank=parallel_state.get_data_parallel_rank(),
            cp_rank=parallel_state.get_context_parallel_rank(),
            tp_group=parallel_state.get_tensor_model_parallel_group(),
            pp_group=parallel_state.get_pipeline_model_parallel_group(),
            dp_group=parallel_state.get_data_parallel_group(),
            cp_group=parallel_state.get_context_parallel_group(),
            replica_group=parallel_state.get_data_parallel_group(with_context_parallel=True),
            reply_group=groups.reply_group,
            last_stage_rank=parallel_state.get_pipeline_model_parallel_last_rank(),
            state=groups.state,
        )
    finally:
        vars(parallel_state).update(kept)


def _groups_of(layout: ParallelLayout) -> _Groups:
    """Return the groups of a layout in this world, built when it is first asked for."""
    key = (dist.group.WORLD, layout)
    if key not in _joined:
        kept = _megatron_state()
        shared = {name: getattr(parallel_state, name) for name in _SHARED}
        parallel_state.destroy_model_parallel()  # megatron builds groups only where it has none
        try:
            with lone_groups():
                _joined[key] = _build_groups(layout)
            keep_out_of_openmp(_groups_in(_joined[key]))
        finally:
            kept |= {name: value for name, value in shared.items() if value is not None}
            vars(parallel_state).update(kept)
    return _joined[key]


def _build_groups(layout: ParallelLayout) -> _Groups:
    parallel_state.initialize_model_parallel(
        tensor_model_parallel_size=layout.tp,
        pipeline_model_parallel_size=layout.pp,
        virtual_pipeline_model_parallel_size=layout.virtual_pp if layout.virtual_pp > 1 else None,
        context_parallel_size=layout.cp,
        create_gloo_process_groups=False,
        distributed_timeout_minutes=int(_TIMEOUT.total_seconds()) // 60,
    )
    reply_group = parallel_state.get_pipeline_model_parallel_group()
    if layout.pp > 1:
        stride = dist.get_world_size() // layout.pp  # megatron deals ranks to stages in blocks
        for first in range(stride):  # every rank makes the groups of all pipelines
            group = dist.new_group(range(first, dist.get_world_size(), stride), timeout=_TIMEOUT)
            if group is not dist.GroupMember.NON_GROUP_MEMBER:
                reply_group = group
    return _Groups(state=_megatron_state(), reply_group=reply_group)


def _groups_in(groups: _Groups) -> list[dist.ProcessGroup]:
    """This rank's groups, each once, in the same order on all ranks."""
    found = [dist.group.WORLD, *groups.state.values(), groups.reply_group]
    return list(dict.fromkeys(g for g in found if isinstance(g, dist.ProcessGroup)))


def _megatron_state() -> dict[str, Any]:
    """megatron's global variables that depend on the layout."""
    return {
        name: value
        for name, value in vars(parallel_state).items()
        if name[1:].isupper() and name not in _SHARED
    }


def seed_for_initialisation(parallel: Parallel) -> None:
    """Seed the generators alike on all data-parallel ranks, so that they draw the same initial
    weights."""
    _seed(parallel, parallel.seed + 1_009 * parallel.pp_rank)


def seed_for_head(parallel: Parallel) -> None:
    """Seed the generators alike on every rank and in every layout, to draw a scalar head: it is
    what a checkpoint of a language model leaves open in a reward model."""
    _seed(parallel, parallel.seed + 50_021)


def seed_for_step(parallel: Parallel, step: int) -> None:
    """Seed dropout from (seed, step, pipeline stage, replica), at the start of an optimizer step.

    A resumed run so draws what an undisturbed one would, and checkpoints hold no generator state.
    tp ranks differ inside tensor-parallel regions only, as megatron wants it.
    """
    place = 1_009 * parallel.pp_rank + 101 * parallel.replica_rank
    _seed(parallel, parallel.seed + 100_003 * (step + 1) + place)


def _seed(parallel: Parallel, key: int) -> None:
    torch.manual_seed(key)
    with parallel.active():
        tensor_parallel.model_parallel_cuda_manual_seed(key, force_reset_rng=True)
