"""JSON that is not lines: a list of objects, an object with such a list, or objects one after the
other, over any lines. It is read a part at a time, and no more than a record is in memory."""

import codecs
import json
import re
from collections.abc import Callable, Iterator
from pathlib import Path
from typing import Any, NoReturn

from engine.containers.json_lines import ENCODING_ADVICE, only_object
from engine.containers.lines import MAX_EMPTY_BYTES, MAX_LINE_BYTES
from engine.containers.packed import Content, open_content
from engine.containers.row import BadRecord, RowOrBad, json_type
from engine.errors import UserError, named, quoted
from engine.files import MAX_SHOWN_PATH

_PART_BYTES = 1 << 20  # that are read at a time; a longer record takes twice as many each time
_CUT_CHARACTERS = 32  # within so many of a part's end an error may be the cut's
_GAP = re.compile(r"[ \t\n\r]*")
_NEAR = 20  # characters to both sides of an error that it quotes
_DECODER = json.JSONDecoder()
_LIST = "data"  # the field that is the rows, whatever else an object has
_VIEWER = ("features", "rows")  # of an object of the viewer on Hugging Face's hub


def json_value_rows(
    path: Path, reached: Callable[[float], object], seen: Callable[[bytes], object], *, form: str
) -> Iterator[RowOrBad]:
    """Yield the objects of a file; options and errors as those of read_rows. JSON that is broken
    ends the file, since nobody knows where the next record begins.

    form: "list", "objects" one after the other, or "object", which has the list of them in a field.
    """
    text: _Text | None = None
    name = named(path, MAX_SHOWN_PATH)
    number = 0
    with open_content(path, lambda: f"line {text.line if text else 0}") as content:
        text = _Text(name, content)
        values = {"list": _items, "objects": _values, "object": _items_of_field}[form](text)
        for line, value, source in values:
            number += 1
            seen(source.encode("utf-8", "surrogatepass") + b"\n")
            reached(content.share())
            where = f"{name}: record {number} (line {line})"
            try:
                yield where, only_object(_of_viewer(value) if form == "object" else value)
            except BadRecord as error:
                yield where, error


_Value = tuple[int, Any, str]  # the line where it begins, what it is, and as it is written


def _values(text: "_Text") -> Iterator[_Value]:
    while text.next():
        yield text.value()


def _items(text: "_Text") -> Iterator[_Value]:
    """Yield the items of a list, and see that nothing follows it."""
    yield from _list_items(text)
    if text.next():
        text.fail("more follows the list; JSON lines need no list around them")


def _list_items(text: "_Text") -> Iterator[_Value]:
    text.take("[")
    while text.next() != "]":
        yield text.value()
        if text.next() != ",":
            break
        text.take(",")
        if text.next() == "]":
            text.fail("a comma before the end of the list")
    text.take("]")


def _items_of_field(text: "_Text") -> Iterator[_Value]:
    """Yield the items of an object's one list of objects."""
    text.take("{")
    found = ""
    while text.next() != "}":
        _, key, _ = text.value()
        if not isinstance(key, str):
            text.fail(f"a field's name must be a string, not {json_type(key)}")
        text.take(":")
        is_list = text.next() == "[" and (key == _LIST or text.next_within() == "{")
        if is_list and key != _VIEWER[0]:
            if found:
                text.fail(
                    f'"{named(found)}" and "{named(key)}" are two lists of objects; write the one '
                    "that is meant as a file of its own"
                )
            found = key
            yield from _list_items(text)
        else:
            text.value()
        if text.next() != ",":
            break
        text.take(",")
    text.take("}")
    if text.next():
        text.fail("more follows the object")


def _of_viewer(value: Any) -> Any:
    """Return the row within what the hub's viewer says of it, {"row_idx", "row",
    "truncated_cells"}; any other value as it is. BadRecord where it has cut the row."""
    if not isinstance(value, dict) or "row_idx" not in value or "row" not in value:
        return value
    if cut_short := value.get("truncated_cells"):
        raise BadRecord(
            f"the hub's viewer has cut {quoted(cut_short)} short: download the data set's files"
        )
    return value["row"]


def list_field(record: dict[str, Any]) -> str:
    """Return the field of a file's only object that is the list of its rows; "" where the object is
    a row itself."""
    lists = [key for key, value in record.items() if isinstance(value, list)]
    with_objects = [
        key for key in lists if record[key] and all(isinstance(each, dict) for each in record[key])
    ]
    if _LIST in with_objects:
        return _LIST
    if set(_VIEWER) <= set(with_objects):
        return _VIEWER[1]
    is_row = len(lists) > len(with_objects) or record.keys() & (_ROW_LISTS | _ROW_TEXTS)
    return with_objects[0] if with_objects and not is_row else ""


# Of a row: what has one of these is no object around the rows.
_ROW_LISTS = {
    *("messages", "conversations", "conversation", "conversation_a", "conversation_b"),
    *("dialog", "dialogue", "chosen", "rejected"),
    *(
        "completions",
        "preferred_output",
        "non_preferred_output",
        "responses",
        "answers",
        "replies",
        "prompt",
        "context",
        "turns",
        "history",
        "summaries",
    ),
}
_ROW_TEXTS = {"prompt", "response", "completion", "text", "question", "instruction", "chosen"}


class _Text:
    """The text of a file, of which a part is in memory."""

    def __init__(self, name: str, content: Content) -> None:
        self._name, self._content = name, content
        self._decoder = codecs.getincrementaldecoder("utf-8-sig")()
        self._text, self._at = "", 0
        self._num_empty = self._num_other = 0
        self._is_over = False
        self.line = 1
        """Of what is next."""
        self._more(_PART_BYTES)

    def next(self) -> str:
        """Return the next character that is no space; "" at the end."""
        while True:
            start = _GAP.match(self._text, self._at).end()  # type: ignore[union-attr]
            self._num_empty += start - self._at
            if self._num_empty > self._num_other + MAX_EMPTY_BYTES:
                self.fail(f"{self._num_empty} bytes to here are empty")
            self._pass(start)
            if start < len(self._text):
                return self._text[start]
            if self._is_over:
                return ""
            self._more(_PART_BYTES)

    def next_within(self) -> str:
        """Return the first character that is no space in the list that is next."""
        start = self._at + 1
        while True:
            rest = self._text[start : start + _PART_BYTES].lstrip(" \t\n\r")
            if rest or self._is_over or len(self._text) - start > MAX_EMPTY_BYTES:
                return rest[:1]
            start -= self._at
            self._more(_PART_BYTES)

    def take(self, wanted: str) -> None:
        """Pass over a character that has to be next; UserError where another is."""
        found = self.next()
        if found != wanted:
            what = f"{found!r} is" if found else "the file ends"
            self.fail(f"not JSON: {what} where {wanted!r} should be")
        self._pass(self._at + 1)

    def value(self) -> _Value:
        """Return the value that is next, reading on as far as it goes."""
        self.next()
        while True:
            try:
                value, end = _DECODER.raw_decode(self._text, self._at)
            except json.JSONDecodeError as error:
                is_cut = not self._is_over and (
                    error.pos > len(self._text) - _CUT_CHARACTERS
                    or error.msg.startswith("Unterminated string")
                )
                if not is_cut:
                    self._pass(error.pos)
                    near = self._text[max(0, error.pos - _NEAR) : error.pos + _NEAR]
                    self.fail(f"not JSON: {error.msg}, at the middle of {quoted(near)}")
            except (ValueError, RecursionError) as error:
                self.fail(f"not JSON that can be read: {error}")
            except MemoryError:
                self.fail("as JSON it takes more memory than there is")
            else:
                # Of a number more may come.
                if self._is_over or end < len(self._text) or isinstance(value, dict | list | str):
                    break
            if len(self._text) - self._at > MAX_LINE_BYTES:
                self.fail(f"a record of over {MAX_LINE_BYTES} bytes begins here")
            self._more(max(_PART_BYTES, len(self._text) - self._at))
        line, source = self.line, self._text[self._at : end]
        self._num_other += len(source)
        self._pass(end)
        return line, value, source

    def fail(self, problem: str) -> NoReturn:
        """Raise UserError with the line of what is next."""
        raise UserError(f"{self._name}:{self.line}: {problem}")

    def _pass(self, end: int) -> None:
        self.line += self._text.count("\n", self._at, end)
        self._at = end

    def _more(self, num_bytes: int) -> None:
        """Read on, and let go of what has been passed."""
        part = self._content.stream.read(num_bytes)
        self._is_over = not part
        try:
            new = self._decoder.decode(part, final=self._is_over)
        except UnicodeDecodeError as error:
            self.line += self._text.count("\n", self._at) + error.object.count(
                b"\n", 0, error.start
            )
            self.fail(f"not UTF-8 ({ENCODING_ADVICE})")
        self._text, self._at = self._text[self._at :] + new, 0
