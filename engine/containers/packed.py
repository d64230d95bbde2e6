"""The content of a file, unpacked where it is packed: gzip, zstd, xz and bzip2, told by its first
bytes. A .gz may have been unpacked where it lies."""

import bz2
import contextlib
import io
import lzma
import os
import re
import zlib
from collections.abc import Callable, Iterator
from io import BufferedReader
from pathlib import Path
from typing import Any, BinaryIO

from engine.errors import UserError, named
from engine.files import MAX_SHOWN_PATH, open_file

_BEGINNINGS = {
    "gzip": re.compile(rb"\x1f\x8b"),
    "zstd": re.compile(rb"\x28\xb5\x2f\xfd|[\x50-\x5f]\x2a\x4d\x18"),  # a frame, or one to skip
    "xz": re.compile(rb"\xfd7zXZ\0"),
    "bzip2": re.compile(rb"BZh[1-9](1AY&SY|\x17rE8P\x90)"),  # a block, or the end
}
_MAGIC_BYTES = 10
# gzip expands at most 1,030 times, at its fastest 230 times, and text of any use 3 to 30 times:
# data repeats itself, but less within the 32 KiB that gzip sees. The others see more, and expand
# zeros millions of times. Our choice: from 128 MiB on, what expands 100 times is a bomb.
_MAX_EXPANSION = 100
_MIN_BOMB_BYTES = 128 << 20
_MAX_EMPTY_MEMBERS = 1000  # in a row; our choice: block gzip (BGZF) ends with one
_MAX_XZ_BYTES = 256 << 20  # of memory; our choice: `xz -9` takes 65 MiB to unpack
_PACKED_BYTES = 1 << 16
_UNPACKED_BYTES = 1 << 17


class PackedError(Exception):
    """What is wrong with packed data; `at` says it with what was reached."""

    def __init__(self, what: str, why: str = "", *, remedy: str = "copy the file again") -> None:
        super().__init__(what)
        self._why, self._remedy = why, remedy

    def at(self, where: str) -> str:
        """Return all of it; where: such as "line 17"."""
        return f"{self} after {where}{self._why}; {self._remedy}"


class Content:
    """What is in an open file."""

    def __init__(self, raw: BufferedReader) -> None:
        self._raw = raw
        self._num_bytes = max(1, os.fstat(raw.fileno()).st_size)
        self.packing = packing_of(raw.read(_MAGIC_BYTES))
        """How it is packed: gzip, zstd, xz, bzip2; "" where it is not."""
        raw.seek(0)
        self.stream: BufferedReader = raw
        """To read it from; raises PackedError."""
        if self.packing:
            self.stream = BufferedReader(_Unpacked(raw, self.packing), _UNPACKED_BYTES)

    def share(self) -> float:
        """Return which share of the file's bytes has been read."""
        return self._raw.tell() / self._num_bytes


def packing_of(beginning: bytes) -> str:
    """Return how a file is packed that begins so; "" where it is not."""
    return next((name for name, magic in _BEGINNINGS.items() if magic.match(beginning)), "")


@contextlib.contextmanager
def open_content(path: Path, where: Callable[[], str]) -> Iterator[Content]:
    """Open a file for a block; what goes wrong with reading it there is a UserError with its name
    and what was reached."""
    with open_file(path) as raw, _saying(path, where):
        yield Content(raw)


def beginning_of(path: Path, num_bytes: int) -> tuple[str, bytes]:
    """Return how a file is packed, and the beginning of its content, or of what is not damaged of
    it; UserError where it cannot be opened or read."""
    found = bytearray()
    with open_file(path) as raw, _saying(path, lambda: f"byte {len(found)}"):
        content = Content(raw)
        with contextlib.suppress(PackedError):
            while len(found) < num_bytes:
                part = content.stream.read1(num_bytes - len(found))
                if not part:
                    break
                found += part
    return content.packing, bytes(found)


@contextlib.contextmanager
def _saying(path: Path, where: Callable[[], str]) -> Iterator[None]:
    name = named(path, MAX_SHOWN_PATH)
    try:
        yield
    except PackedError as error:
        raise UserError(f"{name}: {error.at(where())}") from None
    except OSError as error:
        raise UserError(f"{name}: cannot be read: {error.strerror}") from None


class _Unpacked(io.RawIOBase):
    """The content of packed data, of all members in turn, unpacked no further than it is read.
    Raises PackedError."""

    def __init__(self, raw: BinaryIO, packing: str) -> None:
        super().__init__()
        self._raw, self._packing = raw, packing
        self._take = self._take_frames(raw) if packing == "zstd" else self._take_members
        self._packed = b""
        self._member: Any = None  # decompressors have no public type in common
        self._num_bytes = 0
        self._num_empty = 0
        self._is_empty = True

    def readable(self) -> bool:
        return True

    def readinto(self, buffer: Any, /) -> int:
        """Fill the buffer's beginning; returns how many bytes that are, 0 at the end."""
        content = self._take(len(buffer))
        buffer[: len(content)] = content
        return len(content)

    def _take_frames(self, raw: BinaryIO) -> Callable[[int], bytes]:
        """Return what reads zstd; pyarrow's takes no frame whose window is over 128 MiB."""
        import pyarrow  # not where no file is zstd: it is 0.2 seconds

        frames = pyarrow.CompressedInputStream(pyarrow.PythonFile(raw, mode="r"), "zstd")

        def take(most: int) -> bytes:
            try:
                content: bytes = frames.read(most)
            except OSError as error:
                if error.errno is not None:  # the system's, of the file
                    raise
                raise (
                    self._ends_early() if "Truncated" in str(error) else _damage("zstd", error)
                ) from None
            self._count(len(content))
            return content

        return take

    def _take_members(self, most: int) -> bytes:
        while True:
            packed = self._packed
            if not packed and (self._member is None or getattr(self._member, "needs_input", True)):
                packed = self._raw.read(_PACKED_BYTES)
            if self._member is None:
                self._packed = packed.lstrip(b"\0")  # padding, where a member could begin
                if not packed:
                    return b""
                if not self._packed:
                    continue
                packed, self._member = self._packed, _member(self._packing)
                self._is_empty = True
            try:
                content: bytes = self._member.decompress(packed, most)
            except (zlib.error, lzma.LZMAError, OSError, ValueError) as error:
                raise _damage(self._packing, error) from None
            has_ended = self._member.eof
            if not (packed or content or has_ended) and getattr(self._member, "needs_input", True):
                raise self._ends_early()
            unread = getattr(self._member, "unconsumed_tail", b"")
            self._packed = self._member.unused_data if has_ended else unread
            self._is_empty = self._is_empty and not content
            if has_ended:
                self._member = None
                self._num_empty = self._num_empty + 1 if self._is_empty else 0
            self._count(len(content))
            if content:
                return content

    def _ends_early(self) -> PackedError:
        return PackedError(f"the {self._packing} data ends early,")

    def _count(self, num_new: int) -> None:
        """Raise PackedError where what has been unpacked so far is no text."""
        self._num_bytes += num_new
        problem, num_packed = "", self._raw.tell()
        if self._num_empty > _MAX_EMPTY_MEMBERS:
            problem = f"{self._packing} data of {self._num_empty} empty members in a row"
        if self._num_bytes > max(_MIN_BOMB_BYTES, _MAX_EXPANSION * num_packed):
            problem = f"{num_packed} bytes of {self._packing} data are {self._num_bytes} unpacked"
        if problem:
            raise PackedError(f"{problem},", remedy="unpack the file, if it is meant so")


def _member(packing: str) -> Any:
    if packing == "gzip":
        return zlib.decompressobj(wbits=31)
    if packing == "xz":
        return lzma.LZMADecompressor(lzma.FORMAT_XZ, memlimit=_MAX_XZ_BYTES)
    return bz2.BZ2Decompressor()


def _damage(packing: str, error: Exception) -> PackedError:
    return PackedError(f"damaged {packing} data", f" ({error})")
