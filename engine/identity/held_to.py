"""What a run that has begun is held to: its identity.json, or a checkpoint's copy of that, and its
settings; and whether those that its folder has are of one run."""

import os
from dataclasses import dataclass, replace
from pathlib import Path

from engine.checkpoints.whole import warn
from engine.errors import UserError
from engine.identity.made_from import (
    UNCHANGING,
    RunConfig,
    files_of,
    names_of,
    networks_of,
    stage_of,
)
from engine.identity.record import (
    IDENTITY,
    Change,
    Identity,
    disagreements,
    read_identity,
    saved_identity,
)
from engine.run import Changed, Run, settings_among
from engine.settings.saved import saved_fields

_UNHELD = "nothing holds this run to the settings that it began with; those given are taken"


@dataclass(frozen=True, kw_only=True)
class HeldTo:
    """What the folder of a run that has begun says of it."""

    identity: Identity | None
    """None of a run of before identities."""
    settings: Changed
    """Those that the run may not change, and which are given otherwise."""
    known: tuple[str, ...]
    """The options whose paths are no settings: the run knows by content what each held, or reads
    none of them, then and now."""


def held_to(run: Run, config: RunConfig) -> HeldTo:
    """Return what a run that has begun is held to, on the rank that asks; say what of it is gone.

    Raises UserError for a file that is no such one, or where it is another stage's run.
    """
    identity = read_identity(run.directory) or _recalled(run.directory)
    if not os.path.lexists(run.directory / "config.json"):
        warn(f"{run.directory / 'config.json'} is gone: {_UNHELD}")
    before, now = identity and identity.stage, stage_of(config)
    if before not in (None, "", now):
        raise UserError(
            f"{run.directory} is a run of {before}, and not of {now}; give another --directory"
        )
    changed = run.saved_changes(config)
    if identity is None:
        return HeldTo(identity=None, settings=settings_among(changed), known=())
    known = _known_names(identity, config)
    return HeldTo(
        identity=_with_paths(identity, config, changed),
        settings=settings_among(changed, known),
        known=known,
    )


def at_odds(directory: Path, identity: Identity) -> tuple[str, Identity | None, list[Change]]:
    """Return in words what a run's identity and its checkpoint's copy say otherwise, "" where they
    say the same; that copy, None where it has none; and what they say otherwise."""
    saved = saved_identity(directory)
    if saved is None:
        return "", None, []
    found = disagreements(saved[0], identity)
    return odds_in_words(directory, saved[1], found), saved[0], found


def odds_in_words(directory: Path, checkpoint: Path, found: list[Change]) -> str:
    """Return what a run's identity.json and a checkpoint's say otherwise, with the way out of it;
    "" where they say the same."""
    if not found:
        return ""
    said = "; ".join(f"{change.name} {change.old}, not {change.new}" for change in found)
    return (
        f"{checkpoint / IDENTITY} says {said}, as {directory / IDENTITY} does: one of them was "
        "changed, or is another run's. Put back that which is not this run's; or, if the "
        f"checkpoint is, remove {directory / IDENTITY}: it is taken from there then"
    )


def _known_names(identity: Identity, config: RunConfig) -> tuple[str, ...]:
    then = identity.networks.keys() | identity.data.keys()
    now = {*networks_of(config), *files_of(config)}
    names = names_of(type(config))
    return tuple(n for n in names if n not in UNCHANGING or (n in then) == (n in now))


def _recalled(directory: Path) -> Identity | None:
    """Return the identity that a run's checkpoints have, None of before identities; say that its
    own is gone."""
    gone, known = f"{directory / IDENTITY} is gone", saved_identity(directory)
    if known is None:
        warn(
            f"{gone}: nobody knows what this run was made from; it is written anew, of what is "
            "here now"
        )
        return None
    warn(f"{gone}: it is taken from {known[1]}")
    return known[0]


def _with_paths(identity: Identity, config: RunConfig, changed: Changed) -> Identity:
    """Return an identity with the paths of networks that the run's settings have, where it has none
    itself, as that of a checkpoint."""
    then = saved_fields(config) | {name: saved for name, (saved, _) in changed.items()}
    then["reference"] = then.get("reference") or then.get("policy")
    networks = {
        name: network if network.path else replace(network, path=then.get(name) or "")
        for name, network in identity.networks.items()
    }
    return replace(identity, networks=networks)
