"""The rules of ARCHITECTURE.md and CONTRIBUTING.md that a program can check: who imports what, how
long a function is, where a name is defined, what its docstring says, where a file's tests are."""

import ast
import graphlib
import inspect
import re
from collections import Counter, defaultdict
from collections.abc import Iterator, Mapping
from pathlib import Path

import pytest

ROOT = Path(__file__).parents[1]
FLOORS = {"kernels": 0, "models": 1, "engine": 2, "recipes": 3, "benchmarks": 3, "tests": 4}
LIBRARY = ("kernels", "models", "engine")
MEGATRON_FILES = {
    *(f"models/{name}.py" for name in ("gpt", "scalar_gpt", "layers", "attention")),
    *(f"models/{name}.py" for name in ("readouts", "vocab_parallel")),
    *(f"engine/ranks/{name}.py" for name in ("device", "groups", "parallel", "seeds", "start")),
    *(f"engine/training/{name}.py" for name in ("passes", "optimizer")),
    "engine/checkpoints/shards.py",
}
LIGHT_FILES = {
    "models/sizes.py",
    *(f"engine/{name}.py" for name in ("errors", "files", "environment", "recipe", "plan_command")),
    "engine/stop.py",
    "engine/residency/expected.py",
    "engine/residency/resharding.py",
    *(str(path.relative_to(ROOT)) for path in (ROOT / "engine/settings").glob("*.py")),
    *(str(path.relative_to(ROOT)) for path in (ROOT / "engine/planning").glob("*.py")),
    "recipes/plan.py",
}
# Who reads the environment, and which variables; None allows any.
ENVIRONMENT = {
    "engine/ranks/start.py": None,
    "engine/ranks/device.py": None,
    "engine/environment.py": None,
    "kernels/launch.py": {"TRITON_INTERPRET"},
}
STAGES = ("engine/sft.py", "engine/rm.py", "engine/ppo.py")
JUNK_DRAWERS = {"utils", "util", "common", "helpers", "helper", "base", "misc", "registry"}

FILES = sorted(
    str(path.relative_to(ROOT))
    for floor in FLOORS
    for path in (ROOT / floor).rglob("*.py")
    if "__pycache__" not in path.parts
)
TREES = {name: ast.parse((ROOT / name).read_text()) for name in FILES}


def in_library(name: str) -> bool:
    return name.split("/")[0] in LIBRARY


def imports(tree: ast.AST) -> Iterator[str]:
    """Yield the full name of every module that a file imports, wherever in the file and whether by
    a statement or by import_module; "?" for a computed name."""
    yield from stated_imports(tree)
    for node in ast.walk(tree):
        if isinstance(node, ast.Call) and ast.unparse(node.func).endswith(
            ("import_module", "__import__")
        ):
            constants = [a.value for a in node.args if isinstance(a, ast.Constant)]
            yield constants[0] if len(constants) == len(node.args) == 1 else "?"


def stated_imports(tree: ast.AST) -> Iterator[str]:
    """Yield what import statements name."""
    for node in ast.walk(tree):
        if isinstance(node, ast.Import):
            yield from (alias.name for alias in node.names)
        elif isinstance(node, ast.ImportFrom):
            assert node.level == 0, "import by the full name, not relative to the file"
            yield from (f"{node.module}.{alias.name}" for alias in node.names)


def packages(tree: ast.AST) -> set[str]:
    return {name.split(".")[0] for name in imports(tree)}


def environment_reads(tree: ast.AST) -> Iterator[str]:
    """Yield the variables read through os.environ and os.getenv; "?" for a computed name."""
    reads = ("os.environ", "os.getenv")
    named: set[int] = set()  # uses of os.environ that name their variable
    for node in ast.walk(tree):
        if isinstance(node, ast.Subscript | ast.Call):
            owner = node.value if isinstance(node, ast.Subscript) else node.func
            named |= {id(owner), id(getattr(owner, "value", None))}
    for node in ast.walk(tree):
        if isinstance(node, ast.Attribute) and ast.unparse(node) in reads and id(node) not in named:
            yield "?"
            continue
        if isinstance(node, ast.Import) and any(a.name == "os" and a.asname for a in node.names):
            yield "?"
            continue
        if isinstance(node, ast.Call) and ast.unparse(node.func).startswith(reads):
            argument = node.args[0] if node.args else None
        elif isinstance(node, ast.Subscript) and ast.unparse(node.value) in reads:
            argument = node.slice
        elif isinstance(node, ast.ImportFrom) and node.module == "os":
            names = {alias.name for alias in node.names}
            if names & {"environ", "getenv"}:
                yield "?"
            continue
        else:
            continue
        yield argument.value if isinstance(argument, ast.Constant) else "?"


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


def own_tests(name: str, tests: list[str]) -> list[str]:
    """Return which of the tests are a library file's own: tests/ROOM/test_STEM.py, or, as basenames
    are unique, tests/ROOM/test_LASTROOM_STEM.py."""
    path = Path(name)
    stems = (path.stem, f"{path.parent.name}_{path.stem}")
    own = {str(Path("tests") / path.parent / f"test_{stem}.py") for stem in stems}
    return [test for test in tests if test in own]


def is_triton_kernel(node: ast.AST) -> bool:
    return any("triton" in ast.unparse(d) for d in getattr(node, "decorator_list", []))


def is_autograd_function(node: ast.ClassDef) -> bool:
    return any(ast.unparse(base).endswith("Function") for base in node.bases)


def reached(name: str, tree: ast.AST) -> set[str]:
    """Return the files of the library that a file reaches: by imports anywhere in it, also within
    functions, and by names of modules in strings, such as import_module takes."""
    spoken = {
        node.value
        for node in ast.walk(tree)
        if isinstance(node, ast.Constant)
        and isinstance(node.value, str)
        and re.fullmatch(r"[a-z_]+([.:]\w+)+", node.value)
    }
    found = set()
    for module in (*imports(tree), *spoken):
        parts = re.split("[.:]", module)
        for length in range(2, len(parts) + 1):
            path = "/".join(parts[:length]) + ".py"
            if path in TREES and path != name and in_library(path):
                found.add(path)
    return found


def room(name: str) -> str:
    """Return the room of a file of engine/: its folder, or itself where it lies at the root."""
    folder = Path(name).parent
    return name if str(folder) == "engine" else str(folder)


def circle(graph: Mapping[str, set[str]]) -> list[str]:
    """Return a circle of a graph {node: those it needs}; an empty list where there is none."""
    try:
        graphlib.TopologicalSorter(graph).prepare()
    except graphlib.CycleError as error:
        return error.args[1]
    return []


def functions(tree: ast.AST) -> Iterator[ast.FunctionDef | ast.AsyncFunctionDef]:
    yield from (
        node for node in ast.walk(tree) if isinstance(node, ast.FunctionDef | ast.AsyncFunctionDef)
    )


def public_names(body: list[ast.stmt]) -> Iterator[str]:
    """Yield the public names that a file's body defines, also under a condition."""
    for node in body:
        if isinstance(node, ast.FunctionDef | ast.AsyncFunctionDef | ast.ClassDef):
            names = [node.name]
        elif isinstance(node, ast.Assign | ast.AnnAssign):
            targets = node.targets if isinstance(node, ast.Assign) else [node.target]
            names = [n.id for t in targets for n in ast.walk(t) if isinstance(n, ast.Name)]
        else:
            for field in ("body", "orelse", "finalbody"):
                yield from public_names(getattr(node, field, []))
            for handler in getattr(node, "handlers", []):
                yield from public_names(handler.body)
            continue
        yield from (name for name in names if not name.startswith("_"))


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


@pytest.mark.parametrize("name", FILES)
def test_imports_point_down(name):
    floor = FLOORS[name.split("/")[0]]
    up = {package for package in packages(TREES[name]) if FLOORS.get(package, -1) > floor}
    assert not up, f"{name} imports from a floor above its own"


@pytest.mark.parametrize("name", [n for n in FILES if in_library(n)])
def test_megatron_is_imported_where_it_is_wrapped(name):
    uses = packages(TREES[name]) & {"megatron"}
    assert not uses or name in MEGATRON_FILES, f"{name} imports megatron; wrap the call elsewhere"


@pytest.mark.parametrize("name", [n for n in FILES if n in LIGHT_FILES])
def test_light_files_import_neither_torch_nor_megatron(name):
    heavy = {"torch", "megatron", "triton", "transformers"}
    seen, waiting = set(), [name]
    while waiting:  # and nothing of ours that does
        current = waiting.pop()
        seen.add(current)
        assert not packages(TREES[current]) & heavy, f"{name} reaches {current}"
        for module in stated_imports(TREES[current]):  # what runs later may import what it likes
            for dotted in (module, module.rpartition(".")[0]):
                path = f"{dotted.replace('.', '/')}.py"
                if path in TREES and path not in seen:
                    waiting.append(path)


@pytest.mark.parametrize("name", [n for n in FILES if in_library(n)])
def test_environment_is_read_in_few_places(name):
    variables = set(environment_reads(TREES[name]))
    allowed = ENVIRONMENT.get(name, set())
    if allowed is not None:
        assert variables <= allowed, f"{name} reads the environment"


@pytest.mark.parametrize("name", FILES)
def test_no_junk_drawers(name):
    path = Path(name)
    assert not JUNK_DRAWERS & {path.stem, *path.parts}, "name the file after what it answers"


@pytest.mark.parametrize("name", [n for n in FILES if n.endswith("__init__.py")])
def test_init_files_are_empty(name):
    if name == "benchmarks/__init__.py":  # what every benchmark does before it imports megatron
        assert list(imports(TREES[name])) == ["engine.environment.quiet_libraries"]
        return
    assert (ROOT / name).read_text() == "", "import a function from the file that defines it"


@pytest.mark.parametrize("name", [n for n in FILES if not n.startswith("tests")])
def test_files_are_short(name):
    num_lines = len((ROOT / name).read_text().splitlines())
    assert num_lines < 400, f"{name} answers more than one question"


@pytest.mark.parametrize("name", [n for n in FILES if in_library(n)])
def test_public_names_have_docstrings(name):
    assert list(undocumented(TREES[name])) == []


@pytest.mark.parametrize("name", [n for n in FILES if in_library(n)])
def test_library_files_have_a_test_file_of_their_own(name):
    if not name.endswith("__init__.py"):
        assert own_tests(name, FILES), f"no file of tests/{Path(name).parent} is named for it"


def test_names_of_test_files_are_unique():
    """pytest imports a test file by its basename alone, as there is no __init__.py beside it."""
    tests = [Path(name) for name in FILES if name.startswith("tests/")]
    names = Counter(path.name for path in tests if path.name.startswith("test_"))
    assert [name for name, count in names.items() if count > 1] == []
    assert "__init__.py" not in {path.name for path in tests}


def test_a_file_of_another_room_is_no_test_of_its_own():
    tests = ["tests/engine/test_ppo.py", "tests/engine/settings/test_settings_ppo.py"]
    assert own_tests("engine/ppo.py", tests) == tests[:1]
    assert own_tests("engine/settings/ppo.py", tests) == tests[1:]
    assert own_tests("engine/settings/ppo.py", tests[:1]) == []
    assert own_tests("models/ppo.py", tests) == []


def test_no_import_goes_in_a_circle():
    graph = {name: reached(name, tree) for name, tree in TREES.items() if in_library(name)}
    assert circle(graph) == []


def test_no_import_goes_in_a_circle_of_rooms():
    graph: dict[str, set[str]] = defaultdict(set)
    for name in (name for name in FILES if name.startswith("engine/")):
        needed = {
            room(other) for other in reached(name, TREES[name]) if other.startswith("engine/")
        }
        graph[room(name)] |= needed - {room(name)}
    assert circle(graph) == []


def test_rooms_import_from_those_on_their_left():
    block = (
        (ROOT / "ARCHITECTURE.md").read_text().partition("of files or of rooms:")[2].split("```")[1]
    )
    groups = [group.split() for group in block.split("|")]
    level = {name: number for number, group in enumerate(groups) for name in group}
    for name in (n for n in FILES if n.startswith("engine/") and not n.endswith("__init__.py")):
        for other in reached(name, TREES[name]):
            mine, theirs = Path(room(name)).stem, Path(room(other)).stem
            if other.startswith("engine/") and mine != theirs:
                assert level[theirs] < level[mine], f"{name} imports {other}"


def test_engines_root_is_read_at_a_glance():
    root = [name for name in FILES if Path(name).parent == Path("engine")]
    assert len(root) - 1 <= 22, "a room is missing, or a file is in none"


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
def test_a_room_is_not_imported_whole_nor_by_a_computed_name(name):
    rooms = {str(Path(n).parent).replace("/", ".") for n in FILES if n.startswith("engine/")}
    assert not set(imports(TREES[name])) & rooms, "import a function from the file that defines it"
    assert "?" not in set(imports(TREES[name])) or name in (
        "engine/recipe.py",  # of a stage
        "models/attention.py",  # of a release of flash-attn
    )


@pytest.mark.parametrize("name", [n for n in FILES if in_library(n)])
def test_sentences_are_short(name):
    assert list(long_sentences(TREES[name])) == []


def test_readme_maps_every_file():
    tree = (ROOT / "README.md").read_text().partition("## Where things are")[2].split("```")[1]
    floors = re.split(r"\n(?=\w+/)", tree)  # a floor each
    missing = []
    for name in (n for n in FILES if in_library(n) and not n.endswith("__init__.py")):
        path = Path(name)
        (floor,) = (text for text in floors if text.startswith(f"{path.parts[0]}/"))
        if len(path.parts) > 2:  # a room: its line and those indented below it
            floor = re.split(r"\n  (?=\w)", floor.partition(f"\n  {path.parts[1]}/")[2])[0]
        elif len(path.parts) == 2:  # a file of the floor: on a line of its own or beside others
            floor = " ".join(re.findall(r"^(?:\w+/)?  ((?:\w+\.py ?)+)", floor, re.MULTILINE))
        if not re.search(rf"\b{path.stem}\b", floor):
            missing.append(name)
    assert missing == []
    said = re.findall(r"^  ((?:\w+\.py ?)+)|^(\w+/)|^  (\w+/) ", tree, re.MULTILINE)
    files = {file for group in said for file in group[0].split()}
    assert files <= {Path(name).name for name in FILES}, "the tree names a file that is not there"
    rooms = {group[2] for group in said if group[2]}
    assert rooms <= {f"{Path(name).parent.name}/" for name in FILES} | {"slurm/"}


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
    source = """
import os
from engine.training.passes import forward
def spoken():
    "Says."
def silent(): pass
class Box:
    "Holds."
    def open(self): return os.environ["HOME"], os.environ.get("RANK"), os.getenv(name)
"""
    tree = ast.parse(source)
    assert list(imports(tree)) == ["os", "engine.training.passes.forward"]
    assert sorted(environment_reads(tree)) == ["?", "HOME", "RANK"]
    assert list(undocumented(tree)) == ["silent", "Box.open"]


def test_the_checks_of_structure_see_what_they_look_for():
    source = '''
LIMIT: int = 3
_hidden = 4
def load(path):
    """One two three four five six seven eight nine ten eleven twelve thirteen fourteen fifteen
    sixteen seventeen eighteen nineteen twenty one two three four five six."""
    from engine import stop
    return importlib.import_module("engine.dry_run.dry_run")
'''
    tree = ast.parse(source)
    assert list(public_names(tree.body)) == ["LIMIT", "load"]
    hidden = ast.parse("if x:\n  def a(): pass\ntry:\n  b, c = 1, 2\nexcept E:\n  d = 3")
    assert list(public_names(hidden.body)) == ["a", "b", "c", "d"]
    assert list(imports(ast.parse("importlib.import_module('torch')"))) == ["torch"]
    assert list(imports(ast.parse("import_module('a.' + b)"))) == ["?"]
    assert list(environment_reads(ast.parse("dict(os.environ); import os as o"))) == ["?", "?"]
    spoken = ast.parse("x = 'engine.stop.noting_signals.name', 'engine.run:Run'")
    assert reached("engine/recipe.py", spoken) == {"engine/stop.py", "engine/run.py"}
    assert reached("engine/recipe.py", tree) == {"engine/stop.py", "engine/dry_run/dry_run.py"}
    assert len(list(long_sentences(tree))) == 1
    assert [f.name for f in functions(tree)] == ["load"]
    assert room("engine/stop.py") == "engine/stop.py"
    assert room("engine/data/jsonl.py") == "engine/data"
    assert circle({"a": {"b"}, "b": {"c"}, "c": set()}) == []
    assert set(circle({"a": {"b"}, "b": {"c"}, "c": {"a"}})) == {"a", "b", "c"}
    assert words_of(tree) >= {"limit", "hidden", "load", "path", "import", "module"}
    assert words_of(ast.parse("NumSlots = host_bytes")) >= {"num", "slot", "slots", "host", "byte"}
    assert words_with_one_sense()["slot"] >= {"engine/generation/", "kernels/"}
    assert len(words_with_one_sense()) >= 13
