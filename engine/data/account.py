"""What a run has read of its data, and what of it was left out, cut or dropped: RUN/data.json."""

from dataclasses import dataclass, field
from typing import Any

from engine.data.examples import LengthReport
from engine.data.limits import Limits
from engine.data.records import ReadReport

ACCOUNT = "data.json"
"""The file in a run's folder."""


@dataclass(frozen=True, kw_only=True)
class Account:
    """By the option that names a file."""

    counts: dict[str, dict[str, Any]] = field(default_factory=dict)
    """Records that were read, bad lines that were skipped, and records that were kept or dropped
    for their length."""
    files: dict[str, dict[str, Any]] = field(default_factory=dict)
    """The same in full, with every reason and its number."""

    def add_read(self, name: str, found: ReadReport) -> None:
        """Note how reading a file went."""
        self._counts(name).update(records=found.num_read, skipped=found.num_bad)
        self.files[name] = found.as_object()

    def add_lengths(self, name: str, found: LengthReport, part: str, limits: Limits | None) -> None:
        """Note how much of a file's part, such as "train", was within the limits."""
        counts = self._counts(name)
        for key, number in (("kept", len(found.kept)), ("dropped", found.num_dropped)):
            counts[key] = counts.get(key, 0) + number
        self.files.setdefault(name, {})[part] = {
            "kept": len(found.kept),
            "cut": found.num_cut,
            "dropped": found.num_dropped,
            "dropped_for": {} if limits is None else limits.counts(found),
        }

    def leave_out(self, name: str, number: int, why: str) -> None:
        """Note that so many of a file's records are not read on."""
        if number > 0:
            self.files[name]["left_out"][why] = number

    def _counts(self, name: str) -> dict[str, Any]:
        return self.counts.setdefault(name, {})
