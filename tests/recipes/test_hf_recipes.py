"""The recipes of a model from a folder: one command each, with the folder and data alone."""

import ast
import functools
import runpy
from pathlib import Path
from typing import Any

import pytest
from transformers import AutoModelForCausalLM

from engine.cautions.of_settings import schedule_cautions
from engine.checkpoints.found import size_of
from engine.huggingface.convert import convert
from engine.ranks.start import end_parallel
from engine.recipe import run_stage
from engine.settings.convert import ConvertConfig
from models.sizes import SIZES
from tests.families import save_family
from tests.recipes.test_paper_recipes import PAPER, by_size, value_of
from tests.tiny import SIZE, rows_of, write_files

RECIPES = Path(__file__).parents[2] / "recipes"
STAGES = ("sft", "rm", "ppo")
SHORTEST = 1024  # context of the families' public folders: GPT-2's
# What differs from the paper, which each recipe says; the others are its values at 1.3B or at 6B.
OURS = {
    "sft": {"epochs", "dropout", "selection.reward_model"},
    "rm": set(),
    "ppo": {"ptx_coef", "reward_model_size", "sampling.max_new_tokens"},
}


@functools.cache
def config_of(stage: str) -> Any:
    return runpy.run_path(str(RECIPES / f"{stage}_hf.py"))["config"]


@pytest.mark.parametrize("stage", STAGES)
def test_values_are_the_papers_but_for_those_that_are_said(stage: str):
    config = config_of(stage)
    differing = {
        field
        for field, value in PAPER[stage].items()
        if value_of(config, field) not in by_size(value)[:2]
    }
    assert differing == OURS[stage] | {
        f"data.{name}" for name in ("max_prompt_tokens", "max_tokens") if hasattr(config.data, name)
    }
    source = (RECIPES / f"{stage}_hf.py").read_text()
    assert source.count("ur choice") >= 3
    assert f"recipes/{stage}_hf.py" in (ast.get_docstring(ast.parse(source)) or "")


def test_each_begins_with_the_run_of_the_one_before():
    sft, rm, ppo = map(config_of, STAGES)
    assert rm.init_from == ppo.policy == sft.directory and ppo.reward_model == rm.directory
    assert {sft.size, rm.size, ppo.size, ppo.reward_model_size} == {""}
    assert sft.init_from is None  # which the user names


def test_limits_fit_the_shortest_context_and_one_another():
    sft, rm, ppo = map(config_of, STAGES)
    assert sft.data.max_tokens == rm.data.max_tokens == sft.data.pretraining_tokens == SHORTEST
    assert ppo.data.max_prompt_tokens + ppo.sampling.max_new_tokens == SHORTEST
    prompts = {config.data.max_prompt_tokens for config in (sft, rm, ppo)}
    assert len(prompts) == 1  # what one stage trains on, the next one answers
    assert all(c.micro_batch_tokens >= SHORTEST for c in (sft, rm, ppo))


@pytest.mark.parametrize("size", ["125m", "1.3b", "13b"])
def test_rates_are_none_that_undo_what_a_model_of_0_1b_to_13b_knows(size: str):
    sft, rm, ppo = map(config_of, STAGES)
    for adam in (sft.adam, rm.adam, ppo.adam, ppo.critic_adam):
        assert schedule_cautions("adam", adam, 1000, SIZES[size]) == []


def test_three_commands_train_a_small_folder_and_what_they_make_leaves_again(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch
):
    save_family("qwen2", tmp_path / "model", vocab_size=SIZE.vocab_size)
    write_files(tmp_path)
    (tmp_path / "tokenizer.json").rename(tmp_path / "model/tokenizer.json")
    monkeypatch.chdir(tmp_path)

    def run(stage: str, *words: str) -> Path:
        run_stage(f"engine.{stage}.train", config_of(stage), words)
        return tmp_path / config_of(stage).directory

    sft = run("sft", "--init-from", "model", "--data.train", "demonstrations.jsonl")
    rm = run("rm", "--data.train", "comparisons.jsonl")
    # Two things are asked of whoever has little: a context of 64, and few prompts.
    ppo = run(
        *("ppo", "--data.prompts", "prompts.jsonl", "--sampling.max-new-tokens", "8"),
        *("--iterations", "2", "--rollout-batch-size", "8", "--minibatch-size", "4"),
    )
    wanted = size_of(sft, "policy")
    assert (wanted.num_kv_heads, wanted.context_length) == (2, 64)
    assert size_of(rm, "reward_model") == size_of(ppo, "policy") == size_of(ppo, "critic") == wanted
    assert len(rows_of(ppo)) == 2 and abs(rows_of(ppo)[0]["score/kl"]) < 1e-3
    for folder in (sft, rm, ppo):
        alarms = folder / "alarms.jsonl"
        assert not alarms.exists() or "large_lr" not in alarms.read_text()
    convert(ConvertConfig(direction="export", source=ppo, out=tmp_path / "out"))
    theirs = AutoModelForCausalLM.from_pretrained(tmp_path / "out")
    assert theirs.config.model_type == "qwen2"


@pytest.mark.parametrize("stage", STAGES)
def test_a_dry_run_takes_the_folders_size_of_which_only_the_config_is_there(
    stage: str, tmp_path: Path, capsys: pytest.CaptureFixture
):
    end_parallel()
    save_family("llama", tmp_path, max_position_embeddings=SHORTEST)
    (tmp_path / "model.safetensors").unlink()
    option = "--policy" if stage == "ppo" else "--init-from"
    words = [option, str(tmp_path), "--dry-run", "2", "--layout.tp", "2"]
    run_stage(pytest.fail, config_of(stage), words)
    said = capsys.readouterr().out
    assert "every check passed" in said
    size = "4 layers of 64, 4 heads (4 of keys and values), vocabulary 300, context 1,024"
    assert f"{size}; as {tmp_path} says" in said
    with pytest.raises(SystemExit):
        run_stage(pytest.fail, config_of(stage), [*words, "--layout.pp", "3", "--dry-run", "6"])
    assert "pp 3 x --layout.virtual-pp 1 must divide the 4 layers" in capsys.readouterr().err


def test_more_tensor_parallelism_than_heads_of_keys_is_refused(
    tmp_path: Path, capsys: pytest.CaptureFixture
):
    save_family("qwen2", tmp_path, max_position_embeddings=SHORTEST)
    words = ["--init-from", str(tmp_path), "--dry-run", "4", "--layout.tp", "4"]
    with pytest.raises(SystemExit):
        run_stage(pytest.fail, config_of("sft"), words)
    assert "layout.tp 4 must divide the 2 heads of keys and values" in capsys.readouterr().err


@pytest.mark.parametrize("stage", STAGES)
def test_readme_names_the_recipe_and_its_command(stage: str):
    assert f"python recipes/{stage}_hf.py" in (RECIPES / "README.md").read_text()
