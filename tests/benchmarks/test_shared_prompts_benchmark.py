"""Both layouts are counted and timed on the same rankings, whose losses agree."""

import json
from pathlib import Path

import pytest

from benchmarks import shared_prompts
from benchmarks.shared_prompts import Job, count_tokens, measure, read_units
from engine.data.tokenizer import load_tokenizer
from engine.errors import UserError
from engine.ranks.start import start_parallel
from engine.settings.layout import ParallelLayout
from engine.settings.numerics import Numerics
from tests.tiny import SIZE

JOB = Job(
    size=SIZE,
    numerics=Numerics(),
    batch_size=4,
    num_batches=2,
    num_samples=2,
    micro_batch_tokens=200,
)


def test_tokens_of_both_layouts_are_counted(tiny: Path):
    units = read_units(
        tiny / "comparisons.jsonl", load_tokenizer(tiny / "tokenizer.json"), SIZE.context_length
    )
    found = count_tokens(units)
    whole = sum(len(each.tokens) for unit in units for each in unit)
    spared = sum(each.prompt_length for unit in units for each in unit[1:])
    assert found["epoch_tokens"] == {"separate": whole, "shared": whole - spared}
    assert found["saved_tokens"] == pytest.approx(spared / whole)
    assert found["num_comparisons"] == 24 and found["mean_completions"] == 3.5
    with pytest.raises(UserError, match="no comparison fits into 2 tokens"):
        read_units(tiny / "comparisons.jsonl", load_tokenizer(tiny / "tokenizer.json"), 2)


def test_layouts_that_learn_otherwise_are_not_compared(tiny: Path, monkeypatch):
    tokenizer = load_tokenizer(tiny / "tokenizer.json")
    units = read_units(tiny / "comparisons.jsonl", tokenizer, SIZE.context_length)
    parallel = start_parallel(ParallelLayout(), seed=0)
    found = measure(JOB, units, parallel)
    assert found["speedup"] > 0 and found["cpu_speedup"] > 0
    assert {name: len(values) for name, values in found["batch_s"].items()} == {
        "separate": 2,
        "shared": 2,
    }
    monkeypatch.setattr(shared_prompts, "TOLERANCES", {"fp32": 0.0})
    monkeypatch.setattr(shared_prompts, "LAYOUTS", {"separate": False, "shared": None})
    step = shared_prompts._step
    monkeypatch.setattr(shared_prompts, "_step", lambda *given: step(*given) + (given[-1] is None))
    with pytest.raises(RuntimeError, match="losses of one batch differ"):
        measure(JOB, units, parallel)


def test_command_prints_a_row_a_file_and_keeps_a_record(
    tiny: Path, tmp_path: Path, monkeypatch, capsys
):
    words = f"shared_prompts --device cpu --size tiny --tokenizer {tiny / 'tokenizer.json'}"
    words += f" --rankings places={tiny / 'comparisons.jsonl'} --context-length 64 --batch-size 2"
    words += f" --num-batches 1 --num-samples 1 --out {tmp_path}"
    monkeypatch.setattr("sys.argv", words.split())
    shared_prompts.main()
    said = capsys.readouterr().out
    assert "places" in said and "times as fast" in said
    (line,) = (tmp_path / "cpu.jsonl").read_text().splitlines()
    record = json.loads(line)
    assert (record["benchmark"], record["rankings"]) == ("shared_prompts", "places")
    assert str(tiny) not in line  # a record names no folder
    monkeypatch.setattr("sys.argv", [*words.split()[:7], "--rankings", "places"])
    with pytest.raises(SystemExit):
        shared_prompts.main()
    assert "write NAME=FILE" in capsys.readouterr().err
