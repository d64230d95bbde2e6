"""Plain text, .txt, where rows are wanted: a prompt a line. As pretraining text it is one document,
which engine/data/pretraining.py reads itself."""

from collections.abc import Callable, Iterator
from pathlib import Path

from engine.containers.json_lines import UTF8_BOM, not_utf8
from engine.containers.lines import read_lines
from engine.containers.row import RowOrBad
from engine.errors import named
from engine.files import MAX_SHOWN_PATH


def prompt_line_rows(
    path: Path, reached: Callable[[float], object], seen: Callable[[bytes], object]
) -> Iterator[RowOrBad]:
    """Yield {"prompt": LINE} of each line that is not empty, without its end; options and errors as
    those of read_rows."""
    name = named(path, MAX_SHOWN_PATH)
    for number, line in read_lines(path, reached):
        seen(line)
        if number == 1:
            line = line.removeprefix(UTF8_BOM)
        if not line.strip():
            continue
        try:
            yield f"{name}:{number}", {"prompt": line.decode("utf-8").rstrip("\r\n")}
        except UnicodeDecodeError as error:
            yield f"{name}:{number}", not_utf8(error.start + 1)
