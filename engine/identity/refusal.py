"""All that keeps a run from going on, in one error, and the options by which it does."""

from collections.abc import Collection, Sequence
from typing import Any

from engine.errors import cut
from engine.files import MAX_SHOWN_PATH
from engine.identity.made_from import UNCHANGING
from engine.identity.record import Change
from engine.run import Changed, Run
from engine.settings.command_line import as_options


def refusal(
    run: Run, config: Any, settings: Changed, found: Sequence[Change], odds: str = ""
) -> str:
    """Return why a run does not go on, with the options that, added to the same command, let it;
    "" where nothing keeps it.

    settings: those that are given otherwise. found: what differs of what it was made from, accepted
    or not. odds: in words, what its folder says of it in two ways.
    """
    refused = [change for change in found if change.name not in config.accept_changed]
    said, options = [], []
    if settings:
        said.append(run.settings_in_words(settings) + _no_names(settings, config.accept_changed))
        options.append(as_options(config, {name: old for name, (old, _) in settings.items()}))
    if refused:
        words = ((c.name, cut(c.old, MAX_SHOWN_PATH), cut(c.new, MAX_SHOWN_PATH)) for c in refused)
        said.append(
            f"{run.directory} was made from something else than what is here: "
            + "; ".join(f"{name} {old} -> {new}" for name, old, new in words)
        )
        # An option that is given twice counts as the second time.
        options.append(f"--accept-changed {' '.join(change.name for change in found)}")
    if odds:
        said.append(odds)
    if not said:
        return ""
    if options:
        said.append(_remedy(run, bool(settings), bool(refused)) + " ".join(options))
    return "\n".join(said)


def _remedy(run: Run, has_settings: bool, has_changes: bool) -> str:
    if not has_settings:
        return "put that back, give another --directory, or go on with this by "
    with_this = " and with what is here" if has_changes else ""
    return (
        f"give another --directory, change {run.directory / 'config.json'} to go on with the new "
        f"settings, or go on with those it had{with_this} by "
    )


def _no_names(settings: Changed, accepted: Collection[str]) -> str:
    """Return why --accept-changed lets no settings pass that it has been given, or that it has a
    name for."""
    reasons = [f"{name}: {UNCHANGING[name]}" for name in settings if name in UNCHANGING]
    reasons += [
        f"{name}: nobody knows what it was"
        for name in settings
        if name in accepted and name not in UNCHANGING
    ]
    return f" (--accept-changed lets none of it pass: {'; '.join(reasons)})" if reasons else ""
