"""What a run keeps of what it read: the same file in every stage, data.json, what is too long."""

import dataclasses
import json
from pathlib import Path
from typing import Any

import pytest

from engine.errors import UserError
from engine.settings.rm import RMData
from tests.engine.shapes.shape_samples import asked, said
from tests.tiny import ppo_config, rm_config, sft_config, train, write_lines


def with_data(config: Any, **changes: Any) -> Any:
    return dataclasses.replace(config, data=dataclasses.replace(config.data, **changes))


def account_of(run: Path) -> Any:
    return json.loads((run / "data.json").read_text())


def long_and_short(folder: Path) -> Path:
    """Write demonstrations, some with a long prompt and some long in all."""
    lengths = [(3, 4)] * 8 + [(30, 4)] * 3 + [(3, 70)] * 2
    return write_lines(
        folder / "long.jsonl",
        (
            {"prompt": "the " * p + str(n), "response": "mill " * r}
            for n, (p, r) in enumerate(lengths)
        ),
    )


def test_a_public_file_is_read_and_told_of(tiny: Path, tmp_path: Path, capsys):
    rows = [{"instruction": f"the mill {n}", "input": "", "output": "a pub"} for n in range(20)]
    path = write_lines(tmp_path / "alpaca.jsonl", [*rows, {"x": 1}])
    config = with_data(sft_config(tiny, tmp_path / "run"), train=path, skip_bad_lines=True)
    train(config)
    assert "20 records, read as alpaca: instruction, input, output, 1 bad lines" in (
        " ".join(capsys.readouterr().out.split())
    )
    found = account_of(tmp_path / "run")["data.train"]
    assert found["read_as"] == "alpaca: instruction, input, output"
    assert (found["records"], found["bad_lines"]) == (20, 1)
    assert "alpaca.jsonl:21: is of no shape; there is x" in found["first_errors"][0]
    assert found["train"]["kept"] + found["valid"]["kept"] == 20
    assert account_of(tmp_path / "run")["data.pretraining"]["read_as"] == "plain"


def test_one_file_of_pairs_trains_the_reward_model_and_is_asked_by_ppo(tiny: Path, tmp_path: Path):
    """UltraFeedback's prompt beside whole dialogues was text in one stage and turns in another."""
    rows = [
        {
            "prompt": f"the mill {n}",
            "chosen": asked(f"the mill {n}", "a pub"),
            "rejected": asked(f"the mill {n}", "fish"),
            "messages": asked(f"the mill {n}", "a pub"),
        }
        for n in range(12)
    ]
    path = write_lines(tmp_path / "pairs.jsonl", rows)
    sft = sft_config(tiny, tmp_path / "sft")
    rm = with_data(rm_config(tiny, tmp_path / "rm"), train=path, demonstrations=None)
    ppo = ppo_config(tiny, tmp_path / "ppo", iterations=1, ptx_coef=0.0)
    for config in (with_data(sft, train=path), rm, with_data(ppo, prompts=path)):
        train(config)
    for name, option in (("sft", "train"), ("rm", "train"), ("ppo", "prompts")):
        found = account_of(tmp_path / name)[f"data.{option}"]
        assert found["read_as"].startswith("pair-with-prompt: ")
        assert found["records"] == 12


def test_every_limit_that_was_passed_is_kept_with_its_number(tiny: Path, tmp_path: Path):
    config = with_data(
        sft_config(tiny, tmp_path / "run"),
        train=long_and_short(tmp_path),
        max_prompt_tokens=20,
        valid_fraction=0.0,
    )
    train(config)
    found = account_of(tmp_path / "run")["data.train"]["train"]
    assert found == {
        "kept": 8,
        "cut": 0,
        "dropped": 5,
        "dropped_for": {
            "a prompt over 20 tokens (--data.max-prompt-tokens)": 3,
            "over 64 tokens (the model's context) in all": 2,
        },
    }


@pytest.mark.parametrize(
    ("too_long", "num_kept", "num_cut"), [("cut-left", 11, 3), ("cut-right", 10, 2)]
)
def test_what_is_too_long_is_cut_where_that_is_asked_for(
    too_long: str, num_kept: int, num_cut: int, tiny: Path, tmp_path: Path, capsys
):
    config = with_data(
        sft_config(tiny, tmp_path / "run"),
        train=long_and_short(tmp_path),
        max_prompt_tokens=20,
        valid_fraction=0.0,
        too_long=too_long,
    )
    train(config)
    found = account_of(tmp_path / "run")["data.train"]["train"]
    assert (found["kept"], found["cut"]) == (num_kept, num_cut)
    assert f"{num_kept} kept ({num_cut} of them cut)" in capsys.readouterr().out


def test_the_end_of_a_completion_is_not_cut():
    with pytest.raises(UserError, match="--data.too-long cut-right takes the end off a completion"):
        RMData(too_long="cut-right")


def test_prompts_of_ppo_are_cut_and_dialogues_are_not(tiny: Path, tmp_path: Path):
    rows = [{"prompt": f"the mill {n} " + "the " * (40 if n % 2 else 1)} for n in range(16)]
    path = write_lines(tmp_path / "prompts.jsonl", rows)
    config = ppo_config(tiny, tmp_path / "run", iterations=1, ptx_coef=0.0)
    train(with_data(config, prompts=path, too_long="cut-left", valid_fraction=0.0))
    assert account_of(tmp_path / "run")["data.prompts"]["train"] == {
        "kept": 16,
        "cut": 8,
        "dropped": 0,
        "dropped_for": {},
    }
    write_lines(path, [*rows, {"prompt": [said("user", "the mill")]}])
    with pytest.raises(UserError, match="cut-left is for plain texts"):
        other = dataclasses.replace(config, directory=tmp_path / "other")
        train(with_data(other, prompts=path, too_long="cut-left"))


def test_held_out_text_may_be_shorter_than_a_sequence(tiny: Path, tmp_path: Path):
    short = write_lines(tmp_path / "short.jsonl", [{"text": "the mill"}])
    config = sft_config(tiny, tmp_path / "run")
    train(with_data(config, pretraining_valid=short))
    values = [json.loads(line) for line in (tmp_path / "run" / "metrics.jsonl").open()]
    assert values[-1]["valid/pretrain_loss"] > 0


def test_what_of_a_held_out_file_is_not_answered_is_told(tiny: Path, tmp_path: Path):
    rows = [{"prompt": f"the mill {n % 5}"} for n in range(9)]
    path = write_lines(tmp_path / "valid.jsonl", rows)
    config = ppo_config(tiny, tmp_path / "run", iterations=1, ptx_coef=0.0)
    train(with_data(config, valid=path, num_valid=3))
    assert account_of(tmp_path / "run")["data.valid"]["left_out"] == {
        "the same prompt again": 4,
        "beyond --data.num-valid": 2,
    }


def test_another_choice_of_fields_is_another_run(tiny: Path, tmp_path: Path):
    rows = [{"q": f"the mill {n}", "a": "a pub", "b": "fish"} for n in range(9)]
    path = write_lines(tmp_path / "own.jsonl", rows)
    config = with_data(sft_config(tiny, tmp_path / "run"), train=path, fields="prompt=q,response=a")
    train(config)
    assert account_of(tmp_path / "run")["data.train"]["read_as"] == "prompt=q, response=a"
    with pytest.raises(UserError, match="data.fields prompt=q,response=a, not prompt=q,response=b"):
        train(with_data(config, fields="prompt=q,response=b"))
