"""What no data is read from, told by its content: what it is, and what to do with it."""

import re
from pathlib import Path

from engine.errors import UserError, named
from engine.files import MAX_SHOWN_PATH, refuse_lfs_pointer

HEAD_BYTES = 1 << 16
"""Of a file's content, by which it is known."""
_UNPACK = "unpack it, and name the files in it"
_PICKLE = (
    "a pickle, as of torch.save, which could run code: load it where you trust it, and write JSON "
    "lines"
)
_TABLES = "write its rows as JSON lines, CSV or parquet"
_BEGINNINGS: tuple[tuple[bytes, str], ...] = (  # regular expressions; the first that fits counts
    (rb"PK\x03\x04.{26}(\[Content_Types\]|_rels/|xl/)", "an Excel workbook: save it as CSV"),
    (rb"PK\x03\x04.{26}[^\0]{1,200}\.npy", f"numpy's .npz: {_TABLES}"),
    (rb"PK\x03\x04.{26}[^\0]{1,200}(/data\.pkl|/\.format_version|/\.data/)", _PICKLE),
    (rb"PK(\x03\x04|\x05\x06)", f"a zip archive: {_UNPACK}"),
    (rb"7z\xbc\xaf\x27\x1c", f"a 7z archive: {_UNPACK}"),
    (rb"Rar!\x1a\x07", f"a rar archive: {_UNPACK}"),
    (rb".{257}ustar", f"a tar archive: {_UNPACK}"),
    (rb"\x04\x22\x4d\x18|\xff\x06\0\0sNaPpY", "packed by lz4 or snappy: unpack it, or use zstd"),
    (rb"\x80[\x02-\x05][\x95cX}\](\x8a\x8c]", _PICKLE),
    (rb"SQLite format 3\0", f"an SQLite database: {_TABLES}"),
    (rb"\x89HDF\r\n\x1a\n", f"an HDF5 file: {_TABLES}"),
    (rb"\x93NUMPY", f"numpy's .npy: {_TABLES}"),
    (rb"\xd0\xcf\x11\xe0\xa1\xb1\x1a\xe1", "an old Office file, such as .xls: save it as CSV"),
    (rb"Obj\x01", f"an Avro file: {_TABLES}"),
    (rb"FEA1\0", "Feather of version 1: write it by pyarrow.feather of today"),
    (rb"PARE.{0,8}[\0-\x08\x0e-\x1f]", "encrypted parquet: write it without encryption"),
    (rb"%PDF-", "a PDF: take the text out of it first"),
    (rb"(\xff\xfe\0\0|\0\0\xfe\xff)", "UTF-32: `iconv -f utf-32 -t utf-8` makes it UTF-8"),
    (rb"(\xff\xfe|\xfe\xff)", "UTF-16: `iconv -f utf-16 -t utf-8` makes it UTF-8"),
)
_KINDS = tuple((re.compile(magic, re.DOTALL), what) for magic, what in _BEGINNINGS)
_PAGE = re.compile(rb"(\xef\xbb\xbf)?\s*<(!doctype\s+html|html|head|\?xml)", re.IGNORECASE)


def refuse_other_kinds(path: Path, head: bytes, *, is_prose: bool = False) -> None:
    """Raise UserError where a file that begins so holds no data: it says what the file is, and what
    to do. is_prose: it is read as text, which may be a page's."""
    refuse_lfs_pointer(path, head)
    name = named(path, MAX_SHOWN_PATH)
    for magic, what in _KINDS:
        if magic.match(head):
            raise UserError(f"{name} is {what}")
    if not is_prose and _PAGE.match(head):
        raise UserError(
            f"{name} is a page of HTML or XML, as a download that failed leaves it: look into it, "
            "and download the file itself"
        )
    if encoding := _wide_encoding(head):
        raise UserError(f"{name} is {encoding}: `iconv -f {encoding} -t utf-8` makes it UTF-8")
    if head and not head.strip(b"\0"):
        raise UserError(f"{name}:1: not text: it begins with {len(head)} NULs; copy it again")


def _wide_encoding(head: bytes) -> str:
    """Return which encoding of several bytes a character a text of Latin letters has, told by where
    its NULs are; "" where it has no such one."""
    part = head[: min(len(head), 256) // 4 * 4]
    zeros = tuple(part[start::4].count(0) * 16 > 3 * len(part) for start in range(4))
    patterns: dict[tuple[bool, ...], str] = {
        (False, True, True, True): "utf-32le",
        (True, True, True, False): "utf-32be",
        (False, True, False, True): "utf-16le",
        (True, False, True, False): "utf-16be",
    }
    return patterns.get(zeros, "") if part else ""
