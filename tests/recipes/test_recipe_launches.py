"""A recipe says in one place what its launch is, and its dry run takes that."""

import ast
import re
from pathlib import Path

import pytest

RECIPES = Path(__file__).parents[2] / "recipes"
STAGES = ("sft", "init", "rm", "ppo")


@pytest.mark.parametrize(
    ("stage", "size"),
    [
        *((stage, size) for stage in STAGES for size in ("tiny", "1_3b", "6b", "175b")),
        *((stage, "hf") for stage in STAGES if stage != "init"),
    ],
)
def test_dry_run_is_of_the_gpus_that_the_recipe_is_launched_on(stage: str, size: str):
    tree = ast.parse((RECIPES / f"{stage}_{size}.py").read_text())
    launch = re.search(r"(--ntasks|--nproc-per-node)=(\d+)", ast.get_docstring(tree) or "")
    (call,) = [
        node
        for node in ast.walk(tree)
        if isinstance(node, ast.Call) and ast.unparse(node.func) == "run_stage"
    ]
    stated = {word.arg: ast.literal_eval(word.value) for word in call.keywords}
    if size in ("tiny", "hf"):  # one process, which no launcher starts
        assert launch is None
        assert stated == {}
    else:
        assert launch is not None
        assert stated == {"num_gpus": int(launch[2])}
