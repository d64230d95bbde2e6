"""How a checkpoint comes to the disk: a snapshot in host memory, written while training goes on.

Each rank copies its tensors to memory that only the save reads, and trains on. A thread of it
writes its files with their checksums. When all have, the first rank's writes what describes them,
the manifest last, and gives the folder its name: so a checkpoint is there whole, or not at all.
"""

import itertools
import json
import os
import shutil
from collections.abc import Sequence
from dataclasses import asdict
from pathlib import Path
from typing import Any

import torch
from torch import Tensor

from engine.checkpoints.background import Background
from engine.checkpoints.draft import Draft
from engine.checkpoints.index import INDEX, Index, IndexedTensor, TensorPiece, index_text
from engine.checkpoints.manifest import (
    FileDigest,
    Manifest,
    digest_of_text,
    write_manifest,
)
from engine.checkpoints.tensor_file import STORED_DTYPES, TensorFile, write_tensors
from engine.errors import UserError
from engine.files import sync, sync_folder
from engine.ranks.decision import Council
from engine.ranks.first_rank import said_by_first_rank
from engine.ranks.parallel import Parallel

_Staged = tuple[TensorFile, bytes, Tensor]
"""A file, its header, and the bytes of its tensors on the host."""
_ALIGNMENT = 64  # bytes: where a file begins in a snapshot's memory


class Saver:
    """Writes one run's checkpoints, one at a time. All ranks make it, and call it, together."""

    def __init__(self, parallel: Parallel) -> None:
        self._parallel = parallel
        self._background = Background()
        self._council: Council | None = None
        self._memory = torch.empty(0, dtype=torch.uint8)  # of snapshots; pinned beside a GPU

    @property
    def has_failed(self) -> bool:
        """Whether the last save has failed, and finish() is to say so."""
        return self._background.has_failed

    def is_over(self, seconds: float) -> bool:
        """Return whether this rank's part of what was started has ended, well or not, after waiting
        so long at most."""
        return self._background.is_over(seconds)

    def start(self, draft: Draft) -> None:
        """Wait for the save before, take a snapshot, and begin to write it; raises UserError where
        the one before has failed, or this one's folder cannot be made."""
        self.finish()
        said_by_first_rank(lambda: _make_room(draft))
        staged = self._snapshot(draft.files)
        if self._council is None:
            self._council = Council()
        council = self._council

        def work() -> None:
            report = _write(draft, staged)
            council.decide(json.dumps(report), lambda reports: _publish(draft, reports))

        self._background.start(work, name=f"saving {draft.folder.name}")

    def finish(self, seconds: float | None = None) -> bool:
        """Wait until what was started is on the disk, for so long where a time is given; return
        whether it is. Raises UserError, on all ranks alike, where it could not be written."""
        return self._background.wait(seconds)

    def _snapshot(self, files: Sequence[TensorFile]) -> list[_Staged]:
        """Return each file with its header and the bytes of its tensors, on the host: what was
        copied may change afterwards."""
        ends = list(itertools.accumulate(-(-f.num_bytes // _ALIGNMENT) for f in files))
        num_bytes = _ALIGNMENT * (ends[-1] if ends else 0)
        is_cuda = self._parallel.device.type == "cuda"
        if self._memory.numel() < num_bytes:
            self._memory = torch.empty(0, dtype=torch.uint8)  # before there are two
            self._memory = torch.empty(num_bytes, dtype=torch.uint8, pin_memory=is_cuda)
        staged = []
        for file, start in zip(files, [0, *ends], strict=False):  # or none, of a rank of padding
            memory = self._memory[_ALIGNMENT * start :][: file.num_bytes]
            file.stage(memory)
            staged.append((file, file.header(), memory))
        if is_cuda:
            torch.cuda.current_stream().synchronize()  # sync: once a save
        return staged


def remove(path: Path) -> None:
    """Remove a folder, or a link to one, where it is there."""
    if path.is_symlink() or not path.is_dir():
        path.unlink(missing_ok=True)
    else:
        shutil.rmtree(path)


def discard(folder: Path) -> None:
    """Remove a checkpoint, first from among the others: what a kill leaves of it is a leftover."""
    leftover = folder.with_name(f"{folder.name}.partial")
    folder.rename(leftover)
    remove(leftover)


def _make_room(draft: Draft) -> str:
    """Clear what killed runs left, on the first rank, and make the folder to write into."""
    directory = draft.folder.parent
    try:
        directory.mkdir(parents=True, exist_ok=True)
        clear_leftovers(directory)
        draft.partial.mkdir()
    except OSError as error:
        raise _cannot_be_written(error, draft.partial) from None
    return ""


def clear_leftovers(directory: Path) -> None:
    """Remove what a killed run was writing or removing, and put back what it was about to replace;
    raises UserError."""
    try:
        for path in directory.glob("*.partial"):
            remove(path)
        for replaced in directory.glob("*.replaced"):
            final = replaced.with_name(replaced.name.removesuffix(".replaced"))
            if os.path.lexists(final):
                remove(replaced)
            else:
                replaced.rename(final)
    except OSError as error:
        raise _cannot_be_written(error, directory) from None


def _write(draft: Draft, staged: Sequence[_Staged]) -> dict[str, Any]:
    """Write this rank's files; return their digests and what is in them, or what went wrong."""
    digests: dict[str, dict[str, Any]] = {}
    tensors: list[dict[str, Any]] = []
    path = draft.partial
    try:
        for file, header, memory in staged:
            path = draft.partial / file.name
            path.parent.mkdir(exist_ok=True)
            digests[file.name] = asdict(write_tensors(path, header, memory))
            role, _, name = file.name.partition("/")
            tensors += [
                {
                    "role": role,
                    "name": part.shard.name,
                    "dtype": STORED_DTYPES[part.tensor.dtype],
                    "whole": part.shard.global_shape,
                    "file": name,
                    "offset": part.shard.offset,
                    "shape": part.shard.shape,
                }
                for part in file.parts
            ]
    except OSError as error:
        return {"error": str(_cannot_be_written(error, path))}
    except BaseException as error:  # the first rank waits for a report, whatever happens here
        return {"error": f"{path}: {error!r}"}
    return {"digests": digests, "tensors": tensors}


def _publish(draft: Draft, reports: Sequence[str]) -> str:
    """Make the ranks' files a checkpoint, on the first rank; raises UserError, with the folder
    removed, where one of them could not be written."""
    told = [json.loads(report) for report in reports]
    try:
        errors = [report["error"] for report in told if "error" in report]
        if errors:
            raise UserError(errors[0])
        try:
            _complete(draft, told)
        except OSError as error:
            raise _cannot_be_written(error, draft.folder) from None
    except BaseException:
        shutil.rmtree(draft.partial, ignore_errors=True)
        raise
    return ""


def _complete(draft: Draft, told: Sequence[dict[str, Any]]) -> None:
    files: dict[str, FileDigest] = {}
    pieces: dict[str, dict[str, list[dict[str, Any]]]] = {role: {} for role in draft.counts}
    for report in told:
        files |= {name: FileDigest(**digest) for name, digest in report["digests"].items()}
        for entry in report["tensors"]:
            pieces[entry["role"]].setdefault(entry["name"], []).append(entry)
    texts = dict(draft.texts)
    for role, counts in draft.counts.items():
        tensors = {name: _tensor(entries) for name, entries in pieces[role].items()}
        texts[f"{role}/{INDEX}"] = index_text(Index(tensors=tensors, counts=counts))
    for name, text in texts.items():
        path = draft.partial / name
        path.parent.mkdir(exist_ok=True)
        with path.open("xb") as stream:
            stream.write(text.encode())
            sync(stream)
        files[name] = digest_of_text(text)
    for role in draft.counts:
        sync_folder(draft.partial / role)
    write_manifest(draft.partial, Manifest(step=draft.step, files=files))
    _move_in(draft.partial, draft.folder)
    draft.published()


def _move_in(partial: Path, final: Path) -> None:
    replaced = final.with_name(f"{final.name}.replaced")
    if os.path.lexists(final):
        remove(replaced)
        final.rename(replaced)
    partial.rename(final)
    sync_folder(final.parent)
    remove(replaced)


def _tensor(entries: Sequence[dict[str, Any]]) -> IndexedTensor:
    """Return a whole tensor from what the ranks reported of its pieces."""
    pieces = [
        TensorPiece(entry["file"], tuple(entry["offset"]), tuple(entry["shape"]))
        for entry in entries
    ]
    first = entries[0]
    return IndexedTensor(first["dtype"], tuple(first["whole"]), tuple(pieces))


def _cannot_be_written(error: OSError, path: Path) -> UserError:
    named = error.filename if isinstance(error.filename, str) else path
    return UserError(
        f"{named}: cannot be written: {error.strerror or error}. Checkpoints that were whole are "
        "as they were; mend this, and the same command goes on from the newest"
    )
