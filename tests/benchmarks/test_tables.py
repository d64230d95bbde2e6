"""The documents have the tables that the results give."""

import json
import shutil
from pathlib import Path

import pytest

from benchmarks.records import append_line, newest, read_records
from benchmarks.tables import ROOT, documents, written


def test_the_documents_are_what_make_tables_writes():
    for path, text in documents(ROOT).items():
        assert path.read_text() == text, f"{path.name} is not what the results say: make tables"


def test_a_new_result_changes_the_table(tmp_path):
    for name in ("README.md", "benchmarks/README.md", "benchmarks/results/cpu.jsonl"):
        (tmp_path / name).parent.mkdir(parents=True, exist_ok=True)
        shutil.copy(ROOT / name, tmp_path / name)
    results = tmp_path / "benchmarks/results/cpu.jsonl"
    record = read_records(results)[0] | {"date": "2999-01-01", "tokens_per_s": 123456.0}
    with results.open("a") as file:
        file.write(json.dumps(record) + "\n")
    before = (tmp_path / "README.md").read_text()
    after = documents(tmp_path)[tmp_path / "README.md"]
    assert "123,456" in after
    assert "123,456" not in before


def test_ppo_stands_beside_trl_at_its_fastest_in_the_newest_run(tmp_path):
    for name in ("README.md", "benchmarks/README.md"):
        (tmp_path / name).parent.mkdir(parents=True, exist_ok=True)
        shutil.copy(ROOT / name, tmp_path / name)
    job = {"num_episodes": 64, "minibatch_size": 16, "prompt_tokens": 64, "response_tokens": 128}
    job |= {"size": {"num_layers": 4, "hidden_size": 256}, "numerics": {"dtype": "fp32"}}

    def record(provider: str, speed: float, peak: float, date: str = "2026-11-27") -> str:
        fields = {"benchmark": "ppo_step", "workload": "mixed", "provider": provider, "job": job}
        fields |= {"episodes_per_s": speed, "peak_bytes": peak, "device": "Some CPU", "threads": 2}
        return json.dumps(fields | {"commit": "abc1234", "date": date})

    lines = [
        record("trident", 1.0, 9e9, date="2026-11-26"),
        record("trident", 12.0, 1.2e9),
        record("trl", 4.0, 2.4e9),
        record("trl, mixed", 3.0, 3e9),
        record("trident, ptx", 7.0, 1.4e9),
    ]
    for line in lines:
        append_line(tmp_path / "benchmarks/results/cpu.jsonl", line)
    text = documents(tmp_path)[tmp_path / "README.md"]
    case = "| Some CPU, 2 threads | 4 x 256, 64 episodes of 64 + 128 | mixed, fp32 |"
    assert f"{case} 12.00 | 4.00 (trl) | 3.00 | 1.20 / 2.40 = 0.50 | 7.00 | abc1234 |" in text
    assert "9.00" not in text  # of the older run


def test_steps_on_real_lengths_have_a_row_a_provider(tmp_path):
    for name in ("README.md", "benchmarks/README.md"):
        (tmp_path / name).parent.mkdir(parents=True, exist_ok=True)
        shutil.copy(ROOT / name, tmp_path / name)
    shared = {
        "device": "a CPU",
        "benchmark": "rm_step",
        "size": {"num_layers": 4, "hidden_size": 256},
        "numerics": {"dtype": "fp32"},
        "batch_size": 8,
        "tokens_per_s": 5000.0,
        "padding": 0.4271,
        "peak_bytes": 120_000_000,
        "goal": 1.2,
        "commit": "abc",
    }
    runs = [
        ("trident", "2999-01-01", {"examples_per_s": 99.0}),
        ("trident", "2999-01-02", {"examples_per_s": 20.0}),
        ("theirs", "2999-01-02", {"examples_per_s": 10.0, "trident_ratio": 2.0}),
    ]
    for provider, date, values in runs:
        record = shared | {"provider": provider, "date": date} | values
        append_line(tmp_path / "benchmarks/results/cpu.jsonl", json.dumps(record))
    text = documents(tmp_path)[tmp_path / "README.md"]
    step = "| a CPU | rm, 4 x 256, fp32, 8 prompts a step |"
    assert f"{step} theirs | 10.0 | 5,000 | 43% | 0.12 | 2.00 (goal 1.2) | abc |" in text
    assert f"{step} trident | 20.0 |" in text
    assert "| 99.0 |" not in text  # an older run


def test_shared_prompts_have_a_row_a_file(tmp_path: Path):
    for name in ("README.md", "benchmarks/README.md"):
        (tmp_path / name).parent.mkdir(parents=True, exist_ok=True)
        shutil.copy(ROOT / name, tmp_path / name)
    record = {
        "benchmark": "shared_prompts",
        "rankings": "places",
        "device": "a CPU",
        "threads": 1,
        "size": {"num_layers": 4, "hidden_size": 256},
        "numerics": {"dtype": "fp32"},
        "batch_size": 8,
        "mean_completions": 6.46,
        "mean_completion_tokens": 30.2,
        "mean_prompt_tokens": 34.8,
        "epoch_tokens": {"separate": 2000, "shared": 1100},
        "saved_tokens": 0.45,
        "commit": "abc",
    }
    for date, seconds in (("2999-01-01", 9.0), ("2999-01-02", 2.0)):
        measured = {"median_s": {"separate": seconds, "shared": 1.0}, "speedup": seconds}
        line = json.dumps(record | measured | {"cpu_speedup": 1.9, "date": date})
        append_line(tmp_path / "benchmarks/results/cpu.jsonl", line)
    text = documents(tmp_path)[tmp_path / "README.md"]
    assert (
        "| places | 6.5 of 30 tokens behind 35 | 2,000 / 1,100 | 45% "
        "| a CPU, 1 thread, 4 x 256, fp32, 8 prompts | 2.00 / 1.00 | 2.00 (1.90) | abc |"
    ) in text
    assert "9.00 / 1.00" not in text  # an older run


def test_a_document_without_the_place_is_an_error():
    with pytest.raises(ValueError, match="end of targets"):
        written("no place", "targets", "| a |")


def test_providers_of_one_run_stay_together():
    def record(provider: str, date: str) -> dict:
        return {"case": 1, "provider": provider, "date": date}

    records = [record("ours", "1"), record("theirs", "1"), record("ours", "2")]
    assert newest(records, lambda r: r["case"]) == [record("ours", "2")]


def test_a_record_begins_a_line_of_its_own_behind_a_cut_one(tmp_path: Path):
    path = tmp_path / "folder/x.jsonl"
    append_line(path, '{"benchmark": "a"}')
    with path.open("a") as file:
        file.write('{"benchmark": "b')
    append_line(path, '{"benchmark": "c"}')
    found = read_records(path, skips_broken=True)
    assert [record["benchmark"] for record in found] == ["a", "c"]
    with pytest.raises(ValueError, match=r"x.jsonl:2: no JSON"):
        read_records(path)


def test_a_broken_line_is_named_and_a_cut_one_left_out(tmp_path: Path):
    path = tmp_path / "x.jsonl"
    path.write_text('{"benchmark": "a"}\n{"benchmark": "b"')
    assert read_records(path) == [{"benchmark": "a"}]
    path.write_text('{"benchmark": "a"}\n{"benchm\n')
    with pytest.raises(ValueError, match=r"x.jsonl:2: no JSON"):
        read_records(path)


def test_checkpoints_have_a_row_a_way_to_save_and_a_kind_of_block(tmp_path):
    for name in ("README.md", "benchmarks/README.md"):
        (tmp_path / name).parent.mkdir(parents=True, exist_ok=True)
        shutil.copy(ROOT / name, tmp_path / name)
    job = {"benchmark": "checkpoints", "device": "Some CPU", "num_tokens": 512, "commit": "abc1234"}
    job |= {"size": {"num_layers": 6, "hidden_size": 768}, "date": "2999-01-01"}
    save = {"provider": "trident", "waited_s": 0.3, "on_disk_s": 1.5, "num_bytes": 3_000_000_000}
    steps = {"provider": "steps, in the background", "added": 0.0125, "block_s": 41.2}
    steps |= {"added_range": [-0.01, 0.02]}
    for record in (save, steps):
        append_line(tmp_path / "benchmarks/results/cpu.jsonl", json.dumps(job | record))
    text = documents(tmp_path)[tmp_path / "benchmarks/README.md"]
    case = "| Some CPU | 6 x 768, 512 tokens |"
    assert f"{case} trident | 0.30 | 1.50 | 2,000 |  | abc1234 |" in text
    block = "steps, in the background |  |  |  | +1.2% (-1.0% to +2.0%) in blocks of 41 s"
    assert f"{case} {block} | abc1234 |" in text
