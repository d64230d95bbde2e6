"""Every provider that a CPU can run gives the right result; one that does not is not timed."""

import io
import sys
from dataclasses import replace

import pytest
import torch
from rich.console import Console

from benchmarks.kernel_suite.case import Case, Effort, make_inputs
from benchmarks.kernel_suite.linear_logprobs import LINEAR_LOGPROBS
from benchmarks.kernel_suite.operation import Operation, Provider, bind, errors, passes, plain
from benchmarks.kernel_suite.ranking_loss import RANKING_LOSS
from benchmarks.kernel_suite.report import plot, table
from benchmarks.kernels import OPERATIONS

CPU = torch.device("cpu")
TINY = {
    "tokens": 6,
    "vocab": 96,
    "hidden": 32,
    "sequences": 3,
    "length": 16,
    "prompts": 3,
    "completions": 4,
    "rows": 3,
    "context": 64,
    "heads": 2,
    "block_size": 32,
}
EFFORT = Effort(min_samples=2, max_samples=2, seconds=0.0)


def tiny_case(operation: Operation) -> Case:
    size = {name: TINY[name] for name in operation.sizes["cpu"][0]}
    inputs = make_inputs(operation, size, CPU)
    return Case(operation, size, operation.modes[-1], inputs, operation.exact(inputs), CPU)


def runs_here(provider: Provider) -> bool:
    # megatron-core would start torch.distributed in the process of all tests.
    return not (provider.needs_gpu or provider.is_bound or provider.name == "megatron-core")


@pytest.mark.parametrize("name", OPERATIONS)
def test_providers_pass_the_gate(name):
    operation = OPERATIONS[name]
    case = tiny_case(operation)
    num_checked = 0
    for provider in filter(runs_here, operation.providers):
        for mode in provider.modes:
            if mode not in operation.modes:
                continue
            try:
                call = bind(operation, provider, case.inputs, mode)
            except ImportError:
                continue
            found = errors(case.expected, call())
            assert found, "nothing was compared"
            assert passes(case.expected, found), (provider.name, mode, found)
            num_checked += 1
    assert num_checked >= 2, "ours and torch at least"


def test_sizes_name_what_inputs_ask_for():
    for operation in OPERATIONS.values():
        for sizes in operation.sizes.values():
            assert len({frozenset(size) for size in sizes}) == 1, operation.name
        assert operation.providers[0].name == "trident"


def test_only_right_results_are_timed(tmp_path):
    def wrong(scores, ranks, cu_prompts):
        return scores.view(3, 4).sum(1), ranks.view(3, 4).sum(1)

    def not_a_number(scores, ranks, cu_prompts):
        return wrong(scores, ranks, cu_prompts)[0] * torch.nan, ranks

    def overwrites(scores, ranks, cu_prompts):
        scores.detach().zero_()
        return wrong(scores, ranks, cu_prompts)

    def breaks(scores, ranks, cu_prompts):
        raise RuntimeError("grid too large\nand more")

    def is_missing():
        raise ImportError("No module named 'rival'")

    functions = (overwrites, wrong, not_a_number, breaks)
    rivals = [Provider(function.__name__, plain(function)) for function in functions]
    rivals += [Provider("is_missing", is_missing), Provider("gpu", is_missing, needs_gpu=True)]
    ours = RANKING_LOSS.providers[0]
    case = tiny_case(replace(RANKING_LOSS, providers=(*rivals, ours)))
    case.run(EFFORT)
    records = {record["provider"]: record for record in case.records}
    assert {name: record["status"] for name, record in records.items()} == {
        "overwrites": "failed",
        "wrong": "wrong",
        "not_a_number": "wrong",
        "breaks": "failed",
        "is_missing": "skipped",
        "gpu": "skipped",
        "trident": "timed",  # on tensors as they were before the first rival
        "copy of as many bytes": "timed",
    }
    assert records["breaks"]["reason"] == "RuntimeError: grid too large"
    assert records["trident"]["median_ms"] > 0
    assert "median_ms" not in records["wrong"]

    screen = io.StringIO()
    Console(width=160, file=screen).print(table(case.records, "ranking_loss", case.size, case.mode))
    shown = screen.getvalue()
    assert "trident (reference path)" in shown
    assert "skipped, needs a GPU: gpu" in shown
    plot(case.records, [case.size], "title", tmp_path / "plot.png")
    assert (tmp_path / "plot.png").stat().st_size > 1000


def test_trl_runs_backward_without_what_its_trainers_import(tmp_path, monkeypatch):
    package = tmp_path / "trl"
    (package / "trainer").mkdir(parents=True)
    (package / "__init__.py").touch()
    (package / "trainer" / "__init__.py").touch()
    (package / "trainer" / "utils.py").write_text("import a_package_that_is_missing")
    (package / "kernels.py").write_text(
        "import torch\n"
        "class ChunkedLogProbFunction(torch.autograd.Function):\n"
        "    @staticmethod\n"
        "    def forward(ctx, hidden, *rest):\n"
        "        return hidden.sum(1), None\n"
        "    @staticmethod\n"
        "    def backward(ctx, grad, _):\n"
        "        from trl.trainer.utils import maybe_gather_lm_head_ctx\n"
        "        with maybe_gather_lm_head_ctx(grad):\n"
        "            return grad[:, None].expand(-1, 3), *[None] * 8\n"
    )
    monkeypatch.syspath_prepend(tmp_path)
    for name in [name for name in sys.modules if name.split(".")[0] == "trl"]:
        monkeypatch.delitem(sys.modules, name)
    (trl,) = (p for p in LINEAR_LOGPROBS.providers if p.name == "TRL chunked")
    hidden = torch.zeros(2, 3, requires_grad=True)
    try:
        trl.load()(hidden, hidden, None).sum().backward()
    finally:
        for name in [name for name in sys.modules if name.split(".")[0] == "trl"]:
            del sys.modules[name]
    assert (hidden.grad == 1).all()
