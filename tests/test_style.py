"""The rules of CONTRIBUTING.md that a program can check: lengths, names, words and docstrings."""

import ast
import inspect
import re
from collections import defaultdict
from collections.abc import Iterator

import pytest

from tests.sources import (
    FILES,
    ROOT,
    STAGES,
    TREES,
    functions,
    imports,
    in_library,
    public_names,
)


def undocumented(tree: ast.Module) -> Iterator[str]:
    """Yield the public functions, classes and methods without a docstring."""

    def visit(body: list[ast.stmt], prefix: str) -> Iterator[str]:
        for node in body:
            if not isinstance(node, ast.FunctionDef | ast.ClassDef) or node.name.startswith("_"):
                continue
            if not ast.get_docstring(node):
                yield prefix + node.name
            if isinstance(node, ast.ClassDef) and not is_autograd_function(node):
                yield from visit(node.body, f"{node.name}.")

    # A triton kernel says in comments what its pointers hold; its function has the docstring.
    yield from visit([node for node in tree.body if not is_triton_kernel(node)], "")


def is_triton_kernel(node: ast.AST) -> bool:
    return any("triton" in ast.unparse(d) for d in getattr(node, "decorator_list", []))


def is_autograd_function(node: ast.ClassDef) -> bool:
    return any(ast.unparse(base).endswith("Function") for base in node.bases)


def long_sentences(tree: ast.AST) -> Iterator[str]:
    """Yield the sentences of docstrings, those of attributes too, of more than 25 words."""
    for node in ast.walk(tree):
        body = getattr(node, "body", None)
        for statement in body if isinstance(body, list) else []:
            if not isinstance(statement, ast.Expr):
                continue
            text = getattr(statement.value, "value", None)
            paragraphs = inspect.cleandoc(text).split("\n\n") if isinstance(text, str) else []
            for paragraph in paragraphs:
                if paragraph.startswith("    "):  # a listing or a formula
                    continue
                for sentence in re.split(r"(?<=[.;:?!])\s+", paragraph):
                    if len(sentence.split()) > 25:
                        yield " ".join(sentence.split())


@pytest.mark.parametrize("name", [n for n in FILES if not n.startswith("tests")])
def test_files_are_short(name):
    num_lines = len((ROOT / name).read_text().splitlines())
    assert num_lines < 400, f"{name} answers more than one question"


@pytest.mark.parametrize("name", [n for n in FILES if in_library(n)])
def test_public_names_have_docstrings(name):
    assert list(undocumented(TREES[name])) == []


def test_the_longest_stage_knows_few_names():
    assert len(list(imports(TREES["engine/ppo.py"]))) <= 36, "a phase wants a function of its own"


@pytest.mark.parametrize("name", [n for n in FILES if in_library(n) and "kernels" not in n])
def test_functions_are_short(name):
    longest = {
        id(node): 120
        for node in TREES[name].body
        if name in STAGES and getattr(node, "name", "") == "train"
    }
    too_long = [
        f.name
        for f in functions(TREES[name])
        if (f.end_lineno or 0) - f.lineno + 1 > longest.get(id(f), 60)
    ]
    assert too_long == []


def test_public_names_have_one_home():
    homes: dict[str, list[str]] = defaultdict(list)
    for name in (name for name in FILES if in_library(name)):
        for public in set(public_names(TREES[name].body)):
            if not (public == "train" and name in STAGES):
                homes[public].append(name)
    assert {public: files for public, files in homes.items() if len(files) > 1} == {}


def test_few_functions_take_more_than_six_arguments():
    sources = [(ROOT / name).read_text() for name in FILES if in_library(name)]
    assert sum(len(re.findall("noqa.*PLR0913", source)) for source in sources) <= 7
    assert not any(re.search(r"# noqa(?!:)", source) for source in sources), "say which rule"


@pytest.mark.parametrize("name", [n for n in FILES if in_library(n)])
def test_sentences_are_short(name):
    assert list(long_sentences(TREES[name])) == []


def unescaped_prints(tree: ast.AST) -> Iterator[str]:
    """Yield what a file prints by, other than engine/printable.py."""
    for node in ast.walk(tree):
        if isinstance(node, ast.Call):
            name = ast.unparse(node.func)
            if name in ("print", "Console", "traceback.print_exception") or re.fullmatch(
                r"sys\.(__)?std(out|err)(__)?(\.buffer)?\.write(lines)?", name
            ):
                yield name


@pytest.mark.parametrize("name", [n for n in FILES if n.startswith(("engine/", "models/"))])
def test_what_is_printed_is_printable(name):
    own = {
        "engine/printable.py": ["Console", "print"],
        "engine/answers/dialogue.py": ["sys.stdout.write"],  # parts of what is printable as a whole
        "engine/data/tokenizer_trial.py": ["print"],  # an answer to the process that asked, as JSON
    }
    assert sorted(unescaped_prints(TREES[name])) == own.get(name, []), "use engine.printable.say"


def words_with_one_sense() -> dict[str, set[str]]:
    """Return {word: where names may carry it}, of the table in CONTRIBUTING.md."""
    allowed: dict[str, set[str]] = defaultdict(set)
    table = (ROOT / "CONTRIBUTING.md").read_text().partition("## Words with one sense")[2]
    for line in table.splitlines():
        if line.startswith("| ") and "`" in line:
            words, _, where = line.strip("| ").split(" | ")
            for word in words.split(", "):
                allowed[word] |= set(re.findall(r"`([^`]+)`", where))
    return allowed


def words_of(tree: ast.AST) -> set[str]:
    """Return the words, in the singular too, that a file's names are made of."""
    names = set()
    for node in ast.walk(tree):
        for attribute in ("id", "arg", "attr", "name", "asname", "names"):
            name = getattr(node, attribute, None)
            found = name if isinstance(name, list) else [name]
            if not (isinstance(node, ast.alias) and attribute == "name"):  # another's word
                names |= {each for each in found if isinstance(each, str)}
    split = re.sub(r"([a-z])([A-Z])", r"\1_\2", " ".join(names)).lower()
    words = set(re.split(r"[\W_]+", split))
    return words | {word.removesuffix("s") for word in words}


@pytest.mark.parametrize("name", [n for n in FILES if in_library(n)])
def test_words_have_one_sense_on_a_floor(name):
    allowed = words_with_one_sense()
    stray = {
        word
        for word in words_of(TREES[name]) & allowed.keys()
        if not any(name.startswith(where) for where in allowed[word])
    }
    assert stray == set(), "this word has another sense: CONTRIBUTING.md, Words with one sense"


def test_the_checks_see_what_they_look_for():
    source = '''
LIMIT: int = 3
_hidden = 4
def spoken():
    "Says."
def silent(): pass
class Box:
    "Holds."
    def open(self): return 1
def load(path):
    """One two three four five six seven eight nine ten eleven twelve thirteen fourteen fifteen
    sixteen seventeen eighteen nineteen twenty one two three four five six."""
'''
    tree = ast.parse(source)
    assert list(undocumented(tree)) == ["silent", "Box.open"]
    assert list(public_names(tree.body)) == ["LIMIT", "spoken", "silent", "Box", "load"]
    hidden = ast.parse("if x:\n  def a(): pass\ntry:\n  b, c = 1, 2\nexcept E:\n  d = 3")
    assert list(public_names(hidden.body)) == ["a", "b", "c", "d"]
    assert len(list(long_sentences(tree))) == 1
    prints = ast.parse("print(x), Console(), sys.stderr.write(y), sys.stdout.flush()")
    assert list(unescaped_prints(prints)) == ["print", "Console", "sys.stderr.write"]
    assert sorted(f.name for f in functions(tree)) == ["load", "open", "silent", "spoken"]
    assert words_of(tree) >= {"limit", "hidden", "load", "path", "box"}
    assert words_of(ast.parse("NumSlots = host_bytes")) >= {"num", "slot", "slots", "host", "byte"}
    assert words_with_one_sense()["slot"] >= {"engine/generation/", "kernels/"}
    assert len(words_with_one_sense()) >= 13
