"""What an option for data names: one file, a folder, or a list of files, folders and patterns, each
with a weight."""

import glob
import hashlib
import os
import re
from dataclasses import dataclass
from pathlib import Path

from engine.containers.folders import files_of_folder, has_split
from engine.errors import UserError, named, quoted
from engine.files import MAX_SHOWN_PATH, hub_name, link_to_nothing, near_names

_WEIGHT = re.compile(r"(.+)@(\d+(\.\d*)?|\.\d+)", re.DOTALL)
_MAX_FILES = 10_000  # our choice: what a run's folder says of each is read at every start
_MAX_WEIGHT = 1000.0  # our choice: more is a mistake for a share
_URL = re.compile(r"([a-z][a-z0-9+.-]*):/", re.IGNORECASE)


@dataclass(frozen=True, kw_only=True)
class DataSource:
    """One of the things that an option names."""

    name: str
    """As it was given."""
    files: tuple[Path, ...]
    """In the order in which they are read."""
    weight: float = 1.0
    """How often each record counts an epoch; of a fraction, for a share of the prompts."""

    @property
    def path(self) -> str:
        """The name without its weight."""
        return self.name if self.weight == 1 else self.name.rpartition("@")[0]

    @property
    def num_passes(self) -> int:
        """How often all of its records count."""
        return int(self.weight)

    def has_once_more(self, prompt: str) -> bool:
        """Return whether the records of a prompt count once more, for the weight's fraction.

        A hash of the prompt decides: so records of one prompt stay together, and it stays as it is
        when records are added, removed or reordered, whatever the seed.
        """
        fraction = self.weight - self.num_passes
        if not fraction:
            return False
        digest = hashlib.sha256(f"weight {prompt}".encode()).digest()
        return int.from_bytes(digest[:8]) < fraction * 2**64


def sources_of(path: Path | str) -> list[DataSource]:
    """Return what a path means: a list with commas, where no file has that very name.

    A part of the list is a file, a folder, or a pattern (*, ?, [a-z], ** for folders); "@2" behind
    it has its records count twice, "@0.5" those of half its prompts. Raises UserError.
    """
    text = str(path)
    if os.path.lexists(text):
        return [DataSource(name=text, files=tuple(_files_at(Path(text))))]
    sources = [_source(part.strip(), text) for part in _parts(text)]
    seen: dict[str, str] = {}
    for source in sources:
        for file in source.files:
            if (real := os.path.realpath(file)) in seen:
                raise UserError(
                    f"{named(file, MAX_SHOWN_PATH)} is named twice, by {named(seen[real])} and "
                    f"{named(source.name)}; to count it twice, write @2 behind its name"
                )
            seen[real] = source.name
    if len(seen) > _MAX_FILES:
        raise UserError(
            f"{named(text, MAX_SHOWN_PATH)}: {len(seen)} files; {_MAX_FILES} are the most"
        )
    return sources


def one_source(path: Path | str) -> DataSource:
    """Return all files that a path names as one source; UserError for weights, which mean nothing
    where each record is read once."""
    sources = sources_of(path)
    for source in sources:
        if source.weight != 1:
            raise UserError(f"{named(source.name, MAX_SHOWN_PATH)}: a weight has no sense here")
    return DataSource(name=str(path), files=tuple(file for each in sources for file in each.files))


def _parts(text: str) -> list[str]:
    """Return the parts of a list; a comma within brackets is the pattern's."""
    return re.split(r",(?![^\[,]*\])", text)


def _source(part: str, whole: str) -> DataSource:
    if not part:
        raise UserError(f"{named(whole, MAX_SHOWN_PATH)}: a name is missing beside a comma")
    if os.path.lexists(part):
        return DataSource(name=part, files=tuple(_files_at(Path(part))))
    weighted, weight = _WEIGHT.fullmatch(part), 1.0
    name = part
    if weighted:
        name, weight = weighted[1], float(weighted[2])
        if not 0 < weight <= _MAX_WEIGHT:
            raise UserError(
                f"{named(part, MAX_SHOWN_PATH)}: a weight must be over 0 and at most "
                f"{_MAX_WEIGHT:g}, got {weighted[2]}"
            )
    return DataSource(name=part, files=tuple(_files_named(name)), weight=weight)


def _files_named(name: str) -> list[Path]:
    if os.path.lexists(name):
        return _files_at(Path(name))
    if glob.has_magic(name) and not _URL.match(name):
        found = [
            file
            for match in sorted(glob.glob(name, recursive=True))
            for file in _files_at(Path(match))
        ]
        if not found:
            raise UserError(f"{named(name, MAX_SHOWN_PATH)}: no file matches")
        return list(dict.fromkeys(found))
    path = Path(name)
    if has_split(path.parent, path.name):
        return files_of_folder(path.parent, path.name)
    raise UserError(f"{named(name, MAX_SHOWN_PATH)}{_why_missing(path)}")


def _files_at(path: Path) -> list[Path]:
    return files_of_folder(path) if path.is_dir() else [path]


def _why_missing(path: Path) -> str:
    """Return what to say of a path where nothing is."""
    name = str(path)
    if url := _URL.match(name):
        how = "by `hf download --repo-type dataset OWNER/NAME`" if url[1] == "hf" else "yourself"
        return f" is an address, and nothing here uses the network: fetch it {how}"
    if name.startswith("~"):
        whole = named(os.path.expanduser(name), MAX_SHOWN_PATH)
        return (
            f" begins with ~, which the shell leaves as it is behind a = or quotes: write {whole}"
        )
    if why := link_to_nothing(path):
        return why
    before, _, weight = name.rpartition("@")
    if before and os.path.lexists(before):
        return f": {quoted(weight)} is no weight of {named(before)}; write @2, or @0.5 for a half"
    parts = re.split(r"[;:\s]+", name.strip())
    if len(parts) > 1 and all(map(os.path.lexists, parts)):
        return ": several files are joined by commas"
    hub = hub_name(path, "--repo-type dataset ")
    return f": no such file or folder{hub or '; ' + near_names(path)}"
