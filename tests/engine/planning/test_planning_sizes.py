"""Whose size a plan takes, and what it says of that."""

import json
from pathlib import Path

import pytest

from engine.errors import UserError
from engine.planning.sizes import named_sizes, sizes_at
from engine.settings.ppo import PPOConfig
from engine.settings.rm import RMConfig
from engine.settings.sft import SelectionConfig, SFTConfig
from models.form import Form
from models.huggingface.config import size_of_config
from models.sizes import SIZES, size_as_json
from tests.families import CONFIGS

NOWHERE = Path("/nowhere")
LLAMA = size_of_config(CONFIGS["llama"])


@pytest.fixture
def folder(tmp_path: Path) -> Path:
    """A Hugging Face folder of which only the config.json is there."""
    (tmp_path / "llama").mkdir()
    (tmp_path / "llama/config.json").write_text(json.dumps(CONFIGS["llama"]))
    return tmp_path / "llama"


def network(folder: Path, role: str, kind: str, name: str) -> Path:
    """Write the network.json of a run's checkpoint, of a named size."""
    (folder / role).mkdir(parents=True)
    size = size_as_json(SIZES[name])
    text = json.dumps({"kind": kind, "size": size, "tokenizer": ""})
    (folder / role / "network.json").write_text(text)
    return folder / role


def test_a_folder_has_the_say_over_the_named_size(folder: Path):
    for size in ("1.3b", ""):
        found = sizes_at(SFTConfig(size=size, init_from=folder))
        assert found.policy is not None and found.reward_model is None
        assert found.policy.size == found.trained == LLAMA
        assert found.policy.origin == f"as {folder} says"
        scorer = sizes_at(RMConfig(size=size, init_from=folder))
        assert scorer.policy is None and scorer.trained == LLAMA
    (line,) = found.lines()
    assert line == (
        "policy: 4 layers of 64, 4 heads (4 of keys and values), vocabulary 300, context 64; as "
        f"{folder} says"
    )


def test_a_run_that_has_begun_has_the_size_of_its_own_copy(folder: Path, tmp_path: Path):
    run = tmp_path / "run"
    copy = network(run / "sources/init_from", "policy", "language", "small")
    for path in (folder, NOWHERE):  # which says another now, or is gone
        found = sizes_at(SFTConfig(size="", init_from=path, directory=run))
        assert found.policy is not None and found.policy.is_found
        assert (found.trained, found.policy.origin) == (SIZES["small"], f"as {copy} says")
    network(run / "sources/reference", "policy", "language", "tiny")
    ppo = PPOConfig(size="", reward_model_size="", directory=run, policy=NOWHERE)
    assert sizes_at(ppo).trained == SIZES["tiny"]


def test_a_folder_that_scores_texts_is_no_policy(folder: Path):
    config = CONFIGS["llama"] | {"architectures": ["LlamaForSequenceClassification"]}
    (folder / "config.json").write_text(json.dumps(config))
    for kind in (SFTConfig, RMConfig):
        with pytest.raises(UserError, match="scores texts and writes none; a language model is"):
            sizes_at(kind(size="", init_from=folder))


def test_so_has_a_network_of_ours(tmp_path: Path):
    policy = network(tmp_path, "policy", "language", "small")
    found = sizes_at(SFTConfig(size="1.3b", init_from=policy))
    assert found.trained == SIZES["small"]
    assert found.policy is not None and found.policy.origin == f"as {policy} says"


def test_what_is_not_there_has_the_named_size_and_that_is_said():
    config = SFTConfig(size="1.3b", init_from=NOWHERE)
    found = sizes_at(config)
    assert found.trained == SIZES["1.3b"] and found.policy is not None
    assert found.policy.origin == "the size 1.3b, for --init-from /nowhere is not there"
    assert named_sizes(config).trained == SIZES["1.3b"]
    (line,) = named_sizes(config).lines()
    assert line.endswith("; the size 1.3b")
    with pytest.raises(UserError, match="a plan needs --size, for --init-from /nowhere is not"):
        sizes_at(SFTConfig(size="", init_from=NOWHERE))
    with pytest.raises(UserError, match="--init-from is required"):
        sizes_at(SFTConfig(size=""))


def test_a_name_of_the_hub_gets_a_word_about_the_network():
    found = sizes_at(SFTConfig(size="125m", init_from=Path("openai-community/gpt2")))
    (line,) = found.lines()
    assert "nothing here uses the network. `hf download openai-community/gpt2`" in line
    ours = sizes_at(SFTConfig(size="125m", init_from=Path("runs/gpt3")))
    assert not any("hf download" in line for line in ours.lines())


def test_ppos_networks_are_looked_at_each(folder: Path, tmp_path: Path):
    scorer = network(tmp_path, "reward_model", "scalar", "small")
    anchor = network(tmp_path, "policy", "language", "tiny")
    config = PPOConfig(policy=folder, reward_model=scorer, reference=anchor)
    found = sizes_at(config)
    assert found.policy and found.reward_model and found.reference
    assert (found.policy.size, found.reference.size) == (LLAMA, SIZES["tiny"])
    assert found.reward_model.size == SIZES["small"]
    assert [line.partition(":")[0] for line in found.lines()] == [
        *("policy", "reward model", "reference"),
    ]


def test_a_reward_model_that_is_still_to_come_is_the_policys_like(folder: Path):
    found = sizes_at(PPOConfig(policy=folder, reward_model=NOWHERE))
    assert found.reward_model is not None and found.reward_model.size == LLAMA
    origin = "the policy's, for --reward-model /nowhere is not there"
    assert found.reward_model.origin == origin
    named = sizes_at(PPOConfig(policy=folder, reward_model=NOWHERE, reward_model_size="6b"))
    assert named.reward_model is not None and named.reward_model.size == SIZES["6b"]


def test_ppos_named_sizes_are_conditions(folder: Path):
    with pytest.raises(UserError, match="llama: the policy has 4 layers of width 64 .* a 1.3b"):
        sizes_at(PPOConfig(policy=folder, size="1.3b"))


def test_sfts_selector_is_the_papers_unless_it_is_there(tmp_path: Path):
    config = SFTConfig(selection=SelectionConfig(reward_model=NOWHERE))
    found = sizes_at(config)
    assert found.reward_model is not None and found.reward_model.size == SIZES["6b"]
    scorer = network(tmp_path, "reward_model", "scalar", "small")
    found = sizes_at(SFTConfig(selection=SelectionConfig(reward_model=scorer)))
    assert found.reward_model is not None and found.reward_model.size == SIZES["small"]
    assert found.trained == SIZES["tiny"]


def test_a_band_is_a_part_of_the_size():
    found = sizes_at(SFTConfig(size="125m", band=256))
    assert found.trained.form == Form(window=256, windowed_layers="every second")
    assert found.policy is not None and "a band of 256 tokens" in found.policy.origin
