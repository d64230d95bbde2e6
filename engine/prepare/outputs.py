"""The files of a preparation: what is kept in its data set, what is dropped with the reason."""

import contextlib
import json
from collections.abc import Callable, Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Any, BinaryIO

import numpy as np

from engine.files import replacing
from engine.prepare.choice import Verdict
from engine.prepare.entries import Entries
from engine.prepare.logs import SETS, LogRecord
from engine.prepare.personal import PersonalData, num_reserved_emails
from engine.prepare.split import SPLITS, Moved
from engine.prepare.summary import Summary
from engine.settings.prepare import PrepareConfig

_DROPPED = "dropped.jsonl"
_REASONS = {
    Verdict.DUPLICATE: "duplicate",
    Verdict.OVER_CAP: "over_cap",
    Verdict.TRAINED_ON: "trained_on",
}


@dataclass(frozen=True, kw_only=True)
class Decided:
    """What was chosen of the entries."""

    entries: Entries
    original: np.ndarray
    """[n] the entry that is kept instead of a duplicate."""
    side: np.ndarray
    """[n] which of SPLITS."""
    verdict: np.ndarray
    """[n] a Verdict."""
    moved: Sequence[Moved] = ()
    """Of few users, who were moved to an empty side."""

    def split_as_object(self) -> dict[str, Any]:
        """Return how it was split, as report.json has it."""
        moved = [{"set": each.dataset, "split": each.split, "of": each.of} for each in self.moved]
        return {"by": "user" if self.entries.is_by_user else "prompt", "moved": moved}


class Outputs:
    """The open files of one folder, each made when something is to be in it."""

    def __init__(
        self,
        config: PrepareConfig,
        chosen: Decided,
        summary: Summary,
        personal: PersonalData | None,
        language: Callable[[str], str],
    ) -> None:
        """personal: what finds personal data, None where nobody looks for them."""
        self._config = config
        self._chosen = chosen
        self._summary = summary
        self._personal = personal
        self._language = language
        self._next = 0  # entry: records come in the order of the logs, as entries lie
        self._streams: dict[str, BinaryIO] = {}
        self._open_files = contextlib.ExitStack()
        self._folder = Path()

    @contextlib.contextmanager
    def within(self, folder: Path) -> Any:
        """Write into a folder in this block; what is written is whole when it ends."""
        self._folder = folder
        with self._open_files:
            yield self

    def bad_line(self, where: str, why: str) -> None:
        """Write that a line could not be read."""
        self._summary.drop("", "bad_line")
        self._write(_DROPPED, {"where": where, "reason": "bad_line", "why": why})

    def record(self, where: str, record: LogRecord) -> None:
        """Write a record into the data sets that it is kept in, or that it was dropped and why."""
        names = record.sets()
        first, self._next = self._next, self._next + len(names)
        verdicts = self._chosen.verdict[first : self._next]
        split = SPLITS[self._chosen.side[first]]  # of its user, and so the same in all data sets
        kinds: set[str] = set()
        if Verdict.KEPT in verdicts and self._is_searched(split):
            assert self._personal is not None
            kinds = {found.kind for text in record.texts() for found in self._personal.find(text)}
            self._summary.reserved_emails += sum(map(num_reserved_emails, record.texts()))
            if kinds:
                self._summary.personal(kinds)
                if self._config.personal == "mask":
                    record, kinds = record.changed(self._personal.masked), set()
        for name, why in record.left_out:
            self._summary.read[name] += 1
            self._drop(name, "left_out", where, record, why=why)
        language = ""
        if Verdict.KEPT in verdicts and not kinds:
            language = self._language(record.prompt_text())
        for index, name in enumerate(names, start=first):
            self._summary.read[name] += 1
            verdict = self._chosen.verdict[index]
            if verdict == Verdict.KEPT and not kinds:
                user = int(self._chosen.entries.user[index])
                self._summary.keep(name, split, record, user=user, language=language)
                self._write(f"{name}.{split}.jsonl", record.row(name, where))
                continue
            reason = "personal" if verdict == Verdict.KEPT else _REASONS[Verdict(verdict)]
            more: dict[str, Any] = {}
            if reason == "personal":
                more["kinds"] = sorted(kinds)
            elif reason == "duplicate":
                more["of"] = self._chosen.entries.where(self._chosen.original[index])
            self._drop(name, reason, where, record, **more)

    def _drop(self, name: str, reason: str, where: str, record: LogRecord, **more: Any) -> None:
        self._summary.drop(name, reason)
        row = {"where": where, "id": record.id, "set": name, "reason": reason}
        self._write(_DROPPED, row | more)

    def _is_searched(self, split: str) -> bool:
        everywhere = self._config.personal_splits == "all"
        return self._personal is not None and (everywhere or split == "train")

    def _write(self, name: str, row: dict[str, Any]) -> None:
        if name not in self._streams:
            self._streams[name] = self._open_files.enter_context(replacing(self._folder / name))
        self._streams[name].write(json.dumps(row, ensure_ascii=False).encode() + b"\n")


def largest_duplicates(chosen: Decided, most: int) -> list[dict[str, Any]]:
    """Return which kept prompts have the most duplicates, and how many times they were there."""
    kept, times = np.unique(chosen.original, return_counts=True)
    order = np.lexsort((kept, -times))[:most]
    return [
        {
            "set": SETS[chosen.entries.dataset[kept[i]]],
            "kept": chosen.entries.where(kept[i]),
            "times": int(times[i]),
        }
        for i in order
        if times[i] > 1
    ]
