"""Each caution at its threshold, with its number; and what real runs say, once."""

import dataclasses
import json
from pathlib import Path

import pytest

from engine.alarms import Alarm
from engine.cautions.of_data import (
    Reading,
    held_out_cautions,
    no_held_out_text,
    overlap_cautions,
    reading_cautions,
    repetition_cautions,
    response_cautions,
    twin_cautions,
)
from engine.cautions.of_settings import (
    rank_cautions,
)
from engine.data.examples import LengthReport
from engine.data.limits import Limit, Limits
from engine.data.records import ReadReport
from engine.settings.adam import AdamConfig
from engine.settings.saving import SaveConfig
from tests.tiny import SIZE, ppo_config, rm_config, sft_config, train, train_until, write_lines
from tests.tiny import write_checkpoints as write_tiny_checkpoints
from tests.tiny import write_files as write_tiny_files


def names(found: list[Alarm]) -> list[str]:
    return [alarm.name for alarm in found]


def only(found: list[Alarm]) -> str:
    (alarm,) = found
    return alarm.message


def test_nothing_held_out():
    def found(num_kept: int, num_dropped: int, path: str | None = None) -> list[Alarm]:
        return held_out_cautions(
            "demonstrations", num_kept, num_dropped, path=path, fraction=0.05, num_all=30
        )

    assert found(1, 7) == []
    assert "no demonstrations are held out (--data.valid-fraction 0.05 of 30)" in only(found(0, 0))
    message = only(found(0, 3, "v.jsonl"))
    assert "all 3 held-out demonstrations are too long (--data.valid v.jsonl)" in message
    assert names(no_held_out_text()) == ["held_out"]


def test_held_out_prompts_that_are_trained_on():
    assert overlap_cautions("comparisons", ["a", "b"], ["c"]) == []
    assert "2 of 3 held-out" in only(overlap_cautions("comparisons", ["a", "a", "b"], ["a"]))


def test_many_lines_and_examples_that_are_left_out():
    limits = Limits(prompt=Limit(5, "data.max_prompt_tokens"), whole=Limit(9, "data.max_tokens"))

    def found(num_bad: int, num_long: int) -> list[Alarm]:
        report = ReadReport(num_read=80, num_bad=num_bad, first_errors=("f:1: bad",))
        lengths = LengthReport(
            kept=list(range(80 - num_long)), num_long_prompts=num_long, num_long_sequences=0
        )
        return reading_cautions("prompts", report, lengths, limits)

    assert found(20, 16) == []  # a fifth of 100 lines, of 80 examples
    bad, dropped = found(21, 17)
    assert (bad.name, dropped.name) == ("bad_lines", "dropped")
    assert "21 of 101 lines of prompts (21%) are bad and skipped, the first: f:1: bad" in (
        bad.message
    )
    assert "17 of 80 prompts (21%) are too long and dropped: 17 with a prompt over 5 tokens " in (
        dropped.message
    )
    assert dropped.message.endswith("or cut them by --data.too-long")


def test_much_that_is_cut_or_left_out():
    limits = Limits(prompt=Limit(5, "data.max_prompt_tokens"))

    def found(num_ties: int, num_cut: int) -> list[Alarm]:
        report = ReadReport(num_read=50, num_bad=0, first_errors=(), left_out={"ties": num_ties})
        lengths = LengthReport(
            kept=list(range(50)), num_long_prompts=0, num_long_sequences=0, num_cut=num_cut
        )
        return reading_cautions("comparisons", report, lengths, limits)

    assert found(50, 10) == []
    left_out, cut = found(51, 11)
    assert (left_out.name, cut.name) == ("left_out", "cut")
    assert "51 beside 50 that are read are left out: 51 ties" in left_out.message
    assert "11 of 50 comparisons (22%) are too long and cut to a prompt of 5 tokens" in cut.message


@pytest.mark.parametrize(
    ("what", "most"),
    [("demonstrations", 20), ("comparisons", 4), ("prompts", 20), ("pretraining sequences", 16)],
)
def test_what_is_read_very_often(what: str, most: int):
    assert repetition_cautions({what: Reading(100, 50, 100 * most, "Lower epochs")}) == []
    message = only(repetition_cautions({what: Reading(100, 50, 4000, "Lower epochs")}))
    assert f"each of 100 {what} is read 40 times" in message
    assert "Lower epochs, or give more of them" in message


@pytest.mark.parametrize(("what", "most"), [("demonstrations", "13k"), ("comparisons", "33k")])
def test_few_examples_are_said(what: str, most: str):
    message = only(repetition_cautions({what: Reading(99, 8, 99, "Lower epochs")}))
    assert message.startswith(f"99 {what} are few: ")
    assert f"the paper has those of {most} prompts" in message


def test_fewer_than_a_batch():
    message = only(repetition_cautions({"comparisons": Reading(3, 64, 6, "Lower epochs")}))
    assert "3 comparisons are fewer than a batch of 64" in message
    assert "4 of them have nothing to do" in only(rank_cautions("batch_size", 4, 8))
    assert rank_cautions("batch_size", 8, 8) == []


def test_responses_that_look_cut_or_spell_their_end():
    texts = ["a"] * 20
    assert response_cautions("responses", texts, [64] * 10 + [5] * 10) == []
    assert response_cautions("responses", ["yes"] * 20, [2] * 20) == []
    assert "11 of 20 responses have exactly 64 tokens" in only(
        response_cautions("responses", texts, [64] * 11 + [5] * 9)
    )
    marked = response_cautions("responses", ["a</s>\n", "b"], [3, 9])
    assert "1 of 2 responses end with an end of text that is spelled out (</s>)" in only(marked)
    assert response_cautions("responses", [], []) == []


def test_one_text_above_itself():
    assert twin_cautions([(["a", "b", "a"], [1, 2, 1])]) == []
    found = twin_cautions([(["a", "a", "b"], [1, 2, 3]), (["a", "b"], [1, 2])])
    assert "1 of 2 comparisons (50%) rank one text above itself" in only(found)


def recorded(run: Path) -> list[dict]:
    path = run / "alarms.jsonl"
    return [json.loads(line) for line in path.read_text().splitlines()] if path.exists() else []


def test_a_run_says_them_once_and_a_resume_what_is_new(tiny: Path, tmp_path: Path, capsys):
    data = dataclasses.replace(sft_config(tiny, tmp_path).data, valid_fraction=0.0)
    config = sft_config(
        tiny,
        tmp_path,
        data=data,
        adam=AdamConfig(lr=1e-3, warmup=50),
        saving=SaveConfig(save_every=1),
    )
    train_until(config, 2)
    found = recorded(tmp_path)
    assert [row["name"] for row in found] == ["held_out", "warmup", "small_data"]
    assert [row["step"] for row in found] == [0, 0, 0]
    out = capsys.readouterr().out
    assert out.count("WARNING held_out: no demonstrations are held out") == 1
    assert out.index("WARNING warmup") < out.index("1/4")  # before the first step
    train(config)
    assert "WARNING" not in capsys.readouterr().out
    assert recorded(tmp_path) == found
    train(dataclasses.replace(config, epochs=30.0))
    assert [row["name"] for row in recorded(tmp_path)][3:] == ["repeated"]


def test_a_held_out_part_that_is_too_long_ends_no_run(tiny: Path, tmp_path: Path, capsys):
    long_text = "the mill is a cheap pub near the river " * 20
    valid = write_lines(tmp_path / "v.jsonl", [{"prompt": "a", "response": long_text}])
    data = dataclasses.replace(sft_config(tiny, tmp_path).data, valid=valid)
    train(sft_config(tiny, tmp_path / "sft", data=data))
    assert f"too long (--data.valid {valid})" in capsys.readouterr().out
    valid = write_lines(
        tmp_path / "c.jsonl", [{"prompt": "a", "chosen": long_text, "rejected": "a"}]
    )
    rm_data = dataclasses.replace(rm_config(tiny, tmp_path).data, valid=valid)
    train(rm_config(tiny, tmp_path / "rm", data=rm_data, epochs=5.0, batch_size=1000))
    assert f"too long (--data.valid {valid})" in capsys.readouterr().out
    assert {row["name"] for row in recorded(tmp_path / "rm")} == {
        "held_out",
        "repeated",
        "small_data",
    }
    valid = write_lines(tmp_path / "p.jsonl", [{"prompt": long_text}])
    ppo_data = dataclasses.replace(ppo_config(tiny, tmp_path).data, valid=valid)
    train(ppo_config(tiny, tmp_path / "ppo", data=ppo_data))
    assert f"all 1 held-out prompts are too long (--data.valid {valid})" in capsys.readouterr().out


def test_ppo_says_what_it_trains_on_of_what_it_holds_out(tiny: Path, tmp_path: Path):
    lines = (tiny / "prompts.jsonl").read_text().splitlines()
    valid = write_lines(tmp_path / "v.jsonl", [{"prompt": "a pub"}, json.loads(lines[0])])
    data = dataclasses.replace(ppo_config(tiny, tmp_path).data, valid=valid)
    train(ppo_config(tiny, tmp_path / "run", data=data, iterations=1))
    found = {row["name"]: row["message"] for row in recorded(tmp_path / "run")}
    assert found["overlap"].startswith("1 of 2 held-out examples have a prompt that is trained on")
    assert found["few_held_out"].startswith("2 prompts are held out: ")
    data = dataclasses.replace(data, valid=None, valid_fraction=0.0)
    train(ppo_config(tiny, tmp_path / "none", data=data, iterations=1))
    (message,) = (r["message"] for r in recorded(tmp_path / "none") if r["name"] == "held_out")
    assert message.startswith("no prompts are held out (--data.valid-fraction 0 of 24)")


@pytest.mark.parametrize("role", ["reward_model", "reference"])
def test_ppo_keeps_to_the_shortest_context(tiny: Path, tmp_path: Path, role: str, capsys):
    short = tmp_path / "short"
    short.mkdir()
    write_tiny_files(short)
    write_tiny_checkpoints(short, dataclasses.replace(SIZE, context_length=28))
    changes = {role: short / role}
    train(ppo_config(tiny, tmp_path / "run", **changes, iterations=1))  # of 24 new tokens
    dropped = [row for row in recorded(tmp_path / "run") if row["name"] == "dropped"]
    whose = role.replace("_", " ")
    assert f"leaves of the {whose}'s context of 28" in dropped[0]["message"]
