"""The process groups of a layout, megatron's and ours, built once a process."""

import datetime
from dataclasses import dataclass
from typing import Any

import torch
import torch.distributed as dist
from megatron.core import parallel_state

from engine.ranks.gloo_threads import keep_out_of_openmp
from engine.ranks.lone_rank import lone_groups
from engine.ranks.parallel import SHARED_STATE, Parallel, megatron_state
from engine.settings.layout import ParallelLayout

# What one collective may take before the ranks in it end: one of them is lost. Our choice, as
# megatron's, and no option, for what one rank does for the others is waited for elsewhere
# (said_by_first_rank).
TIMEOUT = datetime.timedelta(minutes=30)


@dataclass(frozen=True, kw_only=True)
class _Groups:
    """The process groups of a layout: megatron's global state, and what it does not make."""

    state: dict[str, Any]
    reply_group: dist.ProcessGroup


# By world and layout: stages that follow one another in a process share what is built.
_joined: dict[tuple[Any, ParallelLayout], _Groups] = {}


def place_in(layout: ParallelLayout, seed: int, device: torch.device) -> Parallel:
    """Return this rank's place in a layout, with megatron's groups built."""
    groups = _groups_of(layout)
    kept = megatron_state()
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
        kept = megatron_state()
        shared = {name: getattr(parallel_state, name) for name in SHARED_STATE}
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
        distributed_timeout_minutes=int(TIMEOUT.total_seconds()) // 60,
    )
    reply_group = parallel_state.get_pipeline_model_parallel_group()
    if layout.pp > 1:
        stride = dist.get_world_size() // layout.pp  # megatron deals ranks to stages in blocks
        for first in range(stride):  # every rank makes the groups of all pipelines
            group = dist.new_group(range(first, dist.get_world_size(), stride), timeout=TIMEOUT)
            if group is not dist.GroupMember.NON_GROUP_MEMBER:
                reply_group = group
    return _Groups(state=megatron_state(), reply_group=reply_group)


def _groups_in(groups: _Groups) -> list[dist.ProcessGroup]:
    """This rank's groups, each once, in the same order on all ranks."""
    found = [dist.group.WORLD, *groups.state.values(), groups.reply_group]
    return list(dict.fromkeys(g for g in found if isinstance(g, dist.ProcessGroup)))


def forget_groups() -> None:
    """Forget what was built: the ranks that it joined are gone."""
    _joined.clear()
