"""All providers take the same steps on the same records, or nothing is recorded."""

import dataclasses
import importlib
from pathlib import Path
from typing import Any

import pytest
import torch

from benchmarks import real_steps, turns
from benchmarks.real_job import RealJob, make_batches, num_targets, num_tokens
from benchmarks.real_steps import NEEDS, measure, missing
from benchmarks.turns import PROVIDERS, Turns, fastest_passes
from engine.settings.numerics import Numerics
from tests.tiny import SIZE

CPU = torch.device("cpu")
ROWS = {
    "sft": [[3, 2], [5, 9], [1, 1], [2, 6], [4, 4], [7, 3], [2, 30], [6, 1]],
    "rm": [[3, 2, 4, 1, 9], [5, 1, 1, 2, 3, 4], [2, 7, 3, 5, 1], [1, 1, 2, 3, 4]],
}


def job_of(task: str, **changes: Any) -> RealJob:
    job = RealJob(
        task=task,
        size=SIZE,
        numerics=Numerics(),
        batches=make_batches(task, SIZE, ROWS[task], num_batches=2),
        num_rounds=2,
        passes=(2,),
    )
    return dataclasses.replace(job, **changes)


def steps_of(job: RealJob, provider: str, folder: Path, passes: int) -> list[dict[str, Any]]:
    """What a provider says of its steps, in this process."""
    told: list[dict[str, Any]] = []
    each = Turns(
        job=job, device=CPU, num_steps=job.num_steps, await_turn=lambda: None, tell=told.append
    )
    importlib.import_module(PROVIDERS[provider]).run(each, folder, passes)
    return told


def test_units_have_the_lengths_and_share_their_prompt():
    (units,) = make_batches("rm", SIZE, ROWS["rm"][:2], num_batches=1)
    assert [len(unit) for unit in units] == [4, 5]
    assert [len(e.tokens) - e.prompt_length for e in units[0]] == [2, 4, 1, 9]
    assert len({tuple(e.tokens[:3]) for e in units[0]}) == 1
    assert sorted(e.fields["ranks"] for e in units[1]) == [1, 2, 3, 4, 5]
    assert num_tokens(units) == 4 * 3 + 16 + 5 * 5 + 11
    assert num_targets(units) == 16 + 11
    assert min(e.tokens.min() for unit in units for e in unit) > 0  # 0 pads


@pytest.mark.parametrize("task", ["sft", "rm"])
@pytest.mark.parametrize("provider", ["trident", "huggingface, Trainer"])
def test_a_provider_takes_the_steps_of_the_eager_loop(provider, task, tmp_path):
    pytest.importorskip("transformers")
    if provider == "huggingface, Trainer":
        pytest.importorskip("accelerate")
    from benchmarks.padded_steps import write_weights

    job = job_of(task)
    wanted = write_weights(job, CPU, tmp_path)
    theirs = steps_of(job, "huggingface, eager", tmp_path, 2)
    found = steps_of(job, provider, tmp_path, 2)
    assert len(found) == len(theirs) == job.num_steps == 7
    assert found[0]["loss"] == pytest.approx(wanted, abs=1e-5)
    for mine, other in zip(found, theirs, strict=True):
        assert mine["loss"] == pytest.approx(other["loss"], abs=1e-5)
        assert mine["num_tokens"] == other["num_tokens"] == num_tokens(job.units(mine["step"]))
        is_padded = mine["num_positions"] > mine["num_tokens"]
        assert is_padded == (provider != "trident")
    assert found[-1]["loss"] != found[1]["loss"]  # of one batch, steps apart
    assert found[-1]["peak_bytes"] > found[-1]["state_bytes"] > 12 * 49000


def test_the_fastest_number_of_passes_is_taken(monkeypatch):
    clock = iter(range(1000))
    monkeypatch.setattr(turns.time, "perf_counter", lambda: float(next(clock)))

    def run(each: Turns, passes: int) -> None:
        for step in each.steps():
            # The first step warms up: that it is slow with 4 does not count.
            for _ in range(90 if passes == 4 and step == 0 else 8 // passes):
                next(clock)
            each.report(loss=1.0, num_tokens=1, num_positions=1, num_passes=passes)

    assert fastest_passes(job_of("sft", passes=(1, 2, 4)), CPU, run) == 4


class FakeWorker:
    """A provider that says what it is told to."""

    def __init__(self, provider: str, job: RealJob, **changes: Any) -> None:
        self.name, self.job, self.changes, self.step = provider, job, changes, -1

    def tell(self, word: str) -> None:
        self.step += 1

    def hear(self, what: str) -> dict[str, Any]:
        tokens = num_tokens(self.job.units(self.step))
        return {"step": self.step, "loss": 1.0, "num_tokens": tokens} | self.changes


@pytest.mark.parametrize(
    ("changes", "message"),
    [
        ({"loss": 1.1}, "first losses differ, 1.1 of eager and 1.0"),
        ({"loss": float("nan")}, "loss of step 0 is nan"),
        ({"num_tokens": 7}, "eager read 7 tokens in step 0"),
    ],
)
def test_other_work_is_not_compared(changes, message):
    job = job_of("sft")
    workers = [FakeWorker("trident", job), FakeWorker("eager", job, **changes)]
    with pytest.raises(RuntimeError, match=message):
        real_steps._steps(job, workers, 1.0)


def test_losses_that_part_on_the_way_are_not_compared():
    told = {"a": [{"loss": 1.0}, {"loss": 0.5}], "b": [{"loss": 1.0}, {"loss": 0.6}]}
    with pytest.raises(RuntimeError, match="losses after 6 steps differ"):
        real_steps._check_last(job_of("sft"), told)


def test_rates_are_of_the_medians_of_each_batch():
    job = job_of("sft", num_rounds=3)
    seconds = [9, 1, 10, 2, 20, 90, 30, 9, 9]  # the first, three rounds of two batches, the meter
    said = {"loss": 1.0, "num_positions": 100, "num_passes": 1, "state_bytes": 5, "peak_bytes": 8}
    steps = [said | {"seconds": s, "cpu_seconds": 2 * s} for s in seconds]
    record = real_steps._record(job, "trident", steps)
    assert record["batch_s"] == [2, 20]
    assert record["examples_per_s"] == 8 / 22
    tokens = sum(map(sum, ROWS["sft"]))
    assert record["tokens_per_s"] == tokens / 22
    assert record["padding"] == 1 - tokens / 200
    assert (record["least_s"], record["least_cpu_s"], record["peak_bytes"]) == (5.5, 11, 8)


def test_a_process_that_ends_says_why(tmp_path):
    worker = real_steps._worker("trident", tmp_path, print)  # there is no job
    try:
        with pytest.raises(RuntimeError, match="trident ended(.|\n)*job.pickle"):
            real_steps._ask(worker, "starting")
    finally:
        worker.close()


def test_every_provider_has_its_module_and_its_needs():
    assert set(NEEDS) == set(PROVIDERS)
    assert missing("trident") is None


@pytest.mark.slow
@pytest.mark.parametrize("task", ["sft", "rm"])
def test_providers_take_turns_in_processes_of_their_own(task):
    providers = [provider for provider in NEEDS if missing(provider) is None]
    records = list(measure(job_of(task, passes=(1, 2)), CPU, providers))
    assert [record["provider"] for record in records] == providers
    ours, *theirs = records
    assert ours["padding"] == 0
    assert ours["took_turns"] == bool(theirs)
    for record in theirs:
        assert 0 < record["padding"] < 1
        assert record["trident_ratio"] == ours["examples_per_s"] / record["examples_per_s"]
        assert record["last_loss"] == pytest.approx(ours["last_loss"], abs=1e-5)
        assert record["settings"]["transformers"]
