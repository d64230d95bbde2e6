"""A number that differs when a step is computed again is named, and nothing is applied."""

import dataclasses
import json
from pathlib import Path

import pytest
import torch

from engine import rm, sft, update
from engine.errors import UserError
from engine.settings.layout import ParallelLayout
from engine.settings.numerics import Numerics
from engine.settings.residency import ResidencyConfig
from engine.training.network import Network
from engine.training.recheck import checked_gradients
from tests.engine.planted_spikes import STAGES, spiky_config
from tests.ranks import run_ranks
from tests.tiny import rows_of, train, weights_of

TWICE = Numerics(deterministic=True, recheck_every=2, compare_every=3)
SOUND = Numerics(deterministic=True)
DEVICE = f"device {'cuda' if torch.cuda.is_available() else 'cpu'}"
OVERLAP = {"overlap_grad_reduce": True, "overlap_param_gather": True, "bucket_elements": 5_000}
LAYOUTS = {
    "tp2_sequence": ParallelLayout(tp=2, sequence_parallel=True),
    "dp2": ParallelLayout(),
    "dp2_overlap": ParallelLayout(**OVERLAP),
    "pp2": ParallelLayout(pp=2),
    "pp2_virtual": ParallelLayout(pp=2, virtual_pp=2),
}
ROLES = {"sft": "policy", "rm": "reward_model", "ppo": "policy", "ppo_critic": "critic"}


def flip(monkeypatch: pytest.MonkeyPatch, role: str, rank: int, what: str, call: int) -> None:
    """Flip the lowest bit of one number that the passes of a network give on a rank, in the
    `call`-th time that they are computed, from 0."""
    calls = [0]

    def flipped(optimizer, compute, *, step: int, role: str, planted=role):
        network: Network = optimizer.network

        def spoiled():
            metrics = compute()
            if role == planted:
                if calls[0] == call and network.parallel.rank == rank:
                    if what == "loss" and metrics:
                        metrics = {name: value.clone() for name, value in metrics.items()}
                        bits(next(iter(metrics.values())))[0] ^= 1
                    elif what == "gradient":
                        *_, parameter = network.modules[-1].parameters()
                        bits(parameter.main_grad)[0] ^= 1
                calls[0] += 1
            return metrics

        return checked_gradients(optimizer, spoiled, step=step, role=role)

    for module in (sft, rm, update):
        monkeypatch.setattr(module, "checked_gradients", flipped)


def bits(tensor: torch.Tensor) -> torch.Tensor:
    words = {4: torch.int32, 8: torch.int64}[tensor.element_size()]
    return tensor.detach().view(-1).view(words)


@pytest.mark.parametrize("stage", STAGES)
def test_sound_run_is_the_same_with_passes_computed_twice(stage: str, tiny: Path, tmp_path: Path):
    for name, numerics in (("twice", TWICE), ("once", SOUND)):
        train(spiky_config(stage, tiny, tmp_path / name, numerics=numerics))
    assert rows_of(tmp_path / "twice") == rows_of(tmp_path / "once")
    for role in STAGES[stage][3]:
        ours, theirs = (weights_of(tmp_path / name, role) for name in ("twice", "once"))
        assert all(torch.equal(ours[name], theirs[name]) for name in theirs)


@pytest.mark.parametrize("what", ["gradient", "loss"])
@pytest.mark.parametrize("stage", STAGES)
def test_flipped_bit_is_named_and_nothing_is_applied(
    stage: str, what: str, tiny: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
):
    # Passes of steps 0, 1 (twice), 2, 3 (twice): the fifth and sixth are those of step 3.
    flip(monkeypatch, ROLES[stage], 0, what, 5)
    config = spiky_config(stage, tiny, tmp_path, numerics=TWICE)
    with pytest.raises(UserError) as error:
        train(config)
    message = str(error.value)
    for words in ("step 3:", f"of the {ROLES[stage]},", "rank 0 (node ", DEVICE, "at fault"):
        assert words in message
    if what == "gradient":
        assert "final_layernorm.bias" in message or "scalar_head.bias" in message
    else:
        assert "loss" in message
    num_saved = 2 if not stage.startswith("ppo") else 0  # of steps, of iterations of two of them
    latest = tmp_path / "checkpoints/latest"
    assert latest.exists() == bool(num_saved)
    monkeypatch.undo()
    train(config)  # the same command goes on, and ends as a sound run
    train(spiky_config(stage, tiny, tmp_path / "sound", numerics=TWICE))
    assert rows_of(tmp_path) == rows_of(tmp_path / "sound")


def test_flip_in_a_step_that_is_computed_once_is_not_seen(
    tiny: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
):
    flip(monkeypatch, "policy", 0, "gradient", 0)
    train(spiky_config("sft", tiny, tmp_path, numerics=TWICE))


def test_dropout_is_drawn_alike_both_times(tiny: Path, tmp_path: Path):
    every = dataclasses.replace(TWICE, recheck_every=1)
    train(spiky_config("sft", tiny, tmp_path / "twice", dropout=0.5, numerics=every, epochs=0.6))
    train(spiky_config("sft", tiny, tmp_path / "once", dropout=0.5, numerics=SOUND, epochs=0.6))
    assert rows_of(tmp_path / "twice") == rows_of(tmp_path / "once")


def test_parked_optimizer_state_is_not_wanted_for_it(tiny: Path, tmp_path: Path):
    residency = ResidencyConfig(reference="host", critic="host", optimizer="host")
    changes = {"residency": residency, "iterations": 3}
    train(spiky_config("ppo", tiny, tmp_path / "twice", numerics=TWICE, **changes))
    train(spiky_config("ppo", tiny, tmp_path / "once", numerics=SOUND, **changes))
    assert rows_of(tmp_path / "twice") == rows_of(tmp_path / "once")


def ends(stage: str, files: Path, folder: Path, layouts: dict[str, ParallelLayout]) -> dict:
    """Train in each layout, soundly and with a bit flipped on rank 1; return what was said."""
    said = {}
    for name, layout in layouts.items():
        for numerics in (TWICE, SOUND):
            run = folder / f"{name}_{numerics.recheck_every}"
            train(spiky_config(stage, files, run, numerics=numerics, layout=layout, **SHORT[stage]))
        with pytest.MonkeyPatch.context() as patch:
            flip(patch, ROLES[stage], 1, "gradient", 5)
            config = spiky_config(stage, files, folder / f"{name}_flipped", numerics=TWICE)
            with pytest.raises(UserError) as error:
                train(dataclasses.replace(config, layout=layout))
            said[name] = str(error.value)
    return said


SHORT: dict[str, dict] = {"sft": {"epochs": 1.0}, "rm": {"epochs": 1.2}, "ppo": {"iterations": 3}}


@pytest.mark.parametrize("stage", ["sft", "rm", pytest.param("ppo", marks=pytest.mark.slow)])
def test_rank_at_fault_is_named_to_all_in_every_layout(stage: str, tiny: Path, tmp_path: Path):
    layouts = LAYOUTS
    ours, theirs = run_ranks(ends, 2, stage, tiny, tmp_path, layouts)
    for name in layouts:
        assert ours[name] == theirs[name]
        assert "step 3:" in ours[name] and "rank 1 (node " in ours[name]
        assert "rank 0 (node" not in ours[name]
        twice, once = (rows_of(tmp_path / f"{name}_{every}") for every in (2, 0))
        assert twice == once, name
        assert not (tmp_path / f"{name}_flipped/checkpoints/step_00000004").exists()
    config = json.loads((tmp_path / "dp2_2/config.json").read_text())
    assert config["numerics"]["recheck_every"] == 2
