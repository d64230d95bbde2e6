import dataclasses
from pathlib import Path

import pytest

from engine.identity.made_from import beginning, files_of, names_of, networks_of
from engine.settings.ppo import PPOConfig, PPOData
from engine.settings.rm import RMConfig, RMData
from engine.settings.saving import SaveConfig
from engine.settings.sft import SelectionConfig, SFTConfig, SFTData

A, B, C = Path("runs/a"), Path("runs/b"), Path("runs/c")


def test_ppo_is_made_from_three_networks_of_which_two_may_be_one():
    alone = networks_of(PPOConfig(policy=A, reward_model=C))
    assert {name: (n.path, n.role, n.kept_as) for name, n in alone.items()} == {
        "policy": (A, "policy", "reference"),
        "reference": (A, "policy", "reference"),
        "reward_model": (C, "reward_model", "reward_model"),
    }
    assert networks_of(PPOConfig(policy=A, reference=A / ".." / "a", reward_model=C)).keys() == (
        alone.keys()
    )
    other = networks_of(PPOConfig(policy=A, reference=B, reward_model=C))
    assert other["policy"].kept_as == "policy"
    assert (other["reference"].path, other["reference"].kept_as) == (B, "reference")
    assert all(network.strict for network in other.values())


def test_the_same_path_spelled_otherwise_is_one_copy(tmp_path: Path):
    (tmp_path / "a").mkdir()
    config = PPOConfig(policy=tmp_path / "a", reference=tmp_path / "a" / ".." / "a")
    assert networks_of(config)["policy"].kept_as == "reference"


def test_copy_that_a_run_has_decides_and_no_path(tmp_path: Path):
    (tmp_path / "a").mkdir()
    (tmp_path / "link").symlink_to(tmp_path / "a")
    linked = PPOConfig(policy=tmp_path / "a", reference=tmp_path / "link")
    assert networks_of(linked)["policy"].kept_as == "reference"
    assert networks_of(linked, "policy")["policy"].kept_as == "policy"
    other = PPOConfig(policy=A, reference=B)
    assert networks_of(other, "reference")["policy"].kept_as == "reference"
    (tmp_path / "loop").symlink_to(tmp_path / "loop")
    looped = PPOConfig(policy=tmp_path / "a", reference=tmp_path / "loop")
    assert networks_of(looped)["policy"].kept_as == "policy"


def test_supervised_stages_are_made_from_what_they_start_from():
    assert networks_of(SFTConfig()) == {}
    (found,) = networks_of(RMConfig(init_from=A)).values()
    assert (found.path, found.role, found.strict) == (A, "policy", False)
    config = SFTConfig(
        init_from=A,
        selection=SelectionConfig(reward_model=C),
        saving=SaveConfig(strict=True),
    )
    networks = networks_of(config)
    assert networks["init_from"].strict
    assert networks["selection.reward_model"].role == "reward_model"


def test_files_are_those_that_are_read():
    data = SFTData(train=A, valid=B, pretraining=C)
    assert files_of(SFTConfig(data=data)) == {"data.train": A, "data.valid": B}
    mixed = dataclasses.replace(data, pretraining_fraction=0.1)
    assert files_of(SFTConfig(data=mixed))["data.pretraining"] == C
    plain = SFTData(valid=B, pretraining=C, pretraining_valid=A)
    assert files_of(SFTConfig(data=plain)) == {
        "data.pretraining": C,
        "data.pretraining_valid": A,
    }
    prompts = SelectionConfig(prompts=A)
    assert "selection.prompts" not in files_of(SFTConfig(data=data, selection=prompts))
    scored = dataclasses.replace(prompts, reward_model=C)
    assert files_of(SFTConfig(data=data, selection=scored))["selection.prompts"] == A
    rm = RMConfig(data=RMData(train=A, demonstrations=B))
    assert files_of(rm) == {"data.train": A, "data.demonstrations": B}
    assert list(files_of(PPOConfig(ptx_coef=0.0))) == ["data.prompts"]
    assert list(files_of(PPOConfig(ptx_coef=1.0))) == ["data.prompts", "data.pretraining"]
    held_out = PPOConfig(ptx_coef=0.0, data=PPOData(valid=A, pretraining_valid=B))
    found = {name: path for name, path in files_of(held_out).items() if name != "data.prompts"}
    assert found == {"data.valid": A, "data.pretraining_valid": B}


@pytest.mark.parametrize("kind", [SFTConfig, RMConfig, PPOConfig])
def test_every_name_can_be_accepted(kind: type):
    full = {
        SFTConfig: SFTConfig(
            init_from=A,
            data=SFTData(
                train=A, valid=A, pretraining=A, pretraining_valid=A, pretraining_fraction=0.5
            ),
            selection=SelectionConfig(reward_model=A, prompts=A),
        ),
        RMConfig: RMConfig(init_from=A, data=RMData(valid=A, demonstrations=A)),
        PPOConfig: PPOConfig(reference=B, data=PPOData(valid=A, pretraining_valid=A)),
    }[kind]
    names = names_of(kind)
    own = {*networks_of(full), *files_of(full)}
    assert own == {name for name in names if "." in name or "_" in name or name in own}
    assert {"code", "python", "torch", "megatron-core"} <= {*names} - own
    assert "tokenizer" not in names


def test_a_start_says_from_what_and_a_resume_behind_which_step():
    rm = RMConfig(directory=Path("runs/rm"), init_from=Path("runs/sft"))
    assert beginning(rm, None) == "runs/rm: from runs/sft"
    assert beginning(SFTConfig(directory=Path("runs/a b")), None) == "runs/a b: from nothing"
    ppo = PPOConfig(directory=Path("runs/ppo"), policy=Path("runs/sft"), reward_model=Path("r"))
    assert beginning(ppo, None) == "runs/ppo: from runs/sft against r"
    assert beginning(ppo, 7) == "runs/ppo: goes on behind step 7"
