"""The command makes the job that its options name."""

import pytest

from benchmarks import lengths, train_step
from benchmarks.real_job import num_tokens
from engine.errors import UserError
from engine.settings.numerics import Numerics
from models.sizes import SIZES


def job_of(task, *words):
    return train_step.real_job(task, train_step._parse(words), Numerics(), on_gpu=False)


def test_the_default_job_is_drawn_from_the_table():
    job, source = job_of("rm")
    assert source == "lengths.json"
    assert (job.size, len(job.batches), len(job.batches[0])) == (SIZES["small"], 3, 8)
    assert {len(unit) for units in job.batches for unit in units} <= set(range(4, 10))
    rows = lengths.draw(lengths.read_table("rankings"), 24, longest=512)
    assert sum(map(num_tokens, job.batches)) == sum(map(lengths.num_tokens, rows))


def test_lengths_come_from_a_file_where_one_is_named(tiny):
    words = ("--data", f"{tiny}/demonstrations.jsonl", "--tokenizer", f"{tiny}/tokenizer.json")
    job, source = job_of("sft", *words, "--batch-size", "8", "--num-batches", "2")
    assert source == "demonstrations.jsonl"
    tokenizer = train_step.load_tokenizer(tiny / "tokenizer.json")
    rows = lengths.lengths_of("demonstrations", tiny / "demonstrations.jsonl", tokenizer)
    found = [[e.prompt_length, len(e.tokens) - e.prompt_length] for b in job.batches for e in b]
    assert len(found) == 16
    assert all(row in rows for row in found)


def test_a_set_of_the_table_can_be_named():
    job, source = job_of("sft", "--sets", "oasst")
    assert source == "lengths.json: oasst"
    assert max(num_tokens([unit]) for units in job.batches for unit in units) > 300
    with pytest.raises(UserError, match="--sets nothing: lengths.json has e2e"):
        job_of("sft", "--sets", "nothing")


def test_a_batch_must_be_cut_evenly():
    with pytest.raises(UserError, match="--batch-size 12 must be a multiple of 8"):
        job_of("sft", "--batch-size", "12")


@pytest.mark.parametrize(
    "words",
    [("--data", "x"), ("--task", "sft", "rm", "--data", "x", "--tokenizer", "y")],
    ids=["no tokenizer", "two tasks"],
)
def test_options_that_do_not_fit_are_named(words, capsys):
    with pytest.raises(SystemExit):
        train_step._parse(words)
    assert "--data" in capsys.readouterr().err


def test_language_stays_the_default_task():
    assert train_step._parse([]).task == ["language"]


def test_a_mistake_is_one_line(monkeypatch, capsys):
    words = "train_step --device cpu --task sft --providers trident --sets nothing"
    monkeypatch.setattr("sys.argv", words.split())
    with pytest.raises(SystemExit) as end:
        train_step.main()
    assert end.value.code == 2
    (line,) = capsys.readouterr().err.splitlines()
    assert line.startswith("error: --sets nothing")
