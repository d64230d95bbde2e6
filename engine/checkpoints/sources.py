"""The networks that a run was made from, kept in its own folder: they stay whatever becomes of the
runs that they come from.

    RUN/sources/reference/       a checkpoint of weights alone
        manifest.json
        policy/                  network.json, tensors.json, weights-*.safetensors

The files are hard links where the file system has them, as a checkpoint's are never changed in
place, and copies elsewhere.
"""

import contextlib
import json
import os
import shutil
from collections.abc import Collection, Iterator
from dataclasses import asdict, dataclass, replace
from pathlib import Path
from typing import Any

import xxhash

from engine.checkpoints.candidates import candidates_at
from engine.checkpoints.index import INDEX, Index, index_text, read_index
from engine.checkpoints.manifest import (
    Manifest,
    check_files,
    digest_of_bytes,
    leads_out,
    read_manifest,
    write_manifest,
)
from engine.checkpoints.whole import damage_of, warn
from engine.errors import UserError
from engine.files import open_file, replacing, sync_folder, writing
from engine.printable import say
from engine.ranks.first_rank import said_by_first_rank

_TRIES = 20  # at a run that removes its older checkpoints meanwhile; our choice
_COPIED_BYTES = 8 << 20  # at a time; our choice
_SAID_BYTES = 1 << 30  # from which a copy takes seconds, and is said; our choice


@dataclass(frozen=True, kw_only=True)
class Source:
    """A network that a run was made from, and the copy of its weights that the run has."""

    checkpoint: str
    """Where it came from: a checkpoint of another run, or a Hugging Face folder."""
    network: str
    """Its folder in that checkpoint; "" of a Hugging Face folder."""
    step: int | None
    """Of that checkpoint; None of weights alone."""
    roles: tuple[str, ...]
    """All networks of that checkpoint."""
    xxh3_128: str
    """Of its weights, as digest_of_network gives it."""
    is_linked: bool
    """Whether the copy shares the other run's files, and takes no room."""
    model_xxh3_128: str = ""
    """Of a Hugging Face folder's files; "" of a checkpoint, whose files the copy has."""


class _Gone(Exception):
    """A checkpoint was removed while it was looked at, because a newer one had come."""


def take_source(path: Path, role: str, folder: Path, *, strict: bool) -> Source:
    """Copy the weights of network `role` at a path into `folder`, which must not be there, as a
    checkpoint of weights alone with network `role`; all ranks call together.

    path and strict are those of network_at, and so is which checkpoint is taken. Where the run
    there still trains and removes it meanwhile, its next newest is. Raises UserError.
    """
    passed: list[str] = []
    damage = ""
    while True:
        told = json.loads(said_by_first_rank(lambda: json.dumps(_take(path, role, folder, passed))))
        damage = damage or told["damage"]
        if told["source"] is None:
            raise UserError(damage)
        source = replace(Source(**told["source"]), roles=tuple(told["source"]["roles"]))
        found = in_words_of_source(damage_of(folder), source, folder, role)
        if not found:
            break
        damage = damage or found
        passed.append(source.checkpoint)
    if damage and strict:
        raise UserError(f"{damage}; {source.checkpoint} is whole: name that")
    if damage:
        warn(f"{damage}\nWARNING: {source.checkpoint}, the newest whole one, is taken instead")
    return source


def newest_source(path: Path, role: str) -> tuple[int | None, str]:
    """Return the step and the digest of the network that is at a path now, on the rank that asks:
    unread, by its manifest alone. Raises UserError."""
    looked = candidates_at(path, role)
    manifest = read_manifest(Path(looked["folders"][0]))
    return manifest.step, digest_of_network(manifest, looked["role"])


def digest_of_network(manifest: Manifest, role: str) -> str:
    """Return a digest of a network's weights and description, the same of each copy of them."""
    digests = {
        name.removeprefix(f"{role}/"): digest.xxh3_128
        for name, digest in manifest.files.items()
        if name.startswith(f"{role}/") and _is_copied(name)
    }
    return xxhash.xxh3_128_hexdigest(json.dumps(sorted(digests.items())).encode())


def in_words_of_source(message: str, source: Source, folder: Path, role: str) -> str:
    """Return an error about a copy as one about what it is a copy of, which the user has named."""
    origin = str(Path(source.checkpoint) / source.network)
    named = message.replace(str(folder / role), origin)
    return named.replace(str(folder), source.checkpoint)


@contextlib.contextmanager
def naming_source(source: Source, folder: Path, role: str) -> Iterator[None]:
    """Raise the UserErrors of a block as in_words_of_source says them."""
    try:
        yield
    except UserError as error:
        raise type(error)(in_words_of_source(str(error), source, folder, role)) from None


def _take(path: Path, role: str, folder: Path, passed: Collection[str]) -> dict[str, Any]:
    """Copy the best candidate but for those passed; return it, None where there is none, and what
    is wrong with a better one."""
    for _ in range(_TRIES):
        looked = _look(path, role)
        damage = looked["damage"]
        try:
            for checkpoint in looked["folders"]:
                if checkpoint in passed:
                    continue
                try:
                    source = _copied(Path(checkpoint), looked["role"], role, folder)
                except UserError as error:
                    if not os.path.isdir(checkpoint):
                        raise _Gone from None
                    damage = damage or str(error)
                    continue
                return {"source": asdict(source), "damage": damage}
        except _Gone:
            continue
        return {"source": None, "damage": damage}
    raise UserError(f"{path}: its checkpoints come and go; name one of them that is kept")


def _look(path: Path, role: str) -> dict[str, Any]:
    """Return what candidates_at does; trouble is none unless it is still there at a second look."""
    with contextlib.suppress(UserError):
        looked = candidates_at(path, role)
        if not looked["damage"]:
            return looked
    return candidates_at(path, role)


def _copied(checkpoint: Path, network: str, role: str, folder: Path) -> Source:
    """Return a checkpoint's network once it lies in a folder; UserError for what cannot be read."""
    with writing(folder):
        shutil.rmtree(folder, ignore_errors=True)
        (folder / role).mkdir(parents=True)
    manifest = read_manifest(checkpoint)
    damage = check_files(checkpoint, manifest, _described(manifest, network))
    if damage:
        raise UserError(damage)
    index = read_index(checkpoint / network, manifest)
    weights = {k: t for k, t in index.tensors.items() if not k.startswith("optimizer.")}
    text = index_text(Index(tensors=weights, counts={}))
    with replacing(folder / role / INDEX) as stream:
        stream.write(text.encode())
    files, is_linked = {f"{role}/{INDEX}": digest_of_bytes(text.encode())}, True
    for name in sorted(manifest.files):
        if name.startswith(f"{network}/") and _is_copied(name):
            copy = f"{role}/{name.removeprefix(f'{network}/')}"
            if leads_out(checkpoint / name, checkpoint):
                raise UserError(f"{checkpoint / name}: a link that leads out of the checkpoint")
            linked = _link(checkpoint / name, folder / copy, manifest.files[name].bytes)
            is_linked = is_linked and linked
            files[copy] = manifest.files[name]
    if read_manifest(checkpoint) != manifest:
        raise _Gone  # it was written anew
    sync_folder(folder / role)
    kept = Manifest(step=None, files=files)
    write_manifest(folder, kept)
    return Source(
        checkpoint=str(checkpoint),
        network=network,
        step=manifest.step,
        roles=tuple(sorted({name.partition("/")[0] for name in manifest.files if "/" in name})),
        xxh3_128=digest_of_network(kept, role),
        is_linked=is_linked,
    )


def _is_copied(name: str) -> bool:
    file = name.partition("/")[2]
    return file == "network.json" or file.startswith("weights-")


def _described(manifest: Manifest, network: str) -> list[str]:
    names = (f"{network}/network.json", f"{network}/{INDEX}")
    return [name for name in names if name in manifest.files]


def _link(path: Path, copy: Path, num_bytes: int) -> bool:
    """Link a file to another name, or copy it where it cannot be linked; return whether it could.
    UserError where it cannot be read, or has not so many bytes."""
    try:
        os.link(path.resolve(), copy)
        return True
    except OSError:  # another file system, or one without links, or another's file
        pass
    with open_file(path) as stream:
        found = os.fstat(stream.fileno()).st_size
        if found != num_bytes:
            raise UserError(f"{path}: damaged: {found} bytes, {num_bytes} were written")
        if num_bytes > _SAID_BYTES:
            say(f"{path}: {num_bytes / 1e9:.1f} GB are copied, for it cannot be linked")
        with replacing(copy) as into:
            while content := stream.read(_COPIED_BYTES):
                into.write(content)
    return False
