"""What a run was made from, as its folder keeps it, and how that differs from what is there now.

RUN/identity.json                               what the run is held to
RUN/checkpoints/step_00000100/identity.json     the same, should that be lost
"""

import json
import os
import re
from dataclasses import asdict, dataclass, field, replace
from pathlib import Path

from engine.checkpoints.manifest import check_files, read_manifest
from engine.checkpoints.pointers import pointed_checkpoint, steps_in
from engine.errors import UserError
from engine.identity.data_files import (
    DataFile,
    changed_files,
    described,
    described_now,
    without_paths,
)
from engine.settings.saved import load_config, save_config

IDENTITY = "identity.json"
_SHOWN = 8  # characters of a digest; our choice
_COUNTS = re.compile(
    r"^\d+ (records|lines|bytes)( of \d+ files)?, |, step \d+$"
    r"| \((commit|changed|added|gone|another order).*\)$",
    re.ASCII,
)


@dataclass(frozen=True, kw_only=True)
class NetworkRecord:
    """A network that the run was made from."""

    path: str = ""
    """As the option named it."""
    checkpoint: str = ""
    """What that was when the run began."""
    network: str = ""
    """The network's folder in the checkpoint; "" in a Hugging Face folder."""
    step: int | None = None
    """Of the checkpoint."""
    xxh3_128: str = ""
    """Of the weights, as engine.checkpoints.sources.digest_of_network gives it."""
    kept: str = ""
    """The run's own copy, within its folder."""
    model_xxh3_128: str = ""
    """Of a Hugging Face folder, as engine.huggingface.model_source.digest_of_model gives it."""


@dataclass(frozen=True, kw_only=True)
class TokenizerRecord:
    """The tokenizer of the run, a copy of which it has."""

    path: str = ""
    """Of the files that --tokenizer named; "" where another run brought it."""
    given: str = ""
    """A sha256 of those files."""
    sha256: str = ""
    """The tokenizer's fingerprint."""


@dataclass(frozen=True, kw_only=True)
class Code:
    """The project's own code."""

    xxh3_128: str = ""
    commit: str = ""
    """For people: it is not compared."""


@dataclass(frozen=True, kw_only=True)
class Change:
    """A difference between what the run was made from and what is there."""

    name: str = ""
    old: str = ""
    new: str = ""
    """Both in words."""


@dataclass(frozen=True, kw_only=True)
class Acceptance:
    """A change that --accept-changed has let pass."""

    change: Change = field(default_factory=Change)
    step: int = 0
    """From which the run went on."""
    at: str = ""
    """When, in UTC."""


@dataclass(frozen=True, kw_only=True)
class Identity:
    """What a run is made from."""

    stage: str = ""
    """sft, rm or ppo."""
    networks: dict[str, NetworkRecord] = field(default_factory=dict)
    data: dict[str, DataFile] = field(default_factory=dict)
    tokenizer: TokenizerRecord = field(default_factory=TokenizerRecord)
    packages: dict[str, str] = field(default_factory=dict)
    code: Code = field(default_factory=Code)
    accepted: tuple[Acceptance, ...] = ()
    """In the order in which they were."""


def read_identity(directory: Path) -> Identity | None:
    """Return what a run's folder says, None where it says nothing.

    Raises UserError, with the way out of it, for what is no such file.
    """
    path = directory / IDENTITY
    if not os.path.lexists(path):
        return None
    try:
        return load_config(Identity, path)
    except UserError as error:
        known = saved_identity(directory)
        anew = f"it is taken from {known[1]}" if known else "it is written anew, of what is here"
        raise UserError(f"{error}; put it back, or remove it: {anew} then") from None


def saved_identity(directory: Path) -> tuple[Identity, Path] | None:
    """Return what the newest of a run's checkpoints that says it has of its identity, and that
    checkpoint; None where none does, as of before there were identities. Raises UserError."""
    for folder in _newest_first(directory / "checkpoints"):
        try:
            manifest = read_manifest(folder)
        except UserError:  # who resumes deals with a damaged one
            continue
        if IDENTITY in manifest.files and not check_files(folder, manifest, [IDENTITY]):
            found = identity_in(folder)
            if found is not None:
                return found, folder
    return None


def identity_in(checkpoint: Path) -> Identity | None:
    """Return what a whole checkpoint says of its run's identity, None of before there were any;
    UserError where another version wrote it."""
    if not os.path.lexists(checkpoint / IDENTITY):
        return None
    try:
        return load_config(Identity, checkpoint / IDENTITY)
    except UserError as error:  # as it was written, and so not by this version
        raise UserError(f"{error}; take the version that wrote it") from None


def identity_text(identity: Identity) -> str:
    """Return what a checkpoint says of its run's identity: the same of any two runs that were made
    from the same, wherever and whenever."""
    networks = {k: replace(n, path="", checkpoint="") for k, n in identity.networks.items()}
    files = {name: without_paths(file) for name, file in identity.data.items()}
    kept = replace(
        identity,
        networks=networks,
        data=files,
        tokenizer=replace(identity.tokenizer, path=""),
        accepted=tuple(replace(each, at="") for each in identity.accepted),
    )
    return json.dumps(asdict(kept), indent=1)


def _newest_first(checkpoints: Path) -> list[Path]:
    """Return a run's checkpoints, that which it goes on from before the others."""
    steps = steps_in(checkpoints)
    try:
        first = pointed_checkpoint(checkpoints / "latest")
    except UserError:
        return steps
    return [first, *(folder for folder in steps if folder != first)]


def write_identity(directory: Path, identity: Identity) -> None:
    """Write a run's identity, whole or not at all, unless it is written already; UserError."""
    path = directory / IDENTITY
    if not path.exists() or load_config(Identity, path) != identity:
        save_config(identity, path)


def changes(old: Identity, new: Identity) -> list[Change]:
    """Return what differs of what may be accepted and numbers depend on.

    Paths and times of files are not among it; nor is the tokenizer, which no run exchanges."""
    found = []
    for name in (*old.networks, *(name for name in new.networks if name not in old.networks)):
        a, b = old.networks.get(name), new.networks.get(name)
        if not _are_same(a, b):
            found.append(Change(name=name, old=_network(a), new=_network(b)))
    for name in (*old.data, *(name for name in new.data if name not in old.data)):
        file, now = old.data.get(name), new.data.get(name)
        if (file and file.xxh3_128) != (now and now.xxh3_128):
            more = changed_files(file, now) if file and now else ""
            said = f"{described_now(now)} ({more})" if more else described_now(now)
            found.append(Change(name=name, old=described(file), new=said))
    for name in sorted(old.packages.keys() | new.packages.keys()):
        before, after = (versions.get(name, "none") for versions in (old.packages, new.packages))
        if before != after:
            found.append(Change(name=name, old=before, new=after))
    if old.code.xxh3_128 != new.code.xxh3_128:
        found.append(Change(name="code", old=_code(old.code), new=_code(new.code)))
    return found


def _are_same(a: NetworkRecord | None, b: NetworkRecord | None) -> bool:
    """Return whether two records are of one network. The copy of a Hugging Face folder, if taken
    anew by ranks of another layout, has other files of the same numbers."""
    if a is None or b is None:
        return a is b
    is_same_model = a.model_xxh3_128 == b.model_xxh3_128 != ""
    return is_same_model or a.xxh3_128 == b.xxh3_128


def disagreements(saved: Identity, own: Identity) -> list[Change]:
    """Return what a checkpoint's identity, the `old` side, and its run's own say otherwise, but for
    what was accepted since the checkpoint was written."""
    found = []
    for name in ("stage", "tokenizer"):
        a, b = (each.stage if name == "stage" else each.tokenizer.sha256 for each in (saved, own))
        if a and b and a != b:
            found.append(Change(name=name, old=a[:_SHOWN], new=b[:_SHOWN]))
    before, after = ([replace(each, at="") for each in one.accepted] for one in (saved, own))
    since = after[len(before) :]
    if after[: len(before)] != before:
        names = (" ".join(e.change.name for e in one) or "nothing" for one in (before, after))
        found.append(Change(name="accepted", old=next(names), new=next(names)))
        since = []
    for change in changes(saved, own):
        let_pass = [each.change for each in since if each.change.name == change.name]
        if not let_pass or (_content(let_pass[0].old), _content(let_pass[-1].new)) != (
            _content(change.old),
            _content(change.new),
        ):
            found.append(change)
    return found


def _content(words: str) -> str:
    """Return of a change's words what its content is known by: a digest, a version, "none"."""
    return _COUNTS.sub("", words)


def _network(record: NetworkRecord | None) -> str:
    if record is None:
        return "none"
    at = "" if record.step is None else f", step {record.step}"
    return f"{record.xxh3_128[:_SHOWN]}{at}"


def _code(code: Code) -> str:
    commit = f" (commit {code.commit})" if code.commit else ""
    return f"{code.xxh3_128[:_SHOWN]}{commit}"
