"""A mistake in a benchmark's command line is one line and status 2."""

import importlib
import inspect

import pytest

from benchmarks.command_line import command, count, count_or_none, mistakes_in_one_line, seconds
from benchmarks.rivals import ROOT
from engine.errors import UserError

COUNTS = {
    "benchmarks.generation": ("--batch", "--num-samples", "--context"),
    "benchmarks.plan_accuracy": ("--num-sequences", "--num-episodes", "--micro-batch-tokens"),
    "benchmarks.ppo_step": ("--num-episodes", "--minibatch-size", "--micro-batch-tokens"),
    "benchmarks.profile_ppo": ("--num-episodes", "--minibatch-size", "--prompt-tokens"),
    "benchmarks.residency": ("--batch", "--num-samples", "--response-tokens"),
    "benchmarks.train_step": ("--num-sequences", "--num-samples", "--batch-size", "--num-batches"),
    "benchmarks.tune_kernels": ("--rows", "--vocab"),
}


def line_of(call, capsys) -> str:
    """The one line on stderr with which a call ends the process with status 2."""
    with pytest.raises(SystemExit) as end:
        call()
    assert end.value.code == 2
    (line,) = capsys.readouterr().err.splitlines()
    return line


@pytest.mark.parametrize("module", COUNTS)
@pytest.mark.parametrize("number", ["0", "-1"])
def test_a_count_below_one_is_one_line(module, number, monkeypatch, capsys):
    main = importlib.import_module(module).main
    for option in COUNTS[module]:
        monkeypatch.setattr("sys.argv", [module, option, number])
        line = line_of(main, capsys)
        assert line == f"error: argument {option}: must be at least 1, got {number}"


def test_no_benchmark_reads_a_number_that_nobody_checks():
    for module in COUNTS:
        source = inspect.getsource(importlib.import_module(module))
        assert "type=int" not in source
        assert "type=float" not in source


STARTED = [
    ".".join(path.relative_to(ROOT).with_suffix("").parts)
    for path in sorted((ROOT / "benchmarks").rglob("*.py"))
    if '__name__ == "__main__"' in path.read_text()
]


@pytest.mark.parametrize("module", STARTED)
def test_every_benchmark_says_what_it_takes(module, monkeypatch, capsys):
    monkeypatch.setattr("sys.argv", [module, "--help"])
    with pytest.raises(SystemExit) as end:
        importlib.import_module(module).main()
    assert end.value.code == 0
    name = module.removesuffix(".__main__")
    assert capsys.readouterr().out.startswith(f"usage: python -m {name} ")


@pytest.mark.parametrize("words", [(), ("folder",), ("folder", "nobody")])
def test_a_provider_that_is_not_named_is_one_line(words, monkeypatch, capsys):
    monkeypatch.setattr("sys.argv", ["benchmarks.turns", *words])
    assert "provider" in line_of(importlib.import_module("benchmarks.turns").main, capsys)


@pytest.mark.parametrize(
    ("kind", "text", "words"),
    [
        (count, "many", "invalid count value: 'many'"),
        (count_or_none, "-1", "must be at least 0, got -1"),
        (seconds, "0", "must be above 0, got 0"),
        (seconds, "nan", "must be above 0, got nan"),
    ],
)
def test_numbers_that_mean_nothing_are_refused(kind, text, words, capsys):
    parser = command("a_benchmark")
    parser.add_argument("--number", type=kind)
    line = line_of(lambda: parser.parse_args(["--number", text]), capsys)
    assert line == f"error: argument --number: {words}"


def test_numbers_at_their_limits_are_taken():
    assert (count("1"), count_or_none("0"), seconds("inf")) == (1, 0, float("inf"))


def test_minibatches_that_do_not_divide_an_iteration_are_one_line(monkeypatch, capsys):
    for name in ("ppo_step", "profile_ppo"):
        monkeypatch.setattr("sys.argv", [name, "--num-episodes", "8", "--minibatch-size", "3"])
        line = line_of(importlib.import_module(f"benchmarks.{name}").main, capsys)
        assert line == "error: --num-episodes 8 must be a multiple of --minibatch-size 3"


def test_a_bug_keeps_its_traceback():
    @mistakes_in_one_line()
    def main(error: Exception) -> None:
        raise error

    with pytest.raises(ValueError, match="a bug"):
        main(ValueError("a bug"))
    with pytest.raises(SystemExit):
        main(UserError("a mistake"))
