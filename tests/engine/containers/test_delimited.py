from pathlib import Path

import pytest

from engine.containers import delimited
from engine.containers.rows import read_rows
from engine.errors import UserError
from tests.engine.containers.test_rows import read


def written(path: Path, content: str | bytes) -> Path:
    path.write_bytes(content.encode() if isinstance(content, str) else content)
    return path


def test_rows_are_named_by_their_first_lines(tmp_path: Path):
    path = written(tmp_path / "a.csv", 'prompt, response\n"a\nb",c\n\n"d ""e""",\n')
    assert read(path) == ([":2", ":5"], [{"prompt": "a\nb", "response": "c"}, {"prompt": 'd "e"'}])


def test_all_cells_are_text(tmp_path: Path):
    path = written(tmp_path / "a.tsv", "prompt\tcompletions\tranks\n[1]\t[2, 3]\t1\n")
    assert read(path)[1] == [{"prompt": "[1]", "completions": "[2, 3]", "ranks": "1"}]


def test_a_bad_row_is_named_and_the_next_is_read(tmp_path: Path):
    path = written(
        tmp_path / "a.csv", b'prompt,response\na,b,c\nd\n"e"f,g\n\xe9,h\n"i\n\xff",j\nk,l\n'
    )
    places, rows = read(path)
    assert places == [":2", ":3", ":4", ":5", ":6", ":8"]
    assert rows[0] == '3 cells under a header of 2: quote cells with commas in them, by "'
    assert rows[1] == "1 cell under a header of 2: there is none for response"
    assert rows[2].startswith("not one row of CSV: ',' expected after '\"'")
    assert rows[3].startswith("not UTF-8: byte 1 of the line")
    assert rows[4].startswith("not UTF-8: byte 1 of the line")
    assert rows[5] == {"prompt": "k", "response": "l"}


@pytest.mark.parametrize(
    ("text", "problem"),
    [
        ("prompt,response,prompt\na,b,c\n", "a.csv:1: 2 columns are called 'prompt'"),
        (",".join(f"c{n}" for n in range(5000)) + "\n", "a.csv:1: 5000 columns; 4096 are the most"),
        ('prompt,response\na,b\n"c,d\ne,f\n', "a.csv:3: a quote that begins a cell here is never"),
        ('prompt,response\n"a\nb", "c\n\nd', "a.csv:3: a quote that begins a cell here is never"),
        ('"prompt"x,response\n', "a.csv:1: not one row of CSV"),
    ],
)
def test_what_makes_no_table_is_refused(tmp_path: Path, text: str, problem: str):
    with pytest.raises(UserError) as error:
        list(read_rows(written(tmp_path / "a.csv", text)))
    assert problem in str(error.value)


def test_a_row_of_megabytes_is_refused(tmp_path: Path, monkeypatch: pytest.MonkeyPatch):
    path = written(tmp_path / "a.csv", "prompt\na\n" + '"' + "x\n" * 600_000)
    assert len("x\n" * 600_000) > 1 << 20
    monkeypatch.setattr(delimited, "MAX_LINE_BYTES", 1 << 20)
    with pytest.raises(UserError, match=r"a\.csv:3: a row of over .* is the quote in line 3 never"):
        list(read_rows(path))
    monkeypatch.undo()
    long = "y" * 5_000_000  # more than the library's own limit
    assert read(written(path, f"prompt\n{long}\n"))[1] == [{"prompt": long}]


def test_a_table_without_rows_has_none(tmp_path: Path):
    assert read(written(tmp_path / "a.csv", "prompt,response\n")) == ([], [])
    assert read(written(tmp_path / "a.csv", "")) == ([], [])


@pytest.mark.parametrize(
    ("text", "cells"),
    [
        ('a, "b, c"', ["a", "b, c"]),
        (' "a" , "b ""x"" c" ', ["a", 'b "x" c']),
        ('a,  "b\n\n c" ', ["a", "b\n\n c"]),
        ('"a\nb" ,"c\nd"  ', ["a\nb", "c\nd"]),
        # An inch, and speech within a text, are no quoted cells.
        ('5" x, "y" z', ['5" x', ' "y" z']),
        ("a , b ", ["a ", " b "]),
        (' "a" "b",c', [' "a" "b"', "c"]),
        ('"a" x,b', None),
    ],
)
def test_blanks_around_quoted_cells_are_no_part_of_them(
    tmp_path: Path, text: str, cells: list[str] | None
):
    (row,) = read(written(tmp_path / "a.csv", f"x,y\n{text}\n"))[1]
    if cells is None:
        assert isinstance(row, str)
    else:
        assert row == dict(zip("xy", cells, strict=True))


@pytest.mark.parametrize("end", ["\n", "\r\n"])
def test_a_cell_of_tsv_may_begin_with_a_quote(tmp_path: Path, end: str):
    lines = ['"Hello" he said\t"b"', '"a ""b"" c"\t"x" y', '"a', 'b" \t"c" d', 'e\t "f" g']
    rows = read(written(tmp_path / "a.tsv", f"x\ty{end}{end.join(lines)}{end}"))[1]
    assert [(row["x"], row["y"]) for row in rows] == [
        ('"Hello" he said', "b"),
        ('a "b" c', '"x" y'),
        (f"a{end}b", '"c" d'),
        ("e", ' "f" g'),
    ]


def test_line_ends_of_old_macs_end_lines(tmp_path: Path):
    path = written(tmp_path / "a.csv", b'\xef\xbb\xbfprompt,response\ra,b\rc\r\rd,"e\rf"\r')
    assert read(path) == (
        [":2", ":3", ":5"],
        [
            {"prompt": "a", "response": "b"},
            "1 cell under a header of 2: there is none for response",
            {"prompt": "d", "response": "e\rf"},
        ],
    )
    (row,) = read(written(path, "prompt,response\na\rb,c\n"))[1]
    assert row == "a carriage return in a cell without quotes: quote the cell"


def test_a_quote_that_swallows_rows_is_named_by_its_line(tmp_path: Path):
    path = written(tmp_path / "a.csv", 'prompt,response\na,"b\nc,"d"\ne,f\n')
    places, rows = read(path)
    assert places == [":2", ":4"]
    assert "(line 3; the quote in line 2 may lack its end)" in rows[0]


@pytest.mark.parametrize(
    ("text", "rows"),
    [
        ("prompt;response\na, b;c\n", [{"prompt": "a, b", "response": "c"}]),
        ("sep=;\nx;prompt\n1;a\n", [{"x": "1", "prompt": "a"}]),
        ("sep=,\nprompt\na\n", [{"prompt": "a"}]),
        ("x;y\n1;a\n", [{"x": "1", "y": "a"}]),
        ("prompt|response\na|b\n", [{"prompt": "a", "response": "b"}]),
        (",prompt,,\n0,a,,\n1,b\n", [{"prompt": "a"}, "2 cells under a header of 4"]),
        ("prompt,response\na,b,,\n", [{"prompt": "a", "response": "b"}]),
    ],
)
def test_tables_as_programs_write_them(tmp_path: Path, text: str, rows: list[object]):
    found = read(written(tmp_path / "a.csv", text))[1]
    assert [row.split(":")[0] if isinstance(row, str) else row for row in found] == rows
