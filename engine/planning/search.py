"""Layouts that fit a cluster, fastest first. Imports neither torch nor megatron."""

import dataclasses
import itertools
from collections.abc import Iterable, Iterator
from typing import Any, Literal, TypeVar

from engine.errors import UserError
from engine.planning.hardware import GIGA, Cluster
from engine.planning.plan import Plan, plan
from engine.planning.sizes import Sizes, StageConfig, named_sizes
from engine.planning.workload import Workload
from engine.settings.layout import ParallelLayout
from engine.settings.ppo import PPOConfig
from models.sizes import GPTSize

AnyStage = TypeVar("AnyStage", bound=StageConfig)

MOST_TP = 8  # within one NVLink domain, and a head for everyone
VIRTUAL = (1, 2, 3, 4, 6)
BUDGETS = (1, 2, 4)  # micro_batch_tokens that are tried, in contexts
RECOMPUTE: tuple[Literal["none", "full"], ...] = ("none", "full")
NUM_FINALISTS = 4  # layouts of the policy for which the critic's are searched


def search_layouts(
    config: StageConfig,
    cluster: Cluster,
    workload: Workload | None = None,
    sizes: Sizes | None = None,
) -> list[Plan]:
    """Return the plans that fit, fastest first; workload and sizes as plan() takes them.

    Tried are tp, pp, virtual stages, recomputation and micro_batch_tokens; the critic's layout
    too, where the config gives it one of its own. Context parallelism stays as the config has it.
    """
    sizes = sizes or named_sizes(config)
    if not isinstance(config, PPOConfig) or config.critic_layout is None:
        return _fitting(_variants(config, cluster, sizes), cluster, workload, sizes)
    critic_layouts = _critic_layouts(config, config.critic_layout.cp, cluster, sizes)
    if not critic_layouts:
        return _fitting(_variants(config, cluster, sizes), cluster, workload, sizes)
    return _search_both(config, critic_layouts, cluster, workload, sizes)


def _search_both(
    config: PPOConfig,
    critic_layouts: list[ParallelLayout],
    cluster: Cluster,
    workload: Workload | None,
    sizes: Sizes,
) -> list[Plan]:
    """Return the best plans of the policy's best layouts, each with the critic's best beside it."""
    # The policy's are searched beside a fast critic, and beside the one that takes least room.
    fast = min(critic_layouts, key=lambda layout: (layout.pp, -layout.tp))
    small = max(critic_layouts, key=lambda layout: (layout.tp * layout.pp, layout.tp))
    tried: list[PPOConfig] = []
    for critic_layout in (fast, small):
        beside = dataclasses.replace(config, critic_layout=critic_layout)
        tried += _variants(beside, cluster, sizes)
    policies: dict[PPOConfig, None] = {}  # each once, fastest first
    for found in _fitting(tried, cluster, workload, sizes):
        assert isinstance(found.config, PPOConfig)
        policies[dataclasses.replace(found.config, critic_layout=None)] = None
    best: list[Plan] = []
    for policy in list(policies)[:NUM_FINALISTS]:
        pairs = [dataclasses.replace(policy, critic_layout=layout) for layout in critic_layouts]
        best += _fitting(pairs, cluster, workload, sizes)[:1]
    return sorted(best, key=_seconds_and_bytes)


def _variants(config: AnyStage, cluster: Cluster, sizes: Sizes) -> list[AnyStage]:
    """Return the config with every layout, budget and recomputation that is tried."""
    size = sizes.trained
    return [
        dataclasses.replace(
            config,
            layout=layout,
            micro_batch_tokens=contexts * size.context_length,
            numerics=dataclasses.replace(config.numerics, recompute=recompute),
        )
        for layout, contexts, recompute in itertools.product(
            _layouts(size, cluster, config.layout.cp), BUDGETS, RECOMPUTE
        )
    ]


def _critic_layouts(
    config: PPOConfig, cp: int, cluster: Cluster, sizes: Sizes
) -> list[ParallelLayout]:
    """Return the layouts without virtual stages that hold the critic and share minibatches."""
    assert sizes.reward_model is not None
    return [
        layout
        for layout in _layouts(sizes.reward_model.size, cluster, cp)
        if layout.virtual_pp == 1 and config.minibatch_size % layout.dp(cluster.num_gpus) == 0
    ]


def proposal_lines(plans: list[Plan], default: StageConfig, count: int = 8) -> list[str]:
    """Return the first plans as a table: seconds of a step, memory, and the options that turn the
    recipe `default` into them."""
    if not plans:
        can_park = isinstance(default, PPOConfig)
        parked = ", or --residency.optimizer host and the like" if can_park else ""
        return [f"no layout fits: take more or larger GPUs{parked}"]
    step = plans[0].estimate.step_name
    lines = [f"{'s/' + step:>12}{'GB':>8}{'MFU':>6}{'dollars':>12}   options"]
    for found in plans[:count]:
        options = " ".join(_options(found.config, default)) or "(as the recipe has it)"
        lines.append(
            f"{found.step_seconds:12.3g}{found.fullest.peak_bytes / GIGA:8.1f}{found.mfu:6.0%}"
            f"{found.dollars:12,.0f}   {options}"
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


def _fitting(
    configs: Iterable[StageConfig], cluster: Cluster, workload: Workload | None, sizes: Sizes
) -> list[Plan]:
    """Return the plans of the configs that fit, fastest first."""
    found = []
    for config in configs:
        if not _deals_evenly(config, cluster):
            continue
        try:
            planned = plan(config, cluster, workload, sizes)
        except UserError:
            continue
        if planned.fits:
            found.append(planned)
    return sorted(found, key=_seconds_and_bytes)


def _seconds_and_bytes(planned: Plan) -> tuple[float, int]:
    return planned.step_seconds, planned.fullest.peak_bytes


def _deals_evenly(config: StageConfig, cluster: Cluster) -> bool:
    """Whether every data-parallel rank has as many examples of a batch as the others."""
    num_gpus = cluster.num_gpus
    if not isinstance(config, PPOConfig):
        return config.batch_size % config.layout.dp(num_gpus) == 0
    layouts = [config.layout, config.critic_layout or config.layout]
    return all(
        num_gpus % layout.num_model_ranks == 0 and config.minibatch_size % layout.dp(num_gpus) == 0
        for layout in layouts
    )
