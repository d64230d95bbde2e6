"""The files of data in a folder: as `datasets.save_to_disk` writes it, as a clone of a data set on
Hugging Face's hub has it, or files of one kind."""

import itertools
import os
import re
from collections import defaultdict
from collections.abc import Iterable, Mapping, Sequence
from pathlib import Path

from engine.containers.kinds import ENDINGS, ending_of
from engine.errors import UserError, named
from engine.files import MAX_SHOWN_PATH, read_object

_MAX_FILES = 100_000  # that a folder is looked through for
_NUM_SHOWN = 8  # splits in an error; our choice
_SHARD = re.compile(r"(.+)-(\d{5,})-of-(\d{5,})(-[0-9a-f]+)?")  # the hub's names
_SPLITS = {"train", "test", "validation", "valid", "val", "dev", "eval", "heldout"}
_ABOUT = re.compile(  # the data, and none of it
    r"(readme|license|notice|changelog|contributing|requirements|dataset_infos?|dataset_dict|state)"
    r"[\w.-]*",
    re.IGNORECASE,
)


def files_of_folder(folder: Path, split: str | None = None) -> list[Path]:
    """Return a folder's files of data, in the order in which they are read; raises UserError.

    split: the one that is meant, of those that has_split knows; None: there has to be one.
    """
    name = named(folder, MAX_SHOWN_PATH)
    if (folder / "dataset_dict.json").exists():
        splits = read_object(folder / "dataset_dict.json").get("splits")
        listed = (
            [each for each in splits if isinstance(each, str)] if isinstance(splits, list) else []
        )
        if len(listed) != 1 or os.path.basename(listed[0]) != listed[0]:
            raise UserError(_several(folder, listed))
        folder = folder / listed[0]
    if (folder / "state.json").exists():
        return _saved_files(folder)
    kinds: dict[str, list[Path]] = defaultdict(list)
    for path in _files_below(folder):
        for kind, endings in ENDINGS.items():
            if ending_of(path) in endings:
                kinds[kind].append(path)
    if len(kinds) > 1:
        kinds.pop("text", None)
    if not kinds:
        raise UserError(
            f"{name} is a folder without data: no file in it ends in "
            f"{', '.join(e for endings in ENDINGS.values() for e in endings)}"
        )
    if len(kinds) > 1:
        raise UserError(
            f"{name} has files of several kinds ({', '.join(kinds)}): name those that are meant, "
            f"such as '{folder / ('*' + ending_of(next(iter(kinds.values()))[0]))}'"
        )
    return _of_one_split(folder, next(iter(kinds.values())), split)


def has_split(folder: Path, split: str) -> bool:
    """Return whether a folder has files of a split of that name; a name that is none is not looked
    for."""
    if not folder.is_dir() or not set(re.split(r"[-_.]", split.lower())) & _SPLITS:
        return False
    return any(_split_of(path, folder) == split for path in _files_below(folder))


def _of_one_split(folder: Path, files: list[Path], split: str | None) -> list[Path]:
    by_split: dict[str, list[Path]] = defaultdict(list)
    for path in files:
        by_split[_split_of(path, folder)].append(path)
    if split is None and len(by_split) > 1:
        raise UserError(_several(folder, _named_splits(folder, by_split)))
    chosen = sorted(by_split[split] if split is not None else files)
    parents = {path.parent for path in chosen}
    if len(parents) > 1:
        names = [_files_alone(parent, chosen) for parent in sorted(parents)[:_NUM_SHOWN]]
        listed = ", ".join(named(name, MAX_SHOWN_PATH) for name in names)
        raise UserError(
            f"{named(folder, MAX_SHOWN_PATH)} has data in several folders: name one of {listed}"
        )
    _check_shards(chosen)
    return chosen


def _files_alone(parent: Path, files: Sequence[Path]) -> Path:
    """Return what names the files right in a folder, without those below it."""
    here = next(path for path in files if path.parent == parent)
    has_more = any(parent in path.parent.parents for path in files)
    return parent / f"*{ending_of(here)}" if has_more else parent


def _named_splits(folder: Path, by_split: Mapping[str, Sequence[Path]]) -> list[str]:
    """Return what names each split below the folder: its own name where that is looked for, else
    its files."""
    found = []
    for split, files in by_split.items():
        if has_split(folder, split):
            found.append(split)
        elif split:  # of numbered parts, whose name is no usual one
            within = min(path.parent for path in files).relative_to(folder)
            found.append(str(within / f"{split}-*"))
        else:
            found += [str(path.relative_to(folder)) for path in files]
    return found


def _several(folder: Path, splits: list[str]) -> str:
    listed = ", ".join(map(named, splits[:_NUM_SHOWN])) or "none that it names"
    listed += f" and {len(splits) - _NUM_SHOWN} more" if len(splits) > _NUM_SHOWN else ""
    usual = "train" if "train" in splits else splits[0] if splits else "SPLIT"
    example = named(folder / usual, MAX_SHOWN_PATH)
    return (
        f"{named(folder, MAX_SHOWN_PATH)} is a folder of several splits ({listed}): name one, such "
        f"as {example}"
    )


def _saved_files(folder: Path) -> list[Path]:
    """Return the files of a data set that `datasets` has saved, in its order."""
    path = folder / "state.json"
    state, name = read_object(path), named(path, MAX_SHOWN_PATH)
    if state.get("_indices_data_files") or state.get("_indices_files"):
        raise UserError(f"{name} selects rows: save it again by datasets.flatten_indices()")
    listed = state.get("_data_files")
    found = []
    for entry in listed if isinstance(listed, list) else []:
        file = entry.get("filename") if isinstance(entry, dict) else None
        if not isinstance(file, str) or file != os.path.basename(file) or file in ("", ".", ".."):
            raise UserError(f"{name}: _data_files must name files beside it")
        found.append(folder / file)
    if not found:
        raise UserError(f"{name} names no _data_files: it is no data set of datasets' save_to_disk")
    return found


def _files_below(folder: Path) -> Iterable[Path]:
    """Yield the files that may be data, in the folder and below."""
    found = 0
    for parent, folders, names in os.walk(folder):
        folders[:] = sorted(each for each in folders if not each.startswith("."))
        for name in sorted(names):
            found += 1
            if found > _MAX_FILES:
                raise UserError(f"{named(folder, MAX_SHOWN_PATH)} has over {_MAX_FILES} files")
            if not name.startswith(".") and not _ABOUT.fullmatch(name):
                yield Path(parent, name)


def _split_of(path: Path, folder: Path) -> str:
    """Return the split that a file's name, or that of a folder on the way to it, says it is of."""
    stem = path.name.split(".")[0] if _SHARD.match(path.name) else path.name
    if shard := _SHARD.fullmatch(stem):
        return shard[1]
    for part in (path.name, *reversed(path.parent.relative_to(folder).parts)):
        for word in re.split(r"[-_.]", part.lower()):
            if word in _SPLITS:
                return word
    return ""


def _check_shards(files: list[Path]) -> None:
    """Raise UserError where parts are missing of a set whose names number them."""
    shards = (_SHARD.match(path.name) for path in files)
    for whole, group in itertools.groupby(
        (shard for shard in shards if shard), key=lambda shard: (shard[1], int(shard[3]))
    ):
        there = {int(shard[2]) for shard in group}
        if missing := sorted(set(range(min(whole[1], _MAX_FILES))) - there):
            raise UserError(
                f"{named(files[0].parent, MAX_SHOWN_PATH)} has {len(there)} of {whole[1]} parts of "
                f"{named(whole[0])}, and not part {missing[0]}: download it again"
            )
