"""A stage reads prompts as the run before it did, or is refused; and runs of before still go on."""

import dataclasses
import json
import shutil
from pathlib import Path
from typing import Any

import pytest

from engine.data.prompt_format import PromptFormat, read_prompt_format, write_prompt_format
from engine.errors import UserError
from engine.settings.ppo import PPOConfig
from engine.settings.rm import RMConfig
from engine.settings.sft import SelectionConfig, SFTConfig
from tests.tiny import ppo_config, rm_config, sft_config, train, write_lines

BOTH = ("texts", "dialogues")


def changed(config: Any, **options: Any) -> Any:
    """A config with other options of its data."""
    return dataclasses.replace(config, data=dataclasses.replace(config.data, **options))


def small(config: Any) -> Any:
    """The shortest run."""
    if isinstance(config, PPOConfig):
        data = dataclasses.replace(config.data, pretraining_valid=None)
        sampling = dataclasses.replace(config.sampling, max_new_tokens=2)
        config = dataclasses.replace(config, data=data, sampling=sampling, reference=None)
        return dataclasses.replace(
            config, iterations=1, rollout_batch_size=2, minibatch_size=2, ptx_coef=0.0
        )
    return dataclasses.replace(config, epochs=0.1, batch_size=2)


def sft(tiny: Path, directory: Path, **options: Any) -> SFTConfig:
    config = small(sft_config(tiny, directory))
    return changed(config, pretraining=None, pretraining_fraction=0.0, **options)


def rm(tiny: Path, directory: Path, **options: Any) -> RMConfig:
    return changed(small(rm_config(tiny, directory)), demonstrations=None, **options)


def ppo(tiny: Path, directory: Path, **options: Any) -> PPOConfig:
    return changed(small(ppo_config(tiny, directory)), **options)


def kept(directory: Path, form: PromptFormat, source: Path) -> Path:
    """A run that keeps such a format."""
    shutil.copytree(source, directory)
    write_prompt_format(form, directory)
    return directory


@pytest.fixture
def policy(tiny: Path, tmp_path: Path) -> Path:
    """A run that was trained on plain prompts closed by an arrow."""
    return kept(
        tmp_path / "policy",
        PromptFormat(prompt_suffix=" =>", trained_on=("texts",)),
        tiny / "policy",
    )


def test_a_copied_checkpoint_that_says_nothing_is_told(tiny, tmp_path, policy, capsys):
    for source, is_told in ((tiny / "policy", True), (policy, False)):
        config = rm(tiny, tmp_path / f"rm_{is_told}", prompt_suffix=" =>")
        train(dataclasses.replace(config, init_from=source))
        assert ("nothing says in which form" in capsys.readouterr().out) == is_told


def test_demonstrations_of_another_kind_than_the_comparisons_are_told(tiny, tmp_path, capsys):
    said = {"role": "user", "content": "the mill"}
    chats = [{"prompt": [said], "completions": ["a", "b"], "ranks": [1, 2]}] * 4
    plain = [{"prompt": "the mill", "response": "a pub"}] * 4
    config = rm(tiny, tmp_path / "rm", train=write_lines(tmp_path / "chats.jsonl", chats))
    train(changed(config, demonstrations=write_lines(tmp_path / "plain.jsonl", plain)))
    told = "all prompts are plain texts, and this reward model was trained on dialogues alone"
    assert told in capsys.readouterr().out


def test_a_stage_has_the_format_of_the_run_before(tiny, tmp_path, policy):
    config = dataclasses.replace(rm(tiny, tmp_path / "rm"), init_from=policy)
    train(config)
    form = read_prompt_format(tmp_path / "rm")
    assert (form.prompt_suffix, form.trained_on, form.ends_with) == (" =>", ("texts",), 0)
    saved = json.loads((tmp_path / "rm" / "config.json").read_text())["data"]
    asked = {name: saved[name] for name in ("prompt_suffix", "chat", "plain_prompts", "system")}
    assert asked == {
        "prompt_suffix": " =>",
        "chat": "turns",
        "plain_prompts": "text",
        "system": "",
    }
    train(dataclasses.replace(config, epochs=0.2))  # goes on, as it was
    train(changed(dataclasses.replace(config, epochs=0.3), prompt_suffix=" =>"))
    with pytest.raises(UserError, match=r"is a run with data.prompt_suffix  =>, not '\\n'"):
        train(changed(dataclasses.replace(config, epochs=0.4), prompt_suffix="\n"))


@pytest.mark.parametrize("make", [sft, rm])
def test_another_format_than_the_run_befores_is_an_error(tiny, tmp_path, policy, make):
    config = dataclasses.replace(make(tiny, tmp_path / "run", prompt_suffix=""), init_from=policy)
    with pytest.raises(UserError) as error:
        train(config)
    assert str(error.value) == (
        f"--init-from {policy} was trained to read prompts in another form than this run's: "
        "prompt_suffix ' =>' there, '' here; give --data.prompt-suffix ' =>', or train that one "
        "in this form too"
    )
    assert not (tmp_path / "run" / "config.json").exists()


def test_what_was_never_trained_binds_nobody(tiny, tmp_path):
    base = kept(tmp_path / "base", PromptFormat(prompt_suffix=" =>"), tiny / "policy")
    train(dataclasses.replace(sft(tiny, tmp_path / "sft", prompt_suffix=""), init_from=base))
    assert read_prompt_format(tmp_path / "sft").prompt_suffix == ""


def test_networks_of_ppo_were_trained_in_one_form(tiny, tmp_path, policy):
    other = PromptFormat(prompt_suffix="", trained_on=BOTH)
    reward_model = kept(tmp_path / "rm", other, tiny / "reward_model")
    config = dataclasses.replace(ppo(tiny, tmp_path / "ppo"), policy=policy)
    with pytest.raises(UserError, match="--reward-model .*rm was trained .* '' there, ' =>' here;"):
        train(dataclasses.replace(config, reward_model=reward_model))
    reference = kept(tmp_path / "reference", other, tiny / "reference")
    with pytest.raises(UserError, match="--reference .* '' there, ' =>' here; train that one in"):
        train(dataclasses.replace(config, reference=reference))


def test_a_reward_model_of_before_goes_with_a_new_policy_where_nothing_differs(tiny, tmp_path):
    form = PromptFormat(trained_on=("texts",))
    policy = kept(tmp_path / "policy", form, tiny / "policy")
    reward_model = Path(shutil.copytree(tiny / "reward_model", tmp_path / "rm"))
    data = {"train": "comparisons.jsonl", "prompt_suffix": "\n"}
    (reward_model / "config.json").write_text(json.dumps({"data": data}))
    config = ppo(tiny, tmp_path / "ppo")
    config = dataclasses.replace(config, policy=policy, reward_model=reward_model)
    asked = {"messages": [{"role": "user", "content": "mill"}]}
    dialogues = write_lines(tmp_path / "dialogues.jsonl", [asked])
    with pytest.raises(UserError, match="--reward-model .*rm was trained by another version, "):
        train(changed(config, prompts=dialogues))
    train(config)
    assert not read_prompt_format(config.directory).closes_open
    (reward_model / "config.json").unlink()
    train(dataclasses.replace(config, iterations=2))


def test_a_policy_of_dialogues_takes_plain_prompts_as_its_reward_model_does(tiny, tmp_path):
    form = PromptFormat(trained_on=("dialogues",))
    policy = kept(tmp_path / "policy", form, tiny / "policy")
    as_messages = dataclasses.replace(form, plain_prompts="message")
    reward_model = kept(tmp_path / "rm", as_messages, tiny / "reward_model")
    config = dataclasses.replace(
        ppo(tiny, tmp_path / "ppo"), policy=policy, reward_model=reward_model
    )
    with pytest.raises(UserError, match="give --data.plain-prompts message, or train that"):
        train(config)
    train(changed(config, plain_prompts="message"))
    assert read_prompt_format(tmp_path / "ppo").trained_on == ("dialogues",)


def test_what_says_nothing_of_its_prompts_is_said_to(tiny, tmp_path, policy, capsys):
    train(dataclasses.replace(ppo(tiny, tmp_path / "ppo"), policy=policy))
    said = " ".join(capsys.readouterr().out.split())
    assert (
        f"{tiny / 'reward_model'}: nothing says in which form it was trained to read prompts; "
        "this run has plain prompts with ' =>', dialogues by turns"
    ) in said


def test_the_reward_model_of_a_selection_was_trained_in_the_runs_form(tiny, tmp_path, policy):
    form = PromptFormat(prompt_suffix="", trained_on=BOTH)
    judge = kept(tmp_path / "judge", form, tiny / "reward_model")
    config = dataclasses.replace(
        sft(tiny, tmp_path / "sft"),
        init_from=policy,
        selection=SelectionConfig(reward_model=judge),
    )
    with pytest.raises(UserError, match="--selection.reward-model .*judge was trained"):
        train(config)


def test_a_run_of_before_goes_on_as_it_was_and_so_does_what_is_made_of_it(tiny, tmp_path):
    config = sft(tiny, tmp_path / "sft", prompt_suffix=" ")
    train(config)
    directory = config.directory
    settings = json.loads((directory / "config.json").read_text())
    for name in ("chat", "plain_prompts", "system", "replies"):
        del settings["data"][name]
    (directory / "config.json").write_text(json.dumps(settings))
    (directory / "prompt_format.json").unlink()
    train(changed(dataclasses.replace(config, epochs=0.2), prompt_suffix=None))
    form = read_prompt_format(directory)
    assert (form.prompt_suffix, form.closes_open, form.trained_on) == (" ", True, BOTH)
    train(dataclasses.replace(rm(tiny, tmp_path / "rm"), init_from=directory))
    assert read_prompt_format(tmp_path / "rm").closes_open
    config = dataclasses.replace(config, epochs=0.3)
    with pytest.raises(UserError, match="is a run with data.replies last, not all"):
        train(changed(config, replies="all"))


def test_a_format_that_cannot_be_read_is_named(tiny, tmp_path, policy):
    (policy / "prompt_format.json").write_text('{"chat": "chatml"}')
    config = dataclasses.replace(rm(tiny, tmp_path / "rm"), init_from=policy)
    with pytest.raises(UserError, match=r"policy/prompt_format\.json: chat cannot be 'chatml'"):
        train(config)
