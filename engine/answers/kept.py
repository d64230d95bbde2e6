"""Answers to a file of prompts, kept as they come: what a stopped run has drawn is not drawn again.

While a run goes on, OUT.partial holds what its answers depend on (origin.json) and one file of JSON
lines a replica. Each line has its checksum. When all answers are there they become OUT, in the
prompts' order and in one step, and the folder goes; OUT.origin.json says what OUT was made from.
One run at a time writes there.
"""

import dataclasses
import hashlib
import json
import os
import shutil
from collections.abc import Iterable, Iterator
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import numpy as np
import torch.distributed as dist
import xxhash

from engine.checkpoints.manifest import digest_of_file
from engine.claim import LOCK, claim
from engine.containers.lines import read_lines
from engine.errors import UserError
from engine.files import clear_partials, open_file, replacing, writing
from engine.ranks.first_rank import said_by_first_rank
from engine.ranks.parallel import Parallel
from engine.ranks.same_folder import check_same_folder
from engine.run import changed_setting
from engine.settings.sampling import SamplingConfig
from engine.settings.saved import changed_fields, save_config


@dataclass(frozen=True, kw_only=True)
class Origin:
    """What answers depend on: a file has those of one origin."""

    weights: str
    """The folder they were read from."""
    prompts: str
    """Their digest; see digest_of_prompts."""
    num_samples: int
    """Answers to each prompt: sample n of prompt i is drawn as number i * num_samples + n."""
    sampling: SamplingConfig
    dtype: str
    seed: int
    content: str = ""
    """Digest of what the weights' folder holds."""
    answers: str = ""
    """Digest of the finished file; none while it is not."""


class Answers:
    """The answers to one file of prompts. All ranks make it, and finish it, together."""

    def __init__(
        self,
        out: Path,
        origin: Origin,
        parallel: Parallel,
        num_answers: int,
        *,
        overwrite: bool = False,
    ) -> None:
        """Find what an earlier run has left of num_answers; overwrite: a finished file is replaced,
        whatever it holds. Raises UserError where what is left has another origin or is damaged, and
        where another run writes there. So it does where ranks have other prompts or another folder.
        """
        if said_by_first_rank(lambda: origin.prompts) != origin.prompts:
            raise UserError(
                f"--prompts: rank {dist.get_rank()} reads another file there than the first rank; "
                "have all nodes see the same files"
            )
        self.out = out
        self._origin = origin
        self._overwrite = overwrite
        self.num_answers = num_answers
        self.folder = out.with_name(f"{out.name}.partial")
        found = json.loads(said_by_first_rank(self._open))
        self.is_finished = found is None
        """Whether the file has all of these answers; nothing is to be done then."""
        self.kept: set[int] = set(found or [])
        """The numbers of the answers that are there already."""
        self._part = None
        if self.is_finished:
            return
        check_same_folder(self.folder, self.folder / LOCK, "out")
        if parallel.tp_rank == 0 and parallel.pp_rank == 0:  # one rank of a replica
            self._part = _open_part(self.folder / f"{parallel.replica_rank}.jsonl")

    def add(self, number: int, answer: dict[str, Any]) -> None:
        """Keep one answer; a process that is killed next does not lose it."""
        if self._part is not None:
            content = {"number": number, **answer}
            line = json.dumps(content | {"checksum": _checksum(content)}, ensure_ascii=False) + "\n"
            with writing(Path(self._part.name)):
                self._part.write(line.encode())
                self._part.flush()

    def finish(self) -> None:
        """Write the file, once all answers are there; all ranks call together."""
        if self._part is not None:
            self._part.close()
        dist.barrier()
        said_by_first_rank(self._write)

    def _open(self) -> str:
        """Claim the folder; return the numbers of the kept answers, and leave a note of their
        origin. null where the file is finished."""
        origin = self._origin
        claim(self.folder)
        clear_partials(self.folder)
        clear_partials(self.out.parent, self.out.name)
        numbers, note = [number for number, _ in self._read()], self.folder / "origin.json"
        if os.path.lexists(self.out) and not self._overwrite:
            problem = self._difference()
            if problem is None or not numbers:
                shutil.rmtree(self.folder)
            if problem is None:
                return "null"
            raise UserError(f"{problem}; give another --out, or --overwrite to replace it")
        change = _changed(origin, note) if numbers else None
        if change is not None:
            raise UserError(
                f"{self.folder} has answers with {change}; give another --out, or remove the folder"
            )
        save_config(origin, note)
        return json.dumps(numbers)

    def _difference(self) -> str | None:
        """Return why the finished file is not this run's, None where it is."""
        if not os.path.lexists(self._note):
            return f"{self.out} exists, and nothing says what it was made from"
        origin = dataclasses.replace(self._origin, answers=_digest_of_file(self.out))
        change = _changed(origin, self._note)
        if change is not None and change.startswith("answers "):
            return f"{self.out} has changed since its answers were written"
        return None if change is None else f"{self.out} has answers with {change}"

    @property
    def _note(self) -> Path:
        """Where the origin of the finished file is kept."""
        return self.out.with_name(f"{self.out.name}.origin.json")

    def _read(self) -> Iterator[tuple[int, dict[str, Any]]]:
        """Yield every (number, answer) of the parts; raises UserError for a damaged line."""
        for path in sorted(self.folder.glob("*.jsonl")):
            for line_number, line in read_lines(path):
                if not line.endswith(b"\n"):
                    break  # cut off, where a run was killed
                content = _content(line)
                if content is None or content["number"] >= self.num_answers:
                    raise UserError(f"{path}:{line_number}: damaged; remove the line")
                yield content.pop("number"), content

    def _write(self) -> str:
        answers = dict(self._read())
        if len(answers) != self.num_answers:
            raise UserError(
                f"{self.folder} has {len(answers)} answers of {self.num_answers}: every rank must "
                "see the same folder"
            )
        lines = [
            (json.dumps(answer, ensure_ascii=False) + "\n").encode()
            for _, answer in sorted(answers.items())
        ]
        digest = xxhash.xxh3_128()
        for line in lines:
            digest.update(line)
        # First: a note without its file stands in nobody's way.
        save_config(dataclasses.replace(self._origin, answers=digest.hexdigest()), self._note)
        with replacing(self.out) as stream:
            stream.writelines(lines)
        with writing(self.folder):
            shutil.rmtree(self.folder)
        return ""


def digest_of_weights(folder: Path, *, is_huggingface: bool) -> str:
    """Return a short name for what a network's folder holds: of ours by the checkpoint's manifest,
    which has every file's checksum, of Hugging Face's by the files of weights."""
    if not is_huggingface:
        return _digest_of_file(folder.parent / "manifest.json")
    files = [path for path in sorted(folder.iterdir()) if path.suffix in (".safetensors", ".bin")]
    return xxhash.xxh3_128_hexdigest(" ".join(_digest_of_file(path) for path in files).encode())


def digest_of_prompts(prompts: Iterable[np.ndarray], tokenizer_fingerprint: str) -> str:
    """Return a short name for these prompts' tokens, which other prompts do not have."""
    digest = hashlib.blake2b(tokenizer_fingerprint.encode(), digest_size=8)
    for tokens in prompts:
        digest.update(np.array([len(tokens), *tokens], dtype=np.int64).tobytes())
    return digest.hexdigest()


def _changed(origin: Origin, note: Path) -> str | None:
    """Return changed_setting of an origin; the same network in another folder is no change."""
    changed = changed_fields(origin, note)
    names = {Path(str(path)).name for path in changed.get("weights", ())}
    is_moved = "content" not in changed and len(names) == 1
    return changed_setting(origin, note, passing_over=("weights",) if is_moved else ())


def _digest_of_file(path: Path) -> str:
    return digest_of_file(path).xxh3_128


def _open_part(path: Path) -> Any:
    """Open a replica's file for more lines; a last line that was cut off goes."""
    with writing(path):
        stream = path.open("ab")
        if stream.tell():
            with open_file(path) as written:
                os.truncate(path, written.read().rfind(b"\n") + 1)
        return stream


def _content(line: bytes) -> dict[str, Any] | None:
    """Return the number and the answer of a line, None where it is not as it was written."""
    try:
        content = json.loads(line.decode())
        said = content.pop("checksum")
        is_whole = type(content["number"]) is int and said == _checksum(content)
    except (ValueError, RecursionError, TypeError, AttributeError, KeyError):
        return None
    return content if is_whole and content["number"] >= 0 else None


def _checksum(content: dict[str, Any]) -> str:
    return xxhash.xxh3_64_hexdigest(json.dumps(content).encode())
