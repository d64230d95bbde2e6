import json
from pathlib import Path

import pytest

from benchmarks.made_log import CAP, made_log, write_log
from benchmarks.prepare import found_against_planted
from engine.data.demonstrations import read_demonstrations
from engine.errors import UserError
from engine.prepare.prepare import prepare
from engine.settings.prepare import LogFields, PrepareConfig
from tests.tiny import write_lines

LABELS = {"response": "r", "completions": ["a", "b"], "ranks": [1, 2]}


def rows(path: Path) -> list[dict]:
    return [json.loads(line) for line in path.read_text().splitlines()]


def config(folder: Path, *records: dict, **options) -> PrepareConfig:
    log = write_lines(folder / "log.jsonl", records)
    options = {"languages": False, "valid_fraction": 0.0, "test_fraction": 0.0} | options
    return PrepareConfig(logs=(log,), out=folder / "data", **options)


def contents(folder: Path) -> dict[str, bytes]:
    return {path.name: path.read_bytes() for path in folder.iterdir()}


def test_all_that_was_planted_is_found_and_all_that_is_to_stay_stays(tmp_path):
    planted = made_log(3000, seed=1)
    write_log(tmp_path / "log.jsonl", planted)
    prepare(
        PrepareConfig(logs=(tmp_path / "log.jsonl",), out=tmp_path / "data", personal_splits="all")
    )
    found = found_against_planted(planted, tmp_path / "data")
    assert sum(row["planted"] for row in found) == len(planted) == 3000
    for row in found:
        expected = 0 if row["what"].startswith("not found") else row["to_drop"]
        assert (row["dropped"], row["wrongly"]) == (expected, 0), row
    assert {row["what"]: row["to_drop"] for row in found}["over the cap"] == 100
    sides = [rows(tmp_path / f"data/prompts.{s}.jsonl") for s in ("train", "valid", "test")]
    users = {p.row["id"]: p.row["user"] for p in planted}
    of_side = [{users[row["id"]] for row in side} for side in sides]
    assert all(of_side[i].isdisjoint(of_side[j]) for i in range(3) for j in range(i))
    kept = sum(len(side) for side in sides)
    assert kept + len(rows(tmp_path / "data/dropped.jsonl")) == len(planted)
    assert sum(users[r["id"]].startswith("heavy") for side in sides for r in side) == CAP
    report = json.loads((tmp_path / "data/report.json").read_text())
    assert sum(report["sets"]["prompts"]["kept"].values()) == kept
    assert report["languages"]["prompts"]["en"] > 0.8 * kept


def test_the_data_sets_are_what_the_stages_read(tmp_path):
    prepare(config(tmp_path, {"prompt": "p", **LABELS}, {"prompt": "q", "id": "mine"}))
    data = tmp_path / "data"
    assert sorted(contents(data)) == [
        "comparisons.train.jsonl",
        "config.json",
        "prompts.train.jsonl",
        "report.json",
        "report.md",
        "sft.train.jsonl",
    ]
    assert read_demonstrations(data / "sft.train.jsonl")[0][0].response.text == "r"
    assert rows(data / "prompts.train.jsonl") == [{"prompt": "q", "id": "mine"}]


def test_the_same_logs_and_settings_give_the_same_bytes(tmp_path):
    records = [{"prompt": f"p {i // 2}", "user": i % 7} for i in range(200)]
    made = []
    for name in ("a", "b"):
        (tmp_path / name).mkdir()
        found = config(tmp_path, *records, valid_fraction=0.2)
        prepare(PrepareConfig(**(vars(found) | {"out": tmp_path / name / "data"})))
        made.append(contents(tmp_path / name / "data"))
        del made[-1]["config.json"]  # says where
    assert made[0] == made[1]


def test_a_dropped_record_is_named_with_its_reason(tmp_path):
    long = "the same beginning " * 20
    records = [
        {"prompt": long + "one", "id": "first", "time": 2},
        {"prompt": long + "two", "id": "second", "time": 1},
        {"prompt": "mail a_b@post.co.uk", "response": "and +1 415-867-5309"},
    ]
    prepare(config(tmp_path, *records))
    log = str(tmp_path / "log.jsonl")
    assert rows(tmp_path / "data/dropped.jsonl") == [
        {"where": f"{log}:1", "id": "first", "set": "prompts", "reason": "duplicate"}
        | {"of": f"{log}:2"},
        {"where": f"{log}:3", "id": None, "set": "sft", "reason": "personal"}
        | {"kinds": ["email", "phone"]},
    ]
    report = json.loads((tmp_path / "data/report.json").read_text())
    assert report["largest_duplicates"] == [{"set": "prompts", "kept": f"{log}:2", "times": 2}]


def test_personal_data_are_masked_in_all_texts_or_kept(tmp_path):
    record = {"prompt": "to a_b@post.co.uk", **LABELS, "response": "to a_b@post.co.uk"}
    prepare(config(tmp_path, record, personal="mask"))
    assert rows(tmp_path / "data/sft.train.jsonl")[0]["response"] == "to [EMAIL]"
    assert rows(tmp_path / "data/comparisons.train.jsonl")[0]["prompt"] == "to [EMAIL]"
    kept = PrepareConfig(
        logs=(tmp_path / "log.jsonl",), out=tmp_path / "kept", personal="keep", languages=False,
        valid_fraction=0.0, test_fraction=0.0,
    )  # fmt: skip
    prepare(kept)
    assert rows(tmp_path / "kept/sft.train.jsonl")[0]["response"] == record["response"]


def test_personal_data_are_looked_for_in_training_data_alone_unless_asked(tmp_path):
    records = [{"prompt": f"number {i}: a_b@post.co.uk", "user": i} for i in range(60)]
    prepare(config(tmp_path, *records, valid_fraction=0.4))
    report = json.loads((tmp_path / "data/report.json").read_text())
    assert report["sets"]["prompts"]["kept"]["train"] == 0
    assert report["sets"]["prompts"]["kept"]["valid"] > 10
    config_all = config(tmp_path, *records, valid_fraction=0.4, personal_splits="all")
    prepare(PrepareConfig(**(vars(config_all) | {"out": tmp_path / "all"})))
    report = json.loads((tmp_path / "all/report.json").read_text())
    assert sum(report["sets"]["prompts"]["kept"].values()) == 0


def test_a_bad_line_stops_it_and_leaves_nothing_or_is_dropped(tmp_path):
    found = config(tmp_path, {"prompt": "p"}, {"prompt": 4})
    with pytest.raises(UserError, match=r'log.jsonl:2: field "prompt" must .*\n.*--skip-bad-lines'):
        prepare(found)
    assert sorted(path.name for path in tmp_path.iterdir()) == ["log.jsonl"]
    prepare(PrepareConfig(**(vars(found) | {"skip_bad_lines": True})))
    (dropped,) = rows(tmp_path / "data/dropped.jsonl")
    assert dropped["where"] == str(tmp_path / "log.jsonl") + ":2"
    assert dropped["reason"] == "bad_line"
    assert '"prompt" must be' in dropped["why"]


def test_a_finished_folder_is_kept_and_one_of_other_logs_or_settings_is_refused(tmp_path, capsys):
    found = config(tmp_path, {"prompt": "p"})
    prepare(found)
    before = contents(tmp_path / "data")
    prepare(found)
    assert "finished already, of these logs and settings" in capsys.readouterr().out
    assert contents(tmp_path / "data") == before
    with pytest.raises(UserError, match="was made with seed 0, not 3; name another --out"):
        prepare(PrepareConfig(**(vars(found) | {"seed": 3})))
    write_lines(tmp_path / "log.jsonl", [{"prompt": "q"}])
    with pytest.raises(UserError, match="was made of other logs"):
        prepare(found)
    (tmp_path / "other").mkdir()
    with pytest.raises(UserError, match="exists already, and is no preparation"):
        prepare(PrepareConfig(**(vars(found) | {"out": tmp_path / "other"})))


def test_what_a_killed_start_left_is_replaced(tmp_path):
    (tmp_path / "data.partial").mkdir()
    (tmp_path / "data.partial/sft.train.jsonl").write_text("half")
    prepare(config(tmp_path, {"prompt": "p"}))
    assert not (tmp_path / "data.partial").exists()
    assert not (tmp_path / "data/sft.train.jsonl").exists()


def test_many_prompts_of_one_preamble_are_warned_of(tmp_path, capsys):
    records = [{"prompt": "You are a helpful assistant. " * 10 + str(i)} for i in range(9)]
    prepare(config(tmp_path, *records, {"prompt": "x"}))
    said = capsys.readouterr().out
    assert "WARNING: 90% of prompts begin as" in said
    assert "raise --prefix-characters" in said


def test_what_is_missing_is_said_before_anything_is_read(tmp_path, monkeypatch):
    with pytest.raises(UserError, match="--logs FILE .* and --out FOLDER are required"):
        prepare(PrepareConfig(logs=(tmp_path / "log.jsonl",)))
    monkeypatch.setenv("WORLD_SIZE", "2")
    with pytest.raises(UserError, match="one process prepares data"):
        prepare(config(tmp_path, {"prompt": "p"}))


def test_each_of_few_users_is_on_one_side_and_none_is_empty(tmp_path, capsys):
    records = [{"prompt": f"{i}", "user": i % 2, "response": "r"} for i in range(20)]
    prepare(config(tmp_path, *records, valid_fraction=0.1, test_fraction=0.05))
    numbers = [len(rows(tmp_path / f"data/sft.{side}.jsonl")) for side in ("train", "valid")]
    assert numbers == [10, 10]
    assert "python recipes/sft_tiny.py" in capsys.readouterr().out


@pytest.mark.parametrize("user", [{}, {"user": 1}, {"user": "nan"}])
def test_of_one_user_or_of_nobody_prompts_are_split(tmp_path, user, capsys):
    records = [{"prompt": f"{i}", **user} for i in range(40)]
    prepare(config(tmp_path, *records, valid_fraction=0.2))
    assert 2 < len(rows(tmp_path / "data/prompts.valid.jsonl")) < 16
    said = " ".join(capsys.readouterr().out.split())
    assert "so the split is by prompt" in said
    assert "so the split is by prompt" in (tmp_path / "data/report.md").read_text()


def test_a_field_that_no_line_has_leaves_nothing(tmp_path):
    found = config(tmp_path, {"prompt": "p"}, fields=LogFields(user="customer"))
    with pytest.raises(UserError, match="--fields.user customer: none of the 1 lines has it"):
        prepare(found)
    assert not (tmp_path / "data").exists()


def test_a_label_that_teaches_nothing_is_in_the_report_and_its_prompt_in_its_file(tmp_path):
    prepare(config(tmp_path, {"prompt": "p", "completion": "c", "label": False}))
    (dropped,) = rows(tmp_path / "data/dropped.jsonl")
    assert (dropped["set"], dropped["reason"]) == ("sft", "left_out")
    assert dropped["why"] == "completions labelled false"
    assert len(rows(tmp_path / "data/prompts.train.jsonl")) == 1
    report = json.loads((tmp_path / "data/report.json").read_text())
    assert report["sets"]["sft"]["dropped"] == {"left_out": 1}


def test_addresses_of_reserved_domains_are_counted(tmp_path, capsys):
    prepare(config(tmp_path, {"prompt": "to ann@example.com and bob@mail.example.org"}))
    assert "2 addresses at domains that are reserved" in capsys.readouterr().out


def test_a_list_of_json_is_a_log_too(tmp_path):
    log = tmp_path / "log.json"
    log.write_text('[{"prompt": "a"}, {"prompt": "a"}]')
    prepare(PrepareConfig(logs=(log,), out=tmp_path / "data", languages=False))
    (dropped,) = rows(tmp_path / "data/dropped.jsonl")
    assert dropped["of"] == f"{log}: record 1"
