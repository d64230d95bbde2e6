"""The rows of a file of data, whatever container it is."""

from collections.abc import Callable, Iterator
from pathlib import Path

from engine.containers.columnar import columnar_rows
from engine.containers.delimited import delimited_rows
from engine.containers.json_lines import json_line_rows
from engine.containers.json_values import json_value_rows
from engine.containers.kinds import kind_of
from engine.containers.prompt_lines import prompt_line_rows
from engine.containers.row import RowOrBad


def read_rows(
    path: Path,
    reached: Callable[[float], object] = lambda share: None,
    seen: Callable[[bytes], object] = lambda content: None,
) -> Iterator[RowOrBad]:
    """Yield (where it stands, its fields) of each row, or what is wrong there; raises UserError for
    what ends the file, such as damage, a record of over 16 MiB, or another kind of file.

    reached is told now and then which share of the file has been read, and seen the content of each
    row. A field that is null is left out, at any depth.
    """
    kind, form = kind_of(path)
    if kind == "lines":
        return json_line_rows(path, reached, seen)
    if kind == "values":
        return json_value_rows(path, reached, seen, form=form)
    if kind == "prompts":
        return prompt_line_rows(path, reached, seen)
    if kind == "delimited":
        return delimited_rows(path, reached, seen, delimiter=form)
    return columnar_rows(path, reached, seen, form=form)
