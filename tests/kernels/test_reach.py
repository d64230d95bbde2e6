"""No kernel is there for its tests alone: what no network reaches says that it is for the library.

A public function of kernels/ is reached when a file of models/ or engine/ imports it, or when a
function or class that is reached names it.
"""

import ast
from pathlib import Path

import pytest

ROOT = Path(__file__).parents[2]
ROOTS = ("models", "engine", "recipes")
MARK = "Library only"

Definition = tuple[str, str]
"""A file of kernels/ and a name that it defines at its top."""


def definitions(tree: ast.Module) -> dict[str, ast.stmt]:
    """What a file defines at its top, by name."""
    found: dict[str, ast.stmt] = {}
    for node in tree.body:
        if isinstance(node, ast.FunctionDef | ast.ClassDef):
            # An operator's fake has no name of its own and goes with the operator.
            found.setdefault(node.name, node)
        elif isinstance(node, ast.Assign | ast.AnnAssign):
            targets = node.targets if isinstance(node, ast.Assign) else [node.target]
            found |= {target.id: node for target in targets if isinstance(target, ast.Name)}
    return found


def imported(tree: ast.AST) -> dict[str, Definition]:
    """What a file takes from kernels/, by the name it has there; a module counts for nothing."""
    found: dict[str, Definition] = {}
    for node in ast.walk(tree):
        if isinstance(node, ast.ImportFrom) and (node.module or "").startswith("kernels."):
            file = str(node.module).removeprefix("kernels.")
            found |= {alias.asname or alias.name: (file, alias.name) for alias in node.names}
    return found


def reached(kernels: dict[str, ast.Module], users: list[ast.Module]) -> set[Definition]:
    """All definitions that the users reach."""
    by_file = {file: definitions(tree) for file, tree in kernels.items()}
    taken = {file: imported(tree) for file, tree in kernels.items()}
    waiting = [definition for tree in users for definition in imported(tree).values()]
    found: set[Definition] = set()
    while waiting:
        file, name = definition = waiting.pop()
        if definition in found or name not in by_file.get(file, {}):
            continue
        found.add(definition)
        for node in ast.walk(by_file[file][name]):
            if isinstance(node, ast.Name):
                waiting.append(taken[file].get(node.id, (file, node.id)))
    return found


def unreached(kernels: dict[str, ast.Module], users: list[ast.Module]) -> list[str]:
    """The public functions and classes that are not reached and do not say why they are kept."""
    found = reached(kernels, users)
    return [
        f"{file}.{name}"
        for file, tree in kernels.items()
        for name, node in definitions(tree).items()
        if isinstance(node, ast.FunctionDef | ast.ClassDef)
        and not name.startswith("_")
        and (file, name) not in found
        and MARK not in (ast.get_docstring(tree) or "")
        and MARK not in (ast.get_docstring(node) or "")
    ]


def parsed(*floors: str) -> dict[str, ast.Module]:
    """The files of some floors."""
    paths = [path for floor in floors for path in sorted((ROOT / floor).rglob("*.py"))]
    return {path.stem: ast.parse(path.read_text(encoding="utf-8")) for path in paths}


def test_every_public_kernel_is_reached_or_says_that_it_is_for_the_library() -> None:
    users = [
        ast.parse(path.read_text(encoding="utf-8"))
        for floor in ROOTS
        for path in (ROOT / floor).rglob("*.py")
    ]
    assert unreached(parsed("kernels"), users) == []


USED = "def used():\n    return _inner()\n\ndef _inner():\n    return deep()\n"


@pytest.mark.parametrize(
    ("other", "expected"),
    [
        ("def alone():\n    '''Nobody calls it.'''\n", ["b.alone"]),
        ("def alone():\n    '''Library only: for somebody.'''\n", []),
        ("'''Library only: all of it.'''\n\ndef alone():\n    pass\n", []),
        ("def _private():\n    pass\n", []),
    ],
)
def test_a_kernel_that_nobody_reaches_is_found(other: str, expected: list[str]) -> None:
    kernels = {
        "a": ast.parse("from kernels.b import deep\n\n" + USED),
        "b": ast.parse(other + "\n\ndef deep():\n    pass\n"),
    }
    user = ast.parse("from kernels.a import used\n")
    assert unreached(kernels, [user]) == expected


def test_what_only_an_unreached_kernel_calls_is_found_too() -> None:
    kernels = {
        "a": ast.parse("from kernels.b import deep\n\n" + USED),
        "b": ast.parse("def deep():\n    pass\n"),
    }
    assert unreached(kernels, []) == ["a.used", "b.deep"]
    assert unreached(kernels, [ast.parse("from kernels.b import deep\n")]) == ["a.used"]
