"""Every provider that a CPU can run gives the right result; one that does not is not timed."""

import io
import json
import sys
import time
from dataclasses import replace

import pytest
import torch
from rich.console import Console

from benchmarks import kernels
from benchmarks.kernel_suite.case import Case, Effort, make_inputs
from benchmarks.kernel_suite.linear_logprobs import LINEAR_LOGPROBS
from benchmarks.kernel_suite.operation import Operation, Provider, bind, errors, passes, plain
from benchmarks.kernel_suite.ranking_loss import RANKING_LOSS
from benchmarks.kernel_suite.report import plot, table
from benchmarks.kernels import OPERATIONS, chosen_sizes

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
    "heads": 6,
    "kv_heads": 2,
    "block_size": 32,
    "columns": 24,
    "dim": 20,
    "turned": 10,
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


def test_ours_is_published_before_a_rival_runs():
    published = []

    def rival(*_):
        assert [record["status"] for record in published] == ["alone"]
        raise SystemExit  # as what ends the process

    ours = RANKING_LOSS.providers[0]
    case = tiny_case(replace(RANKING_LOSS, providers=(ours, Provider("rival", plain(rival)))))
    with pytest.raises(SystemExit):
        case.run(EFFORT, published.append)
    assert published[0]["provider"] == "trident"
    assert published[0]["median_ms"] > 0


@pytest.mark.parametrize(("delay", "status"), [(0.15, "timed"), (5.0, "failed")])
def test_a_slow_rival_fails_or_gets_few_samples(delay, status):
    def slow(scores, ranks, cu_prompts):
        time.sleep(delay)
        return RANKING_LOSS.providers[1].load()(scores, ranks, cu_prompts)

    providers = (RANKING_LOSS.providers[0], Provider("slow", plain(slow)))
    case = tiny_case(replace(RANKING_LOSS, providers=providers))
    case.run(replace(EFFORT, min_samples=4, max_samples=4, provider_seconds=0.25))
    found = next(record for record in case.records if record["provider"] == "slow")
    assert found["status"] == status
    if status == "timed":
        assert found["num_samples"] == 2  # after the second 0.3 s are over
        assert found["first_call_s"] >= 0.15
    else:
        assert found["reason"] == "TimeoutError: took more than 0.25 s"


def test_memory_beyond_results_and_repeatable_bits_are_recorded():
    def random(scores, ranks, cu_prompts):
        losses, num_correct = RANKING_LOSS.providers[1].load()(scores, ranks, cu_prompts)
        return losses + 1e-6 * torch.rand(()), num_correct

    ours = RANKING_LOSS.providers[0]
    case = tiny_case(replace(RANKING_LOSS, providers=(ours, Provider("random", plain(random)))))
    case.run(EFFORT)
    found = {record["provider"]: record for record in case.records}
    assert found["trident"]["is_repeatable"]
    assert not found["random"]["is_repeatable"]
    for name in ("trident", "random"):
        record = found[name]
        assert record["extra_bytes"] == record["peak_bytes"] - record["result_bytes"] >= 0


def test_sizes_are_chosen_by_some_of_their_numbers():
    sizes = [{"tokens": 1, "hidden": 2}, {"tokens": 1, "hidden": 4}, {"tokens": 3, "hidden": 4}]
    assert chosen_sizes(sizes, []) == sizes
    assert chosen_sizes(sizes, [{"hidden": 4}]) == sizes[1:]
    assert chosen_sizes(sizes, [{"tokens": 7}]) == [{"tokens": 7, "hidden": 2}]
    assert chosen_sizes(sizes, [{"sequences": 7}]) == []


def test_the_targets_sizes_are_among_those_of_a_gpu():
    targets = {
        "gae": {"sequences": 512, "length": 1024},
        "policy_loss": {"tokens": 131072},
        "linear_logprobs": {"tokens": 131072, "hidden": 4096},
        "logprobs": {"tokens": 8192, "vocab": 50304},
        "decode_attention": {"sequences": 64, "context": 1024, "heads": 16},
    }
    for name, target in targets.items():
        sizes = OPERATIONS[name].sizes["cuda"]
        assert chosen_sizes(sizes, [target])[0] in sizes


def test_program_runs_what_it_is_asked_for(tmp_path, monkeypatch):
    options = "--device cpu --ops policy_loss gae --size tokens=256 --quick --limit 9 --providers"
    options = ["kernels", *options.split(), "trident", "--out", str(tmp_path)]
    monkeypatch.setattr(sys, "argv", options)
    kernels.main()
    records = [json.loads(line) for line in (tmp_path / "cpu.jsonl").read_text().splitlines()]
    assert [(r["operation"], r["tokens"], r["provider"], r["status"]) for r in records] == [
        ("policy_loss", 256, "trident", "alone"),
        ("policy_loss", 256, "copy of as many bytes", "timed"),
        ("policy_loss", 256, "trident", "timed"),
    ]


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
