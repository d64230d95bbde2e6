"""The rules of ARCHITECTURE.md that a program can check: who imports what, what stands where."""

import ast
import graphlib
import re
from collections import Counter, defaultdict
from collections.abc import Iterator, Mapping
from pathlib import Path

import pytest

from tests.sources import (
    FILES,
    FLOORS,
    ROOT,
    TREES,
    imports,
    in_library,
    stated_imports,
)

MEGATRON_FILES = {
    *(f"models/{name}.py" for name in ("gpt", "scalar_gpt", "layers", "mlp", "attention")),
    *(f"models/{name}.py" for name in ("embedding", "trunk", "readouts", "vocab_parallel")),
    "models/packed_sequences.py",
    *(f"engine/ranks/{name}.py" for name in ("device", "groups", "parallel", "seeds", "start")),
    *(f"engine/training/{name}.py" for name in ("passes", "optimizer", "trainable")),
    "engine/checkpoints/shards.py",
}
LIGHT_FILES = {
    "models/form.py",
    "models/sizes.py",
    *(f"models/huggingface/{n}.py" for n in ("families", "fields", "config", "rotary", "windows")),
    *(f"engine/{name}.py" for name in ("errors", "files", "environment", "recipe", "plan_command")),
    "engine/stop.py",
    "engine/printable.py",
    *(
        f"engine/data/{name}.py"
        for name in (
            "codecs",
            "tokenizer_files",
            "tokenizer_trial",
            "tokenizer_settings",
            "end_of_text",
        )
    ),
    "engine/checkpoints/candidates.py",
    "engine/huggingface/described.py",
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
JUNK_DRAWERS = {"utils", "util", "common", "helpers", "helper", "base", "misc", "registry"}


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


def own_tests(name: str, tests: list[str]) -> list[str]:
    """Return which of the tests are a library file's own: tests/ROOM/test_STEM.py, or, as basenames
    are unique, tests/ROOM/test_LASTROOM_STEM.py."""
    path = Path(name)
    stems = (path.stem, f"{path.parent.name}_{path.stem}")
    own = {str(Path("tests") / path.parent / f"test_{stem}.py") for stem in stems}
    return [test for test in tests if test in own]


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


@pytest.mark.parametrize("name", [n for n in FILES if in_library(n)])
def test_a_room_is_not_imported_whole_nor_by_a_computed_name(name):
    rooms = {str(Path(n).parent).replace("/", ".") for n in FILES if n.startswith("engine/")}
    assert not set(imports(TREES[name])) & rooms, "import a function from the file that defines it"
    assert "?" not in set(imports(TREES[name])) or name in (
        "engine/recipe.py",  # of a stage
        "models/attention.py",  # of a release of flash-attn
    )


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


def test_the_checks_see_what_they_look_for():
    tree = ast.parse("import os\nfrom engine.training.passes import forward\n")
    assert list(imports(tree)) == ["os", "engine.training.passes.forward"]
    assert list(imports(ast.parse("importlib.import_module('torch')"))) == ["torch"]
    assert list(imports(ast.parse("import_module('a.' + b)"))) == ["?"]
    reads = ast.parse('os.environ["HOME"], os.environ.get("RANK"), os.getenv(name)')
    assert sorted(environment_reads(reads)) == ["?", "HOME", "RANK"]
    assert list(environment_reads(ast.parse("dict(os.environ); import os as o"))) == ["?", "?"]
    spoken = ast.parse("from engine import stop\nx = 'engine.dry_run.dry_run', 'engine.run:Run.f'")
    assert reached("engine/recipe.py", spoken) == {
        "engine/stop.py",
        "engine/run.py",
        "engine/dry_run/dry_run.py",
    }
    assert room("engine/stop.py") == "engine/stop.py"
    assert room("engine/data/records.py") == "engine/data"
    assert circle({"a": {"b"}, "b": {"c"}, "c": set()}) == []
    assert set(circle({"a": {"b"}, "b": {"c"}, "c": {"a"}})) == {"a", "b", "c"}
