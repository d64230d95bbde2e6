"""What a choice among a log's records needs to know of each: some fifty bytes, whatever its text.

An entry is a record in one data set. Texts stay on the disk: the logs are read once for this, and
once more to be written.
"""

import hashlib
import re
from array import array
from typing import NamedTuple

import numpy as np

from engine.prepare.logs import SETS, LogRecord

_LINE = re.compile(r" \(line \d+\)$")  # behind the number of a record in a list
_KEY_BYTES = 16  # two of 1e6 different prompts meet with a chance of 1e-27


class Entries(NamedTuple):
    """Columns [n], in the order of the logs, and the logs' names."""

    files: tuple[str, ...]
    """What is before the number of a line, of each log."""
    file: np.ndarray
    """Which of them."""
    line: np.ndarray
    """In it, from 1."""
    dataset: np.ndarray
    """Which of SETS."""
    prompt: np.ndarray
    """Equal where two prompts are duplicates; otherwise in the order of a hash."""
    user: np.ndarray
    """A hash of the user, evenly over 64 bits; of the prompt where the record has no user."""
    divided: np.ndarray
    """What a split keeps on one side: the same, but a hash of the prompt where all are of one."""
    time: np.ndarray
    """Seconds; inf where the record has none."""

    is_by_user: bool
    """Whether that is by users: of one user alone, or of nobody, it is by prompts."""

    def where(self, entry: int) -> str:
        """Return FILE:LINE of an entry."""
        return f"{self.files[self.file[entry]]}{self.line[entry]}"


class EntryList:
    """Entries as they are read."""

    def __init__(self, *, prefix_characters: int, seed: int) -> None:
        self._prefix_characters = prefix_characters
        self._seed = seed
        self._files: dict[str, int] = {}
        self._file, self._line, self._dataset = array("I"), array("Q"), array("B")
        self._keys, self._user, self._time = bytearray(), array("Q"), array("d")
        self._has_users = False

    def add(self, where: str, record: LogRecord) -> None:
        """Add a record, once for each data set that it is for; where: FILE:LINE, or FILE: record
        NUMBER."""
        where = _LINE.sub("", where)
        name = where.rstrip("0123456789")
        file, line = self._files.setdefault(name, len(self._files)), int(where[len(name) :])
        # Two texts share their first n characters, or are equal and shorter, where these are equal.
        key = _hash(record.compared_text()[: self._prefix_characters], _KEY_BYTES)
        user = self._drawn(key.hex() if record.user is None else f"user {record.user}")
        self._has_users = self._has_users or record.user is not None
        for name in record.sets():
            self._file.append(file)
            self._line.append(line)
            self._dataset.append(SETS.index(name))
            self._keys += key
            self._user.append(user)
            self._time.append(record.time)

    def __len__(self) -> int:
        return len(self._file)

    def entries(self) -> Entries:
        """Return all that were added."""
        keys = np.frombuffer(bytes(self._keys), dtype="<u8").reshape(-1, 2)
        user = np.frombuffer(self._user, dtype=np.uint64)
        is_of_one = self._has_users and len(user) > 0 and bool(np.all(user == user[0]))
        return Entries(
            files=tuple(self._files),
            file=np.frombuffer(self._file, dtype=np.uint32),
            line=np.frombuffer(self._line, dtype=np.uint64),
            dataset=np.frombuffer(self._dataset, dtype=np.uint8),
            prompt=_numbered(keys),
            user=user,
            divided=self._drawn_by_prompt() if is_of_one else user,
            is_by_user=self._has_users and not is_of_one,
            time=np.frombuffer(self._time, dtype=np.float64),
        )

    def _drawn_by_prompt(self) -> np.ndarray:
        starts = range(0, len(self._keys), _KEY_BYTES)
        drawn = (self._drawn(self._keys[i : i + _KEY_BYTES].hex()) for i in starts)
        return np.fromiter(drawn, dtype=np.uint64, count=len(starts))

    def _drawn(self, name: str) -> int:
        return int.from_bytes(_hash(f"{self._seed} {name}", 8), "little")


def _hash(text: str, num_bytes: int) -> bytes:
    return hashlib.blake2b(text.encode(), digest_size=num_bytes).digest()


def _numbered(keys: np.ndarray) -> np.ndarray:
    """Return [n] the rank of each key of [n, 2] among the different ones."""
    order = np.lexsort((keys[:, 1], keys[:, 0]))
    ranked = keys[order]
    is_new = np.any(ranked[1:] != ranked[:-1], axis=1)
    numbers = np.empty(len(keys), dtype=np.int64)
    numbers[order] = np.concatenate([[0], np.cumsum(is_new)]) if len(keys) else []
    return numbers
