"""Answers to a file of prompts, kept as they come: what a stopped run has drawn is not drawn again.

While a run goes on, OUT.partial holds what its answers depend on (origin.json) and one file of JSON
lines a replica. When all answers are there they become OUT, in the prompts' order and in one step,
and the folder goes.
"""

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

from engine.errors import UserError
from engine.files import read_lines, replacing
from engine.ranks.first_rank import said_by_first_rank
from engine.ranks.parallel import Parallel
from engine.run import changed_setting
from engine.settings.sampling import SamplingConfig
from engine.settings.saved import save_config


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


class Answers:
    """The answers to one file of prompts. All ranks make it, and finish it, together."""

    def __init__(self, out: Path, origin: Origin, parallel: Parallel) -> None:
        """Find what an earlier run has left; raises UserError where that has another origin."""
        self.out = out
        self.folder = out.with_name(f"{out.name}.partial")
        self.kept: set[int] = set(json.loads(said_by_first_rank(lambda: self._open(origin))))
        """The numbers of the answers that are there already."""
        self._part = None
        if parallel.tp_rank == 0 and parallel.pp_rank == 0:  # one rank of a replica
            self._part = _open_part(self.folder / f"{parallel.replica_rank}.jsonl")

    def add(self, number: int, answer: dict[str, Any]) -> None:
        """Keep one answer; a process that is killed next does not lose it."""
        if self._part is not None:
            line = json.dumps({"number": number, **answer}, ensure_ascii=False) + "\n"
            self._part.write(line.encode())
            self._part.flush()

    def finish(self, num_answers: int) -> None:
        """Write the file, once all num_answers are there; all ranks call together."""
        if self._part is not None:
            self._part.close()
        dist.barrier()
        said_by_first_rank(lambda: self._write(num_answers))

    def _open(self, origin: Origin) -> str:
        """Return the numbers of the kept answers, and leave a note of their origin."""
        numbers, note = [number for number, _ in self._read()], self.folder / "origin.json"
        change = changed_setting(origin, note) if numbers else None
        if change is not None:
            raise UserError(
                f"{self.folder} has answers with {change}; give another --out, or remove the folder"
            )
        save_config(origin, note)
        return json.dumps(numbers)

    def _read(self) -> Iterator[tuple[int, dict[str, Any]]]:
        """Yield every (number, answer) of the parts; raises UserError for a damaged line."""
        for path in sorted(self.folder.glob("*.jsonl")):
            for line_number, line in read_lines(path):
                if not line.endswith(b"\n"):
                    break  # cut off, where a run was killed
                try:
                    answer = json.loads(line)
                except ValueError:
                    raise UserError(f"{path}:{line_number}: damaged; remove the line") from None
                yield answer.pop("number"), answer

    def _write(self, num_answers: int) -> str:
        answers = dict(self._read())
        if len(answers) != num_answers:
            raise UserError(
                f"{self.folder} has {len(answers)} answers of {num_answers}: every rank must see "
                "the same folder"
            )
        with replacing(self.out) as stream:
            for _, answer in sorted(answers.items()):
                stream.write((json.dumps(answer, ensure_ascii=False) + "\n").encode())
        shutil.rmtree(self.folder)
        return ""


def digest_of_prompts(prompts: Iterable[np.ndarray], tokenizer_fingerprint: str) -> str:
    """Return a short name for these prompts' tokens, which other prompts do not have."""
    digest = hashlib.blake2b(tokenizer_fingerprint.encode(), digest_size=8)
    for tokens in prompts:
        digest.update(np.array([len(tokens), *tokens], dtype=np.int64).tobytes())
    return digest.hexdigest()


def _open_part(path: Path) -> Any:
    """Open a replica's file for more lines; a last line that was cut off goes."""
    stream = path.open("ab")
    if stream.tell():
        os.truncate(path, path.read_bytes().rfind(b"\n") + 1)
    return stream
