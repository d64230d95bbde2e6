"""Which container a file is: its content says so, and its name where that does not."""

import json
import re
from pathlib import Path
from typing import Any

from engine.containers.json_lines import UTF8_BOM
from engine.containers.json_values import list_field
from engine.containers.lines import MAX_LINE_BYTES, read_lines
from engine.containers.packed import beginning_of
from engine.containers.refused import HEAD_BYTES, refuse_other_kinds
from engine.errors import UserError, named
from engine.files import MAX_SHOWN_PATH

PACKED_ENDINGS = (".gz", ".zst", ".xz", ".bz2")
"""That a name may have behind that of its kind."""
ENDINGS = {
    "JSON": (".jsonl", ".json", ".ndjson"),
    "CSV": (".csv", ".tsv", ".tab"),
    "parquet": (".parquet", ".pq"),
    "Arrow": (".arrow", ".feather", ".ipc"),
    "text": (".txt", ".md"),
}
"""Of names, by kind."""
_COLUMNAR = {
    "parquet": re.compile(rb"PAR1([^\x20-\x7e]|$)"),
    "arrow": re.compile(rb"ARROW1\0\0"),
    # A message of Arrow's, whose length stands before it: of its schema, some kilobytes.
    "arrow stream": re.compile(rb"\xff\xff\xff\xff..[\0-\x3f]\0", re.DOTALL),
}
_FIELDS = {
    *("prompt", "response", "completion", "text", "question", "answer", "instruction", "input"),
    *("output", "messages", "chosen", "rejected", "completions", "ranks", "query"),
    *("conversations", "conversation", "inputs", "targets", "context", "label", "scores"),
}
"""Names that a header has of which a table is known, whatever its own name is."""
_WORD = re.compile(r"\w[\w.-]*")
DELIMITERS = {"\t": "tabs", ",": "commas", ";": "semicolons", "|": "bars"}
"""Of cells, and what they are called."""
SAYS_DELIMITER = re.compile(r"sep=(.)", re.IGNORECASE)
"""Excel's first line, which is no header."""


def ending_of(path: Path | str) -> str:
    """Return the ending of a file's name, without that of its packing, in small letters."""
    name = Path(path).name.lower()
    for packed in PACKED_ENDINGS:
        name = name.removesuffix(packed)
    return Path(name).suffix


def kind_of(path: Path) -> tuple[str, str]:
    """Return which container a file is, and in which form.

    ("lines", ""), ("values", "list" | "objects" | "object"), ("delimited", the delimiter),
    ("prompts", "") or ("columnar", "parquet" | "arrow" | "arrow stream"). Raises UserError for a
    file that is none.
    """
    name, ending = named(path, MAX_SHOWN_PATH), ending_of(path)
    packing, head = beginning_of(path, HEAD_BYTES)
    for form, magic in _COLUMNAR.items():
        if magic.match(head):
            if packing:
                raise UserError(f"{name} is {form} packed by {packing}: unpack it")
            return "columnar", form
    refuse_other_kinds(path, head)
    text = head.removeprefix(UTF8_BOM).lstrip()
    if text[:1] == b"[":
        return _kind_of_list(text)
    if text[:1] == b"{":
        return _kind_of_objects(path, name)
    found = _kind_by_name(text, ending)
    if head and found[0] == "lines" and ending in ENDINGS["parquet"] + ENDINGS["Arrow"]:
        raise UserError(
            f"{name} is called {ending}, and is no such file, or a damaged one: rename it after "
            "what it is, or download it again"
        )
    if head.strip() and found[0] == "lines" and ending in ENDINGS["text"]:
        if ending != ".txt":
            raise UserError(
                f"{name} is plain text, which is read as pretraining text; prompts may be lines of "
                "a .txt, and all else wants rows"
            )
        return "prompts", ""
    return found


def _kind_of_list(text: bytes) -> tuple[str, str]:
    """Return what a file is whose first line begins as a list does: a list, unless that ends with
    the line and more follows, as in lines of which the first is bad."""
    line, _, rest = text.partition(b"\n")
    try:
        json.loads(line)
    except (ValueError, RecursionError):
        return "values", "list"
    return ("lines", "") if rest.strip() else ("values", "list")


def _kind_of_objects(path: Path, name: str) -> tuple[str, str]:
    """Return what a file is whose content begins as an object does."""
    first, more = _first_lines(path)
    if len(first) > MAX_LINE_BYTES:
        return "values", "object"
    try:
        only = json.loads(first)
    except (ValueError, RecursionError, MemoryError):
        return _kind_over_lines(path, name)
    if more or not isinstance(only, dict):
        return "lines", ""
    return ("values", "object") if _is_around_rows(only, name) else ("lines", "")


def _first_lines(path: Path) -> tuple[bytes, bool]:
    """Return a file's first line that is not empty, or a part of over MAX_LINE_BYTES, and whether
    there is another one."""
    first, first_number = b"", 0
    for number, line in read_lines(path, part_bytes=MAX_LINE_BYTES):
        if not first_number:
            if line := line.removeprefix(UTF8_BOM).strip():
                first, first_number = line, number
        elif number == first_number:
            return first + line, True
        elif line.strip():
            return first, True
    return first, False


def _kind_over_lines(path: Path, name: str) -> tuple[str, str]:
    """Return what a file is whose first line is no JSON: objects over several lines, where they
    are sound JSON to behind the beginning of the second line, and that is none by itself; else
    lines, of which one is bad."""
    content = beginning_of(path, MAX_LINE_BYTES)[1].removeprefix(UTF8_BOM)
    text = content.decode("utf-8", "replace")
    start = len(text) - len(text.lstrip())
    end_of_line = text.find("\n", start)
    second = len(text) - len(text[end_of_line:].lstrip()) if end_of_line >= 0 else len(text)
    try:
        only, end = json.JSONDecoder().raw_decode(text, start)
    except json.JSONDecodeError as error:
        if error.pos <= second or _is_whole_object(text[second:].partition("\n")[0]):
            return "lines", ""
        is_cut = len(content) >= MAX_LINE_BYTES and error.pos > len(text) // 2
        return "values", "object" if is_cut else "objects"
    except (ValueError, RecursionError, MemoryError):
        return "lines", ""
    if end <= end_of_line:
        return "lines", ""
    is_only = isinstance(only, dict) and not text[end:].strip()
    return "values", "object" if is_only and _is_around_rows(only, name) else "objects"


def _is_whole_object(line: str) -> bool:
    try:
        return isinstance(json.loads(line), dict)
    except (ValueError, RecursionError):
        return False


def _is_around_rows(only: dict[str, Any], name: str) -> bool:
    """Return whether a file's only object has the rows in a field; UserError where it has columns,
    as pandas writes them unless it is told otherwise."""
    is_split = "columns" in only and isinstance(only.get("data"), list) and not list_field(only)
    if is_split or only and all(isinstance(v, dict) and "0" in v for v in only.values()):
        raise UserError(
            f"{name} holds columns and not rows, as pandas' to_json writes them: write it with "
            "orient='records', lines=True"
        )
    return bool(list_field(only))


def _kind_by_name(text: bytes, ending: str) -> tuple[str, str]:
    """Return what a file is that begins as no JSON does: a table where its name says so or its
    header does, else lines."""
    header = text.partition(b"\n")[0].partition(b"\r")[0].decode("utf-8", "replace")
    if ending in ENDINGS["CSV"]:
        return "delimited", _delimiter(header, ending)
    for delimiter in DELIMITERS:
        cells = _cells(header, delimiter)
        num_known = len(_FIELDS & set(cells))
        # A line of prose may be "text, and more text".
        if len(cells) > 1 and (num_known > 1 or num_known and all(map(_WORD.fullmatch, cells))):
            return "delimited", delimiter
    return "lines", ""


def _delimiter(header: str, ending: str) -> str:
    """Return what stands between the cells of a table: what Excel's first line says, or what gives
    a header the most names that are known."""
    if said := SAYS_DELIMITER.fullmatch(header.strip()):
        return said[1] if said[1] in DELIMITERS else ","
    usual = "\t" if "\t" in header or ending != ".csv" else ","
    order = (usual, *(each for each in DELIMITERS if each != usual))
    best = max(order, key=lambda each: len(_FIELDS & set(_cells(header, each))))
    if len(_cells(header, best)) > 1 or ";" not in header:
        return best
    return ";"


def _cells(header: str, delimiter: str) -> list[str]:
    return [cell.strip().strip('"') for cell in header.split(delimiter)]
