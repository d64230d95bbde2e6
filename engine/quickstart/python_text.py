"""English that every machine with Python has: its language reference and its standard library.

The quickstart pretrains on it, so that the whole recipe runs without a download. The text is what
`pydoc` shows: the topics of the language reference (`pydoc_data/topics.py`) and the docstrings of
the standard library. Both are read from the source files with `ast`; nothing is imported or run.
"""

import ast
import math
import os
import re
import sysconfig
from collections import deque
from collections.abc import Iterator
from hashlib import sha256
from pathlib import Path

from engine.errors import UserError

MIN_DOCUMENT_CHARS = 200
MAX_DOCUMENT_CHARS = 3500
MIN_PARAGRAPH_CHARS = 40

# Tests and other people's packages are not the library's own prose; the codecs are only tables.
_SKIPPED_FOLDERS = {"test", "tests", "idle_test", "site-packages", "dist-packages", "ensurepip"}
_SKIPPED_FOLDERS |= {"encodings", "pydoc_data", "__phello__", "turtledemo"}

# Where a statement holds others.
_BLOCKS = ("body", "handlers", "orelse", "finalbody", "cases")

# A paragraph in which few of these occur is a table, a signature or code.
_FUNCTION_WORDS = re.compile(
    r"\b(a|all|an|and|any|are|as|at|be|been|but|by|can|do|does|each|for|from|given|has|have|if|in"
    r"|into|is|it|its|may|must|no|not|of|on|only|or|otherwise|same|should|so|such|than|that|the"
    r"|their|them|then|there|these|they|this|to|use|used|when|where|which|while|will|with|would"
    r"|you|your)\b"
)
_MIN_FUNCTION_WORDS = 0.25  # of the words; English prose has about 0.45
_MAX_ODD_CHARACTERS = 0.03  # of the characters: brackets, operators, underscores, non-ASCII

_PLAIN = str.maketrans(
    {"\u2018": "'", "\u2019": "'", "\u201c": '"', "\u201d": '"', "\u2013": "-", "\u2014": "-"}
    | {"\u2026": "...", "\u00a0": " ", "\t": " ", "\f": None, "`": None}
)
_ROLE = re.compile(r":[a-z:+-]+:(?=`)")  # :func:`print` -> `print`
_EMPHASIS = re.compile(r"(?<![\w*])\*{1,2}([\w-][^*\n]*?)\*{1,2}(?![\w*])")
_FOOTNOTE = re.compile(r"\s*\[\d+\]_?")
_RULE = re.compile(r"^\s*([-=*~^+#_|])[-=*~^+#_|\s]{2,}$")
_SESSION = re.compile(r"^\s*(>>>|\.\.\. |\$ |\.\. )")
_BULLET = re.compile(r"^\s*([-*+o]|\(?\d{1,2}[.)])\s+")
_ODD_CHARACTER = re.compile(r"[^A-Za-z0-9 ,.;:'\"()!?/-]")
_WORD = re.compile(r"[A-Za-z]+")
_WHOLE_SENTENCES = re.compile(r"^.*[.!?][\"')]*(?=\s|$)")


def python_documents(stdlib: Path | None = None) -> list[str]:
    """The prose of Python itself as documents of 200 to 3500 characters, in a fixed order.

    `stdlib` is the folder of the standard library's sources, by default this interpreter's own.
    Paragraphs are joined by blank lines; none occurs twice. Raises UserError without the sources.
    """
    folder = stdlib or Path(sysconfig.get_paths()["stdlib"])
    if not (folder / "pydoc_data" / "topics.py").is_file() or not (folder / "pydoc.py").is_file():
        raise UserError(
            f"the sources of Python's standard library are not in {folder}: install them "
            "(on Debian: apt-get install libpython3-stdlib), or give texts of your own with --data"
        )
    seen: set[str] = set()
    documents: list[str] = []
    for text in _texts(folder):
        fresh = []
        for paragraph in prose_paragraphs(text):
            key = " ".join(_WORD.findall(paragraph.lower()))
            if key not in seen:
                seen.add(key)
                fresh.append(paragraph)
        documents.extend(_documents(fresh))
    return documents


def split_documents(
    documents: list[str], valid_fraction: float = 0.05
) -> tuple[list[str], list[str]]:
    """(train, valid): a hash of each document decides, so no document ever changes sides."""
    sides: tuple[list[str], list[str]] = ([], [])
    for document in documents:
        draw = int.from_bytes(sha256(document.encode()).digest()[:8], "big") / 2**64
        sides[draw < valid_fraction].append(document)
    return sides


def prose_paragraphs(text: str) -> list[str]:
    """The paragraphs of `text` that are English prose, one line each, without markup."""
    text = _ROLE.sub("", text).translate(_PLAIN)
    paragraphs = (_as_prose(lines) for lines in _line_groups(text.splitlines()))
    return [paragraph for paragraph in paragraphs if paragraph]


def _texts(folder: Path) -> Iterator[str]:
    """The language reference topic by topic, then the docstrings file by file."""
    topics = ast.parse((folder / "pydoc_data" / "topics.py").read_bytes())
    table = next(node.value for node in topics.body if isinstance(node, ast.Assign))
    yield from (text for _, text in sorted(ast.literal_eval(table).items()))
    for path in sorted(_sources(folder), key=lambda path: path.relative_to(folder).as_posix()):
        yield "\n\n".join(_docstrings(path))


def _sources(folder: Path) -> Iterator[Path]:
    for parent, folders, names in os.walk(folder):
        folders[:] = (name for name in folders if name not in _SKIPPED_FOLDERS)
        yield from (Path(parent, name) for name in names if name.endswith(".py"))


def _docstrings(path: Path) -> Iterator[str]:
    try:
        tree = ast.parse(path.read_bytes())
    except (SyntaxError, ValueError):  # lib2to3 ships files in the grammar of Python 2
        return
    # As ast.walk, without the expressions: they are most of a tree and hold no docstring.
    waiting: deque[ast.AST] = deque([tree])
    while waiting:
        node = waiting.popleft()
        if isinstance(node, ast.Module | ast.ClassDef | ast.FunctionDef | ast.AsyncFunctionDef):
            yield ast.get_docstring(node) or ""
        for name in _BLOCKS:
            waiting.extend(getattr(node, name, ()))


def _line_groups(lines: list[str]) -> Iterator[list[str]]:
    """Lines that belong together: cut at blank lines, list items, titles and doctests."""
    group: list[str] = []
    for line in [*lines, ""]:
        if _RULE.match(line) or _SESSION.match(line):
            group = []  # a title above its rule, or the line that a session continues
        elif not line.strip() or _BULLET.match(line):
            if group:
                yield group
            group = [_BULLET.sub("", line)] if line.strip() else []
        else:
            group.append(line)


def _as_prose(lines: list[str]) -> str | None:
    """The lines as one line of prose up to the last whole sentence, or None if they are not."""
    text = " ".join(" ".join(lines).split())
    text = _FOOTNOTE.sub("", _EMPHASIS.sub(r"\1", text))
    whole = _WHOLE_SENTENCES.match(text)  # what follows the last full stop announces dropped code
    if not whole or len(whole[0]) < MIN_PARAGRAPH_CHARS or len(whole[0]) > MAX_DOCUMENT_CHARS:
        return None
    text = whole[0]
    if len(_ODD_CHARACTER.findall(text)) > _MAX_ODD_CHARACTERS * len(text):
        return None
    num_words = len(_WORD.findall(text))
    if len(_FUNCTION_WORDS.findall(text.lower())) < _MIN_FUNCTION_WORDS * num_words:
        return None
    return text if text[0].isalpha() or text[0] in "\"'(" else None


def _documents(paragraphs: list[str]) -> Iterator[str]:
    """Runs of paragraphs of about equal length, none over the limit; short remains are dropped."""
    if not paragraphs:
        return
    total = sum(len(paragraph) + 2 for paragraph in paragraphs)
    aim = total / math.ceil(total / MAX_DOCUMENT_CHARS)
    document = ""
    for paragraph in [*paragraphs, ""]:
        longer = f"{document}\n\n{paragraph}" if document else paragraph
        if paragraph and len(longer) <= MAX_DOCUMENT_CHARS and len(document) < aim:
            document = longer
            continue
        if len(document) >= MIN_DOCUMENT_CHARS:
            yield document
        document = paragraph
