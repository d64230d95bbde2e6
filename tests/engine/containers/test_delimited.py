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
    assert rows[0] == "3 cells under a header of 2: quote cells with commas in them"
    assert rows[1].startswith("1 cells under a header of 2")
    assert rows[2].startswith("not one row of CSV: ',' expected after '\"'")
    assert rows[3].startswith("not UTF-8: byte 1 of the line")
    assert rows[4].startswith("not UTF-8: byte 1 of the line")
    assert rows[5] == {"prompt": "k", "response": "l"}


@pytest.mark.parametrize(
    ("text", "problem"),
    [
        ("prompt,response,prompt\na,b,c\n", "a.csv:1: 2 columns are called 'prompt'"),
        ("prompt;response\na;b\n", "a.csv:1: the header 'prompt;response' has semicolons"),
        (",".join(f"c{n}" for n in range(5000)) + "\n", "a.csv:1: 5000 columns; 4096 are the most"),
        ('prompt,response\na,b\n"c,d\ne,f\n', "a.csv:3: a quote is never closed"),
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
    with pytest.raises(UserError, match=r"a\.csv:3: a row of over 1048576 bytes; is a quote never"):
        list(read_rows(path))
    monkeypatch.undo()
    long = "y" * 5_000_000  # more than the library's own limit
    assert read(written(path, f"prompt\n{long}\n"))[1] == [{"prompt": long}]


def test_a_table_without_rows_has_none(tmp_path: Path):
    assert read(written(tmp_path / "a.csv", "prompt,response\n")) == ([], [])
    assert read(written(tmp_path / "a.csv", "")) == ([], [])
