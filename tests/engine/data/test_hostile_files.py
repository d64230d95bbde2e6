"""Thousands of damaged and hostile data files: each is read whole or refused in a line or two.

Generated inputs without end are in test_fuzzed_files.py.
"""

import copy
import gzip
import json
import random
from collections.abc import Callable, Iterator
from pathlib import Path
from typing import Any

import pytest

from tests.engine.data.readers import READERS, check

VALUES: list[Any] = [
    *(None, True, 0, -1, 3, 2.5, 10**400, -(10**30), float("nan"), float("inf"), -float("inf")),
    *(
        "",
        " \n",
        "x",
        "\ud800",
        "\udfff\ud83d",
        "\x00",
        "\x1b]52;c;T1dO\x07",
        "\u202e",
        "a" * 99_999,
    ),
    *([], {}, [[]], [{}], [None], ["x"], [1, "b"], {"a": 1}, {"role": "user"}, [[[[[]]]]]),
    *([{"role": "user", "content": "x"}], [{"role": "assistant", "content": "x"}]),
    *([{"role": [], "content": {}}], [{"role": "tool", "content": "x"}], ["x"] * 1000),
]
RAW = [  # in the place of a value; none is JSON's
    *("", "nul", "'x'", "1e999", "-", "01", "0x10", "1_000", "1" * 5000, "1e" + "9" * 5000),
    *('"\\ud800"', '"\\u12"', '"\\x41"', '"\x01"', '"x', "[" * 100_000, '{"a":' * 100_000),
    *("[" * 400 + "]" * 400, "{" * 3, "// x", "undefined", '"x" "y"', '"x"}{', "\x00", "True"),
]


def places(value: Any, path: tuple[Any, ...] = ()) -> Iterator[tuple[Any, ...]]:
    """Yield the path to every field and item of a record."""
    if isinstance(value, dict | list):
        for key in value if isinstance(value, dict) else range(len(value)):
            yield (*path, key)
            yield from places(value[key], (*path, key))


def changed(record: Any, path: tuple[Any, ...], change: Callable[[Any, Any], None]) -> Any:
    record = copy.deepcopy(record)
    parent = record
    for key in path[:-1]:
        parent = parent[key]
    change(parent, path[-1])
    return record


def wrong_records(record: Any) -> Iterator[str]:
    """Yield lines that have something wrong at one place of a record."""
    for path in places(record):
        yield json.dumps(changed(record, path, lambda parent, key: parent.__delitem__(key)))
        for value in VALUES if len(path) < 3 else VALUES[::5]:
            wrong = changed(record, path, lambda parent, key: parent.__setitem__(key, value))  # noqa: B023
            yield json.dumps(wrong)
        if len(path) == 1:
            marked = json.dumps(changed(record, path, lambda p, key: p.__setitem__(key, "MARK")))
            for raw in RAW:
                yield marked.replace('"MARK"', raw)
    first = next(iter(record))
    yield json.dumps({f" {key}": value for key, value in record.items()})
    yield json.dumps({f"{key}\n\x1b[2J" * 1000: value for key, value in record.items()})
    yield json.dumps(record | {f"key {n}": n for n in range(20_000)})
    yield json.dumps({f"key {n}": n for n in range(20_000)})
    yield json.dumps(record)[:-1] + f', "{first}": 3}}'  # the same key twice
    yield json.dumps([record])
    yield json.dumps(json.dumps(record))


def damaged(content: bytes) -> Iterator[bytes]:
    """Yield a file damaged in all the ways that need to know nothing of it."""
    drawn = random.Random(0)
    text = content.decode()
    for num_bytes in range(0, len(content), max(1, len(content) // 12)):
        yield content[:num_bytes]
        yield content[num_bytes:]
    for num_bytes in (1, 2, 3, 10, 1000, 100_000):
        yield drawn.randbytes(num_bytes)
        yield content + drawn.randbytes(num_bytes)
        yield bytes(num_bytes)
        yield content + bytes(num_bytes)
        yield b"\n" * num_bytes + content
    for name in ("utf-16", "utf-16-le", "utf-16-be", "utf-32", "utf-8-sig", "latin-1", "cp1252"):
        yield text.encode(name, "replace")
    for name in ("utf-7", "cp037", "shift-jis", "gb18030"):
        yield text.encode(name, "replace")
    for end in ("\r\n", "\r", "\n\r", "\x0b", "\x0c", "\x1c", "\x85", "\u2028", "\\n", " ", ""):
        yield text.replace("\n", end).encode()
    for bad in (b"\xff", b"\xc0\x80", b"\xed\xa0\x80", b"\xf4\x90\x80\x80", b"\xe2\x82", b"\0"):
        middle = len(content) // 2
        yield bad + content
        yield content[:middle] + bad + content[middle:]
        yield content + bad
    for mark in (b"\xef\xbb\xbf" * 2, b"\xff\xfe", b"\x1f\x8b", b"\x1f\x8b\x08", b"PK\x03\x04"):
        yield mark + content
    yield content.replace(b"\n", b"\n\xef\xbb\xbf")
    yield content.replace(b"\n", b"")
    yield content.replace(b'"', b"'")


def packed(content: bytes) -> Iterator[bytes]:
    """Yield gzip of a file, sound and damaged."""
    whole = gzip.compress(content)
    for position in range(len(whole)):
        yield whole[:position]
        flipped = bytearray(whole)
        flipped[position] ^= 1 << position % 8
        yield bytes(flipped)
    half = content.index(b"\n") + 1
    parts = gzip.compress(content[:half]) + gzip.compress(content[half:])
    yield from (parts, parts[:-1], parts + bytes(99), parts + b"x", b"\0" + parts, parts[::-1])
    yield gzip.compress(whole)
    yield gzip.compress(b"") * 3
    yield gzip.compress(b"") + whole


def hostile_files(name: str) -> Iterator[bytes]:
    reader = READERS[name]
    content = reader.content()
    yield from damaged(content)
    yield from packed(content)
    if reader.suffix == ".jsonl":
        for record in reader.records:
            for line in wrong_records(record):
                yield content + line.encode("utf-8", "surrogatepass") + b"\n" + content


@pytest.mark.parametrize("name", READERS)
def test_a_good_file_is_read_whole(name: str, tmp_path: Path):
    reader = READERS[name]
    found = check(name, tmp_path, reader.content())
    assert len(found) == (1 if reader.suffix == ".txt" else len(reader.records))


@pytest.mark.parametrize("name", READERS)
def test_a_hostile_file_is_read_whole_or_refused(name: str, tmp_path: Path):
    found = [check(name, tmp_path, content) for content in hostile_files(name)]
    refused = [each for each in found if isinstance(each, str)]
    assert len(found) > 200
    assert len(refused) > len(found) // 3


@pytest.mark.parametrize("name", READERS)
def test_gzip_with_a_flipped_bit_is_refused_or_the_same(name: str, tmp_path: Path):
    content = READERS[name].content()
    sound, whole = check(name, tmp_path, content), gzip.compress(content, mtime=0)
    outcomes = []
    for bit in range(8 * len(whole)):
        flipped = bytearray(whole)
        flipped[bit // 8] ^= 1 << bit % 8
        if flipped[:2] != b"\x1f\x8b":  # no gzip any more, and no JSON either
            continue
        outcomes.append(check(name, tmp_path, bytes(flipped)))
    assert all(isinstance(each, str) or each == sound for each in outcomes)
    assert sum(isinstance(each, str) for each in outcomes) > 0.8 * len(outcomes)
