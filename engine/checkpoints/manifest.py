"""What a whole checkpoint is: a manifest, written last, that lists every file's bytes and checksum.

    manifest.json   {"manifest": {"format": 1, "step": 100, "files": {"policy/network.json":
                    {"bytes": 212, "xxh3_128": "9f..."}, ...}}, "xxh3_128": "..."}

The checksum is for damage, by disks, copies and hands; who writes a file can write its checksum
too. `benchmarks.checkpoints` measures what it costs. Imports neither torch nor megatron.
"""

import json
import os
import re
from collections.abc import Iterable, Mapping
from dataclasses import asdict, dataclass
from pathlib import Path
from typing import Any

import xxhash

from engine.errors import UserError, quoted
from engine.files import open_file, read_object, replacing

MANIFEST = "manifest.json"
_FORMAT = 1
_NAME = re.compile(r"[A-Za-z0-9][\w.-]{0,99}(/[A-Za-z0-9][\w.-]{0,99})?", re.ASCII)
_LARGEST = 1 << 62  # of a step or a file's bytes
_CHUNK_BYTES = 1 << 20  # what is hashed at a time: it stays in a core's cache


@dataclass(frozen=True, kw_only=True)
class FileDigest:
    """How a file of a checkpoint is known again."""

    bytes: int
    xxh3_128: str


@dataclass(frozen=True, kw_only=True)
class Manifest:
    """The files of a whole checkpoint, by their path within it."""

    step: int | None
    """None of weights alone, which no run resumes from."""
    files: dict[str, FileDigest]


class Damage(UserError):
    """A file of a checkpoint is not the one that was written."""


class NewerForm(UserError):
    """A checkpoint is in order, and of a form that this version does not know."""


def write_manifest(folder: Path, manifest: Manifest) -> None:
    """Write a checkpoint's manifest, which makes it whole: everything it lists lies on the disk."""
    files = {name: asdict(digest) for name, digest in sorted(manifest.files.items())}
    content = {"format": _FORMAT, "step": manifest.step, "files": files}
    text = json.dumps({"manifest": content, "xxh3_128": _digest_of(content)}, indent=1)
    with replacing(folder / MANIFEST) as stream:
        stream.write(text.encode())


def read_manifest(folder: Path) -> Manifest:
    """Return the manifest of the checkpoint in a folder; raises Damage where there is none, or it
    is not as it was written, and NewerForm for one of a later version."""
    path = folder / MANIFEST
    if not os.path.lexists(path):
        older = next(folder.glob("*/.metadata"), None)
        if older is not None:
            raise Damage(
                f"{folder}: a checkpoint of before manifests, which is not read: it would take "
                "unpickling; export it with the Trident that wrote it, and import that"
            )
        raise Damage(f"{folder}: no {MANIFEST}: not a checkpoint, or one whose save was cut short")
    try:
        if leads_out(path, folder):
            raise Damage(f"{path}: a link that leads out of the checkpoint")
        wrapped = read_object(path)
    except UserError as error:
        raise Damage(str(error)) from None
    content = wrapped.get("manifest")
    if not isinstance(content, dict) or not _is_as_written(content, wrapped.get("xxh3_128")):
        raise Damage(f"{path}: damaged: its checksum is another")
    if content.get("format") != _FORMAT:
        found = quoted(content.get("format"))
        raise NewerForm(
            f"{path}: format {found}, where this Trident reads format {_FORMAT}: take the version "
            "that wrote it"
        )
    step, files = content.get("step"), content.get("files")
    if not (step is None or _is_count(step)) or not isinstance(files, dict):
        raise Damage(f"{path}: no step, or no list of files")
    return Manifest(step=step, files={name: _digest_in(path, name, files[name]) for name in files})


def check_files(folder: Path, manifest: Manifest, names: Iterable[str]) -> str:
    """Return what is wrong with the first of some files of a checkpoint that is not as it was
    written, with its path; "" where all are."""
    for name in names:
        path = folder / name
        try:
            if leads_out(path, folder):
                return f"{path}: a link that leads out of the checkpoint"
            wanted, num_bytes = manifest.files[name], _bytes_of(path)
            if num_bytes != wanted.bytes:  # before it is read, which could take for ever
                return f"{path}: damaged: {num_bytes} bytes, {wanted.bytes} were written"
            found = digest_of_file(path)
        except UserError as error:
            return str(error)
        except OSError as error:
            return f"{path}: cannot be read: {error.strerror}"
        if found != wanted:
            return f"{path}: damaged: its checksum is not that of what was written"
    return ""


def leads_out(path: Path, folder: Path) -> bool:
    """Return whether a path leads to what is not in a folder."""
    try:
        return not path.resolve().is_relative_to(folder.resolve())
    except (OSError, RuntimeError):  # a loop of links: the one or the other, by Python's version
        return True


def _bytes_of(path: Path) -> int:
    with open_file(path) as stream:
        return os.fstat(stream.fileno()).st_size


def digest_of_file(path: Path) -> FileDigest:
    """Return the bytes and checksum of a file; raises UserError."""
    state, num_bytes = xxhash.xxh3_128(), 0
    chunk = memoryview(bytearray(_CHUNK_BYTES))
    with open_file(path) as stream:
        while count := stream.readinto(chunk):
            state.update(chunk[:count])
            num_bytes += count
    return FileDigest(bytes=num_bytes, xxh3_128=state.hexdigest())


def digest_of_text(text: str) -> FileDigest:
    """Return the bytes and checksum of a file with that text."""
    content = text.encode()
    return FileDigest(bytes=len(content), xxh3_128=xxhash.xxh3_128_hexdigest(content))


def _is_as_written(content: Mapping[str, Any], digest: Any) -> bool:
    try:
        return digest == _digest_of(content)
    except RecursionError:  # what is as deep as can just be read
        return False


def _digest_of(content: Mapping[str, Any]) -> str:
    return xxhash.xxh3_128_hexdigest(json.dumps(content, sort_keys=True).encode())


def _digest_in(path: Path, name: str, value: Any) -> FileDigest:
    if not _NAME.fullmatch(name) or not isinstance(value, dict):
        raise Damage(f"{path}: {quoted(name)} is no file of a checkpoint")
    num_bytes: Any = value.get("bytes")
    checksum = value.get("xxh3_128")
    if not _is_count(num_bytes) or not isinstance(checksum, str):
        raise Damage(f"{path}: {name!r} has no bytes or no xxh3_128")
    return FileDigest(bytes=num_bytes, xxh3_128=checksum)


def _is_count(value: Any) -> bool:
    return type(value) is int and 0 <= value <= _LARGEST
