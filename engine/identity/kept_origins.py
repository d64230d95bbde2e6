"""A run that begins with the settings of an earlier one, where what that started from is gone: the
earlier run has kept it. Imports no torch, as the command line asks."""

import os
from pathlib import Path
from typing import Any

from engine.errors import UserError
from engine.files import link_to_nothing
from engine.identity.made_from import RunConfig, networks_of
from engine.settings.command_line import as_options


def refuse_gone_origins(config: Any, saved: Any, run: Path) -> None:
    """Raise UserError, naming the option to give, where a network that a stage's config names is
    gone and `run` has a copy of it.

    saved: the settings of that run, which named the same path. A run that goes on reads its own
    copies. A config of another kind names no network.
    """
    if not isinstance(config, RunConfig):
        return
    if os.path.realpath(config.directory) == os.path.realpath(run):
        return
    earlier = networks_of(saved)
    for name, network in networks_of(config).items():
        if network.path.exists() or name not in earlier or earlier[name].path != network.path:
            continue
        kept = run / "sources" / earlier[name].kept_as
        if not kept.is_dir():
            continue
        given = as_options(config, {name: str(network.path)})
        instead = as_options(config, {name: str(kept)})
        why = link_to_nothing(network.path) or ": no such file or folder"
        raise UserError(f"{given}{why}; {run} has kept what was there: give {instead}")
