"""The project's files as trees, for the tests that read them."""

import ast
from collections.abc import Iterator
from pathlib import Path

ROOT = Path(__file__).parents[1]
FLOORS = {"kernels": 0, "models": 1, "engine": 2, "recipes": 3, "benchmarks": 3, "tests": 4}
LIBRARY = ("kernels", "models", "engine")
STAGES = ("engine/sft.py", "engine/rm.py", "engine/ppo.py")

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
