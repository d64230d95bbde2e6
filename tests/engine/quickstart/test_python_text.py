import re
from pathlib import Path

import pytest

from engine.errors import UserError
from engine.quickstart.python_text import (
    MAX_DOCUMENT_CHARS,
    MIN_DOCUMENT_CHARS,
    prose_paragraphs,
    python_documents,
    split_documents,
)

PROSE = "The river is deep in the winter, and it is a long way from the house to the bridge. "


@pytest.fixture(scope="module")
def documents() -> list[str]:
    return python_documents()


@pytest.fixture
def stdlib(tmp_path: Path) -> Path:
    """A standard library of two topics and three modules."""
    (tmp_path / "pydoc_data").mkdir()
    topics = {
        "while": f"While\n*****\n\n{'A loop is run as long as it is true. ' * 8}",
        "empty": "",
    }
    (tmp_path / "pydoc_data" / "topics.py").write_text(f"topics = {topics!r}\n")
    (tmp_path / "pydoc.py").write_text(f'"""{PROSE * 4}"""\nraise RuntimeError("never run")\n')
    (tmp_path / "zebra.py").write_text(
        f'class Zebra:\n    """{PROSE * 4}"""\n'  # the same again
        f'    def run(self):\n        """{"Run to it as if it were the last time. " * 8}"""\n'
    )
    (tmp_path / "test").mkdir()
    (tmp_path / "test" / "secret.py").write_text(f'"""{"It is a secret of the test. " * 20}"""\n')
    return tmp_path


def test_amount_and_length(documents: list[str]) -> None:
    assert 1_000_000 < sum(map(len, documents)) < 4_000_000
    assert min(map(len, documents)) >= MIN_DOCUMENT_CHARS
    assert max(map(len, documents)) <= MAX_DOCUMENT_CHARS


def test_it_is_clean_english(documents: list[str]) -> None:
    text = "\n\n".join(documents)
    for markup in ("\n>>>", "::=", "``", "====", "****", ":func:", "\t"):
        assert markup not in text, markup
    words = re.findall(r"[a-z]+", text.lower())
    assert 0.05 < words.count("the") / len(words) < 0.12
    assert sum(character.isascii() for character in text) > 0.9999 * len(text)


def test_no_paragraph_occurs_twice(documents: list[str]) -> None:
    paragraphs = [p for document in documents for p in document.split("\n\n")]
    assert len(set(paragraphs)) == len(paragraphs) > 5000


def test_sources_are_read_in_order_and_not_run(stdlib: Path) -> None:
    documents = python_documents(stdlib)
    assert [document.split()[0] for document in documents] == ["A", "The", "Run"]
    assert documents == python_documents(stdlib)


def test_a_file_of_python_2_is_passed_over(stdlib: Path) -> None:
    expected = python_documents(stdlib)
    (stdlib / "old.py").write_text("print 'hello'\n")
    assert python_documents(stdlib) == expected


def test_missing_sources_are_the_users_error(tmp_path: Path) -> None:
    with pytest.raises(UserError, match="apt-get install"):
        python_documents(tmp_path)


@pytest.mark.parametrize(
    "other",
    [
        ">>> print('it is the one that is in the list')\nit is the one that is in the list.",
        "while_stmt ::= 'while' assignment_expression ':' suite. ['else' ':' suite].",
        "| Operator | Description of the operator |\n| == | Tests if it is the same. |",
        "open(file, mode='r', buffering=-1, encoding=None) -> file object. (see io.open.)",
        "Short. It is.",
        "Red, green, blue, yellow, orange, purple, black, white, brown, grey, pink, cyan.",
    ],
)
def test_what_is_not_prose_is_dropped(other: str) -> None:
    assert prose_paragraphs(f"{PROSE}\n\n{other}\n\n{PROSE}") == [PROSE.strip()] * 2


def test_markup_is_removed() -> None:
    text = (
        "Title of it\n===========\n\n"
        "- Call :func:`print` with the *name* of\n  the \u201cfile\u201d, as it is here [1]_.\n"
        "- It is **not** the same as the one that is used here; see this::\n\n     f = g(1)\n"
    )
    assert prose_paragraphs(text) == ['Call print with the name of the "file", as it is here.']


def test_a_split_keeps_every_document_on_its_side(documents: list[str]) -> None:
    train, valid = split_documents(documents)
    assert sorted(train + valid) == sorted(documents)
    assert 0.02 < len(valid) / len(documents) < 0.09
    assert set(split_documents(documents[::2])[1]) == set(valid) & set(documents[::2])
