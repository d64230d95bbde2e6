"""Whether all ranks of a launch have been started alike: with the same settings and software.

A rank with another learning rate or file would train all of them into numbers that are no run's.
One of another run, which came to the same port, would write half of its checkpoints elsewhere.

A relative path means another place in another working directory, and is compared as the absolute
one that it becomes. An absolute path is compared as it was given: nodes may reach one file system
by unlike links and mounts, where all of them name the same path. Whether that is the same folder,
a run finds out once it has claimed it (engine/ranks/same_folder.py).
"""

import json
from collections.abc import Mapping
from pathlib import Path
from typing import Any

from engine.errors import UserError, named
from engine.process.software import code_digest, package_versions
from engine.ranks.silence import ranks_named
from engine.settings.saved import saved_fields

_SHOWN = 8  # characters of a digest; our choice
_MAX_FIELDS = 8  # named of one rank; our choice
_MAX_KINDS = 3  # of ranks that were started in other ways; our choice
_Fields = dict[str, Any]


def start_in_words(config: Any, world_size: int) -> str:
    """Return what a rank was started as, in JSON; config: a dataclass or a dictionary."""
    stage = type(config).__name__.removesuffix("Config").lower()
    code = code_digest()[: 2 * _SHOWN]
    launch = {"stage": stage, "world_size": world_size, "code": code, **package_versions()}
    settings, resolved = saved_fields(config), saved_fields(config, _absolute)
    places = {name: place for name, place in resolved.items() if place != settings[name]}
    return json.dumps({"launch": launch, "settings": settings, "places": places}, sort_keys=True)


def _absolute(path: Path) -> str:
    """Return where a path leads from here; raises UserError where here is no more."""
    try:
        return str(path.absolute())
    except OSError as error:
        raise UserError(f"the working directory: {error.strerror}; start in one that is") from None


def differences(mine: str, theirs: Mapping[str, list[int]]) -> str:
    """Return in words how ranks were started otherwise than the first; theirs: those ranks, by what
    start_in_words has given there."""
    kinds = list(theirs.items())
    lines = [
        f"{ranks_named(ranks)} {'were' if len(ranks) > 1 else 'was'} not started as rank 0 was: "
        f"{_difference(mine, text)}"
        for text, ranks in kinds[:_MAX_KINDS]
    ]
    if kinds[_MAX_KINDS:]:
        rest = [rank for _, ranks in kinds[_MAX_KINDS:] for rank in ranks]
        lines.append(f"nor {'were' if len(rest) > 1 else 'was'} {ranks_named(rest)}")
    if any(_elsewhere(mine, text) for text, _ in kinds):
        lines.append("a relative path is another place in another folder: start all ranks in one")
    lines.append("start all ranks of a run alike, and give each run a MASTER_PORT of its own")
    return "\n".join(lines)


def _difference(mine: str, theirs: str) -> str:
    (launch, settings, _), (other_launch, other_settings, _) = _parts(mine), _parts(theirs)
    found = _unequal(launch, other_launch)
    if found.keys() & {"stage", "code"}:  # whose settings may have other names
        shared = settings.keys() & other_settings.keys()
        settings = {name: settings[name] for name in settings if name in shared}
        other_settings = {name: other_settings[name] for name in settings}
    found |= _unequal(settings, other_settings) | _elsewhere(mine, theirs)
    words = [f"{name} {theirs}, not {ours}" for name, (ours, theirs) in found.items()]
    if len(words) > _MAX_FIELDS:
        words[_MAX_FIELDS:] = [f"and {len(words) - _MAX_FIELDS} more"]
    return "; ".join(words) or "it runs another version of this program"


def _elsewhere(mine: str, theirs: str) -> dict[str, tuple[str, str]]:
    """Return {name: both in words} of the relative paths that are alike and lead apart."""
    (_, settings, places), (_, other_settings, other_places) = _parts(mine), _parts(theirs)
    alike = {name for name in places if settings.get(name) == other_settings.get(name)}
    found = _unequal(places, other_places)
    return {name: words for name, words in found.items() if name in alike}


def _parts(text: str) -> tuple[_Fields, _Fields, _Fields]:
    """Return the launch, the settings and the places of a start, {} where somebody else wrote it
    or a version without them."""
    try:
        start = json.loads(text)
        return dict(start["launch"]), dict(start["settings"]), dict(start.get("places", {}))
    except (ValueError, TypeError, KeyError, RecursionError, AttributeError):
        return {}, {}, {}


def _unequal(ours: _Fields, theirs: _Fields) -> dict[str, tuple[str, str]]:
    """Return {name: both in words} of what differs; what is not there is None."""
    names = [*ours, *(name for name in theirs if name not in ours)]
    both = {name: (ours.get(name), theirs.get(name)) for name in names}
    return {name: (named(a), named(b)) for name, (a, b) in both.items() if a != b}
