"""Layouts that fit a cluster, fastest first. Imports neither torch nor megatron."""

import dataclasses
import itertools
from collections.abc import Callable, Iterable, Iterator
from typing import Any

from engine.errors import UserError
from engine.planning.hardware import GIGA, Cluster
from engine.settings.layout import ParallelLayout
from engine.settings.ppo import PPOConfig
from engine.settings.size import named_size
from models.sizes import GPTSize

MOST_TP = 8  # within one NVLink domain, and a head for everyone
VIRTUAL = (1, 2, 3, 4, 6)
BUDGETS = (1, 2, 4)  # micro_batch_tokens that are tried, in contexts
NUM_FINALISTS = 4  # layouts of the policy for which the critic's are searched

MakePlan = Callable[[Any], Any]
"""A config to its plan (engine/planning/plan.py)."""


def search_layouts(config: Any, cluster: Cluster, make_plan: MakePlan) -> list[Any]:
    """Return the plans that fit, fastest first: over tp, pp, virtual stages, recomputation and
    micro_batch_tokens, and over the critic's layout where the config gives it one of its own.
    Context parallelism stays as the config has it."""
    size = named_size(config.size)
    starts, critic_layouts = [config], []
    if isinstance(config, PPOConfig) and config.critic_layout is not None:
        critic_size = named_size(config.reward_model_size)
        critic_layouts = [
            layout
            for layout in _layouts(critic_size, cluster, config.critic_layout.cp)
            if layout.virtual_pp == 1 and config.minibatch_size % layout.dp(cluster.num_gpus) == 0
        ]
    if critic_layouts:
        # The policy's are searched beside a fast critic, and beside the one that takes least room.
        fast = min(critic_layouts, key=lambda x: (x.pp, -x.tp))
        small = max(critic_layouts, key=lambda x: (x.tp * x.pp, x.tp))
        starts = [dataclasses.replace(config, critic_layout=x) for x in (fast, small)]
    tried = [
        dataclasses.replace(
            start,
            layout=layout,
            micro_batch_tokens=contexts * size.context_length,
            numerics=dataclasses.replace(config.numerics, recompute=recompute),
        )
        for start, layout, contexts, recompute in itertools.product(
            starts, _layouts(size, cluster, config.layout.cp), BUDGETS, ("none", "full")
        )
    ]
    found = _fitting(tried, cluster, make_plan)
    if not critic_layouts:
        return found
    best = []
    policies = dict.fromkeys(dataclasses.replace(p.config, critic_layout=None) for p in found)
    for finalist in list(policies)[:NUM_FINALISTS]:
        tried = [dataclasses.replace(finalist, critic_layout=x) for x in critic_layouts]
        best += _fitting(tried, cluster, make_plan)[:1]
    return sorted(best, key=_rank)


def proposal_lines(plans: list[Any], default: Any, count: int = 8) -> list[str]:
    """Return the first plans as a table: seconds of a step, memory, and the options that turn the
    recipe `default` into them."""
    if not plans:
        return ["no layout fits: take more or larger GPUs, or let --residency park more"]
    step = plans[0].estimate.step_name
    lines = [f"{'s/' + step:>12}{'GB':>8}{'MFU':>6}{'dollars':>12}   options"]
    for plan in plans[:count]:
        options = " ".join(_options(plan.config, default)) or "(as the recipe has it)"
        lines.append(
            f"{plan.step_seconds:12.3g}{plan.fullest.peak_bytes / GIGA:8.1f}{plan.mfu:6.0%}"
            f"{plan.dollars:12,.0f}   {options}"
        )
    return lines


def _options(config: Any, default: Any, prefix: str = "") -> Iterator[str]:
    """Yield the options of the fields in which a config differs from the recipe's."""
    for field in dataclasses.fields(config):
        value, before = getattr(config, field.name), getattr(default, field.name)
        name = prefix + field.name.replace("_", "-")
        if dataclasses.is_dataclass(value) and dataclasses.is_dataclass(before):
            yield from _options(value, before, f"{name}.")
        elif value == before:
            continue
        elif isinstance(value, bool):
            yield f"--{name}" if value else f"--{prefix}no-{name.removeprefix(prefix)}"
        else:
            yield f"--{name} {value}"


def _layouts(size: GPTSize, cluster: Cluster, cp: int) -> Iterator[ParallelLayout]:
    """Yield the layouts of that cp that divide the cluster and hold a model of that size."""
    degrees = itertools.product((1, 2, 4, MOST_TP), range(1, size.num_layers + 1), VIRTUAL)
    for tp, pp, virtual_pp in degrees:
        layout = ParallelLayout(
            tp=tp, pp=pp, virtual_pp=virtual_pp, cp=cp, sequence_parallel=tp > 1
        )
        try:
            layout.check(size)
            layout.dp(cluster.num_gpus)
        except UserError:
            continue
        yield layout


def _fitting(configs: Iterable[Any], cluster: Cluster, make_plan: MakePlan) -> list[Any]:
    plans = []
    for config in configs:
        if not _deals_evenly(config, cluster):
            continue
        try:
            plan = make_plan(config)
        except UserError:
            continue
        if plan.fits:
            plans.append(plan)
    return sorted(plans, key=_rank)


def _rank(plan: Any) -> tuple[float, int]:
    return plan.step_seconds, plan.fullest.peak_bytes


def _deals_evenly(config: Any, cluster: Cluster) -> bool:
    """Whether every data-parallel rank has as many examples of a batch as the others."""
    is_ppo = isinstance(config, PPOConfig)
    batch = config.minibatch_size if is_ppo else config.batch_size
    layouts = [config.layout, config.critic_layout if is_ppo else None]
    return all(batch % layout.dp(cluster.num_gpus) == 0 for layout in layouts if layout)
