"""The command line of recipes/plan.py: a recipe, a cluster, and what to print.

Imports neither torch nor megatron.
"""

import dataclasses
import importlib.util
import os.path
import sys
from collections.abc import Sequence
from dataclasses import dataclass, field
from pathlib import Path
from typing import Annotated, Any

import tyro

from engine.errors import UserError, cut
from engine.files import MAX_SHOWN_PATH
from engine.planning.hardware import Assumptions, named_cluster
from engine.planning.plan import plan
from engine.planning.search import proposal_lines, search_layouts
from engine.planning.sizes import StageConfig, sizes_at
from engine.planning.workload import Workload
from engine.printable import ERROR_CHARACTERS, say
from engine.recipe import run_stage


@dataclass(frozen=True, kw_only=True)
class PlanOptions:
    """What to plan for. The options of the recipe itself come after these."""

    gpus: int = 64
    """Number of GPUs."""
    gpu: str = "h100"
    """Kind of GPU: a100, h100, h200, b200 or gb200 (engine/planning/hardware.py)."""
    dollars_per_hour: float | None = None
    """Price of a GPU hour; none: an assumption by kind."""
    search: bool = False
    """Propose layouts that fit, fastest first, instead of planning the recipe's own; --layout.cp
    stays as it is."""
    workload: Workload = field(default_factory=Workload)
    """Number and length of the examples; the paper's by default."""
    assumptions: Assumptions = field(default_factory=Assumptions)
    """What to count on beyond the datasheets."""


def plan_command(folder: Path, arguments: Sequence[str] | None = None) -> None:
    """Run `plan.py RECIPE [options]`; recipes are the files of `folder`, or any path."""
    words = list(sys.argv[1:] if arguments is None else arguments)
    options: list[tuple[str, Any, Any]] = [
        ("plan", Annotated[PlanOptions, tyro.conf.arg(name="")], PlanOptions())
    ]
    name = words.pop(0) if words and not words[0].startswith("-") else None

    def show(job: Any) -> None:
        if name is None:
            raise UserError(f"name a recipe first: {_names(folder)}")
        for line in _lines(job.plan, job.config):
            say(line)

    doc = f"Plan a stage: plan.py RECIPE [options], RECIPE being one of {_names(folder)}."
    try:
        if name is not None:
            config = load_recipe(folder, name)
            options.append(("config", Annotated[type(config), tyro.conf.arg(name="")], config))
            doc = (
                f"Plan {name}: memory of every GPU, seconds, PF-days, dollars; torch is not needed."
            )
    except UserError as error:
        say(f"error: {error}", stream=sys.stderr, limit=ERROR_CHARACTERS)
        sys.exit(2)
    fields = [(name, hint, field(default=default)) for name, hint, default in options]
    job_class = dataclasses.make_dataclass("PlanJob", fields, namespace={"__doc__": doc})
    run_stage(show, job_class(), words, has_dry_run=False)


def load_recipe(folder: Path, name: str) -> StageConfig:
    """Return the config of the recipe of that name, or of the file at that path; raises UserError
    where there is none."""
    path = Path(name) if name.endswith(".py") else folder / f"{name}.py"
    if not os.path.isfile(path):  # False for what can be no path
        raise UserError(
            f"no recipe {cut(name, MAX_SHOWN_PATH)!r}: give a path, or one of {_names(folder)}"
        )
    spec = importlib.util.spec_from_file_location(f"recipe_{path.stem}", path)
    assert spec is not None and spec.loader is not None
    module = importlib.util.module_from_spec(spec)
    spec.loader.exec_module(module)
    config = getattr(module, "config", None)
    if not isinstance(config, StageConfig):
        raise UserError(f"{path} has no `config` of a stage; give one of {_names(folder)}")
    return config


def _lines(options: PlanOptions, config: StageConfig) -> list[str]:
    cluster = named_cluster(
        options.gpu,
        options.gpus,
        dollars_per_hour=options.dollars_per_hour,
        assumptions=options.assumptions,
    )
    sizes = sizes_at(config)
    if options.search:
        found = search_layouts(config, cluster, options.workload, sizes)
        return [*sizes.lines(), *proposal_lines(found, config)]
    return plan(config, cluster, options.workload, sizes).lines()


def _names(folder: Path) -> str:
    """The recipes with a config, by their names."""
    stages = ("sft_", "init_", "rm_", "ppo_")
    return ", ".join(sorted(p.stem for p in folder.glob("*.py") if p.stem.startswith(stages)))
