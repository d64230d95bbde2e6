import gzip
import os
import tracemalloc
from collections.abc import Callable
from pathlib import Path

import pytest

from engine.containers.lines import MAX_LINE_BYTES, read_lines
from engine.errors import UserError


@pytest.mark.parametrize("pack", [bytes, lambda content: gzip.compress(content, 1)])
def test_a_line_has_so_many_bytes_at_most(tmp_path: Path, pack: Callable[[bytes], bytes]) -> None:
    path = tmp_path / "long.jsonl"
    longest = b"x" * (MAX_LINE_BYTES - 1) + b"\n"
    path.write_bytes(pack(b"a\n" + longest + b"b"))
    assert [line for _, line in read_lines(path)] == [b"a\n", longest, b"b"]
    path.write_bytes(pack(b"a\nx" + longest + b"b"))
    with pytest.raises(UserError, match=rf"long\.jsonl:2: a line of over {MAX_LINE_BYTES} bytes"):
        list(read_lines(path))
    parts = list(read_lines(path, part_bytes=MAX_LINE_BYTES // 2))
    assert [number for number, _ in parts] == [1, 2, 2, 2, 3]
    assert b"".join(part for _, part in parts) == b"a\nx" + longest + b"b"


def test_a_file_without_a_newline_takes_no_more_memory_than_a_line(tmp_path: Path) -> None:
    (tmp_path / "zeros").touch()
    os.truncate(tmp_path / "zeros", 1 << 40)
    with gzip.open(tmp_path / "zeros.gz", "wb", compresslevel=1) as stream:
        for _ in range(100):
            stream.write(bytes(1 << 20))
    for name in ("zeros", "zeros.gz"):
        tracemalloc.start()
        with pytest.raises(UserError, match=rf"{name}:1: a line of over"):
            list(read_lines(tmp_path / name))
        peak_bytes = tracemalloc.get_traced_memory()[1]
        tracemalloc.stop()
        assert peak_bytes < 4 * MAX_LINE_BYTES


@pytest.mark.parametrize("pack", [bytes, lambda content: gzip.compress(content, 1)])
@pytest.mark.parametrize("line", [b"\n", b" " * 999 + b"\n"])
def test_empty_lines_do_not_go_on_for_ever(
    tmp_path: Path, line: bytes, pack: Callable[[bytes], bytes]
) -> None:
    path = tmp_path / "empty.jsonl"
    path.write_bytes(pack(b"a\n" + line * ((5 << 20) // len(line))))
    with pytest.raises(UserError, match=r"empty\.jsonl:\d+: \d+ bytes to here are empty lines"):
        list(read_lines(path))
    path.write_bytes(pack((b"abcd\n" + line[-3:] * 2) * 100_000))  # every other line is ordinary
    assert sum(1 for _ in read_lines(path)) > 100_000
