"""Which of a run's checkpoints is the newest, or the one it is known by: the files `latest` and
`selected`. Imports neither torch nor megatron."""

import re
from collections.abc import Sequence
from pathlib import Path

from engine.checkpoints.retention import step_name, step_of
from engine.errors import UserError
from engine.files import open_file, replacing

_POINTER_BYTES = 256  # of a name and a newline
_CHECKPOINT = re.compile(r"(step|epoch)_\d{4,12}", re.ASCII)
_BY_HAND = re.compile(r"step_(\d{1,7})", re.ASCII)  # who goes back may write fewer digits


def point(pointer: Path, name: str) -> None:
    """Have `latest` or `selected` name a checkpoint."""
    with replacing(pointer) as stream:
        stream.write(name.encode())


def pointed_checkpoint(pointer: Path) -> Path:
    """Return the checkpoint that a file such as `latest` names; raises UserError for what is no
    checkpoint's name: it must lie beside the file."""
    try:
        with open_file(pointer) as stream:
            content = stream.read(_POINTER_BYTES)
    except OSError as error:
        raise UserError(f"{pointer}: cannot be read: {error.strerror}") from None
    name = content.decode(errors="replace").strip().removesuffix("/")  # as a shell completes it
    if by_hand := _BY_HAND.fullmatch(name):
        name = step_name(int(by_hand[1]))
    if not _CHECKPOINT.fullmatch(name):
        raise UserError(f"{pointer}: damaged: {name[:40]!r} is no checkpoint's name")
    folder = pointer.with_name(name)
    if not folder.is_dir():
        raise UserError(f"{pointer}: names {name}, which is not there")
    return folder


def steps_in(directory: Path) -> list[Path]:
    """Return the checkpoints of steps in a folder, the newest first."""
    if not directory.is_dir():
        return []
    steps = {path: step_of(path.name) for path in directory.iterdir() if path.is_dir()}
    found = {step: path for path, step in steps.items() if step is not None}
    return [found[step] for step in sorted(found, reverse=True)]


def up_to(first: Path, steps: Sequence[Path]) -> list[Path]:
    """Return a checkpoint and those of earlier steps, in the order given.

    Later ones are no substitute for it: the run was set back, and they are what it left.
    """
    step = step_of(first.name)
    earlier = (other for other in steps if step is not None and (step_of(other.name) or 0) < step)
    return [first, *earlier]


def newest_in_words(directory: Path) -> str:
    """Return where the newest checkpoint in a folder is, with the names of the older ones beside
    it; "" where `latest` is not there."""
    latest = directory / "latest"
    if not latest.exists():
        return ""
    newest = pointed_checkpoint(latest)
    older = ", ".join(folder.name for folder in up_to(newest, steps_in(directory))[1:])
    return f"{newest} (older ones beside it: {older})" if older else str(newest)


def no_pointer(
    latest: Path, what: str, names: Sequence[str], otherwise: str = "begin in a new directory"
) -> str:
    """Return in words what is wrong with `latest`, and what to do about it: name one of the
    checkpoints beside it, where there are names, or something else."""
    verb = "is" if len(names) == 1 else "are"
    shown = ", ".join(names[:3])
    there = f"{shown} {verb} there: write the name of the one to go on from into it, or"
    return f"{latest} is {what}; " + (f"{there} " if names else "") + otherwise
