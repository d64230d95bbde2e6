"""Models take turns on the device and the state of optimizers rests on the host: no number changes,
and bytes are where the ledger says."""

import dataclasses
import gc
import weakref
from pathlib import Path

import numpy as np
import pytest
import torch

from engine.data.examples import Example
from engine.errors import UserError
from engine.ranks.parallel import Parallel
from engine.residency.expected import PHASES
from engine.residency.residency import Residency
from engine.rollout import generate_rollout
from engine.settings.layout import ParallelLayout
from engine.settings.numerics import Numerics
from engine.settings.residency import ResidencyConfig
from engine.training.ema import EMA
from engine.training.optimizer import Optimizer
from models.paged_attention import PagedCache
from tests.engine.residency.scene import CHOICES, SAMPLING, equal, loader, numbers, scene
from tests.ranks import run_ranks
from tests.tiny import (
    ADAM,
    EVERY_STEP,
    SIZE,
    ppo_config,
    random_network,
    rows_of,
    train,
    train_until,
    weights_of,
)

# One memory, two networks


def test_scoring_brings_the_guest_once_the_owner_was_read(parallel: Parallel):
    case = scene(parallel, CHOICES["host"])
    policy, critic, reference, reward_model = (
        case.networks[role] for role in ("policy", "critic", "reference", "reward_model")
    )
    with case.residency.rollout():
        pass
    with case.residency.score():
        with policy.present():
            pass
        assert equal(numbers(policy), case.given["reference"])  # on its way while the critic reads
        with critic.present():
            assert equal(numbers(critic), case.given["critic"])
        assert equal(numbers(critic), case.given["reward_model"])
        with reference.present(), reward_model.present():
            pass
    with case.residency.update():
        assert equal(numbers(policy), case.given["policy"])
        assert equal(numbers(critic), case.given["critic"])


def test_critic_gives_its_memory_up_while_responses_are_generated(parallel: Parallel):
    case = scene(parallel, ResidencyConfig(critic="host"))
    critic = case.networks["critic"]
    weights = [p.untyped_storage() for p in critic.modules[0].parameters()]
    assert all(storage.nbytes() for storage in weights)
    with case.residency.rollout():
        assert not any(storage.nbytes() for storage in weights)
        with pytest.raises(RuntimeError, match="absent weights: this scalar network"):
            critic.settle()
    with case.residency.score(), critic.present():
        assert equal(numbers(critic), case.given["critic"])


def test_reference_of_another_size_has_memory_only_while_it_is_read(parallel: Parallel):
    size = dataclasses.replace(SIZE, num_layers=2)
    other = random_network("language", parallel, size=size, seed=7)
    given = numbers(other)
    policy, critic = (
        Optimizer(random_network(kind, parallel), ADAM, total_steps=5)
        for kind in ("language", "scalar")
    )
    config = ResidencyConfig(reference="host")
    residency = Residency(config, policy=policy, critic=critic, ema=EMA(policy, 0.9))
    reference = residency.frozen("reference", size, loader(other))
    storages = [p.untyped_storage() for p in reference.modules[0].parameters()]
    for _ in range(2):
        assert not any(storage.nbytes() for storage in storages)
        with residency.score(), reference.present():
            assert equal(numbers(reference), given)


# State of the optimizers


def test_masters_of_fp32_weights_stay_views_of_them(parallel: Parallel):
    case = scene(parallel, ResidencyConfig(optimizer="host"), dtype="fp32")
    for phase in (case.residency.rollout, case.residency.update):
        with phase():
            for parameter, part, master in case.learner.policy.owned_masters():
                assert master.data_ptr() == parameter.view(-1)[part].data_ptr()
            assert equal(numbers(case.networks["policy"]), case.given["policy"])


def test_gradients_have_memory_in_updates_only(parallel: Parallel):
    case = scene(parallel, ResidencyConfig())
    (buffer,) = case.networks["policy"].chunks[0].buffers
    with case.residency.rollout():
        assert buffer.grad_data.untyped_storage().nbytes() == 0
    with case.residency.update():
        case.learner.policy.zero_gradients()
        parameter = next(case.networks["policy"].modules[0].parameters())
        parameter.main_grad += 1.0
        assert buffer.grad_data.sum() == parameter.numel()
    with case.residency.score():
        assert buffer.grad_data.untyped_storage().nbytes() == 0


# The key-value cache


def test_cache_is_given_back_when_the_responses_are_there(parallel: Parallel, monkeypatch):
    made: list[weakref.ref] = []
    build = PagedCache.__init__

    def note(self: PagedCache, *arguments: object, **named: object) -> None:
        build(self, *arguments, **named)  # type: ignore[arg-type]
        made.append(weakref.ref(self))

    monkeypatch.setattr(PagedCache, "__init__", note)
    policy = random_network("language", parallel)
    prompts = [Example(tokens=np.array([3, 4, 5]), prompt_length=3)] * 5
    gc.disable()  # by reference counts alone: the next phase does not wait for a collection
    try:
        generate_rollout(policy, prompts, SAMPLING, eos_id=-1, seed=0, first_sample_index=0)
        assert [reference() for reference in made] == [None]
    finally:
        gc.enable()


# The ledger


def test_out_of_memory_is_told_with_the_ledger_and_what_to_change(parallel: Parallel):
    case = scene(parallel, ResidencyConfig(optimizer="host"))
    with pytest.raises(UserError) as caught, case.residency.score():
        raise torch.OutOfMemoryError("CUDA out of memory. Tried to allocate 2.00 GiB. GPU 0 has")
    lines = str(caught.value).splitlines()
    assert lines[0] == "out of GPU memory in phase score: CUDA out of memory"
    assert lines[1].split() == ["MiB", *PHASES, "host"]
    assert any(line.startswith("policy optimizer") for line in lines)
    assert lines[-1] == (
        "set --residency.reward-model host, --residency.reference host; "
        "or lower --micro-batch-tokens"
    )
    with pytest.raises(ValueError, match="other"), case.residency.score():
        raise ValueError("other errors pass")


# Whole runs


def assert_same(run: Path, other: Path) -> None:
    """Compare metrics and final weights to the last bit."""
    assert rows_of(run) == rows_of(other)
    for role in ("policy", "ema", "critic"):
        ours, theirs = weights_of(run, role), weights_of(other, role)
        assert all(torch.equal(ours[name], theirs[name]) for name in theirs), role


@pytest.fixture(scope="module")
def runs(tiny: Path, tmp_path_factory: pytest.TempPathFactory) -> Path:
    """Where the bf16 runs lie that all choices are compared with."""
    folder = tmp_path_factory.mktemp("runs")
    train(ppo_config(tiny, folder / "resident", numerics=Numerics(dtype="bf16")))
    return folder


@pytest.mark.parametrize("choice", ["host", "sharded"])
def test_choices_change_no_bit(choice: str, tiny: Path, runs: Path):
    config = ppo_config(tiny, runs / choice, numerics=Numerics(dtype="bf16"))
    train(dataclasses.replace(config, residency=CHOICES[choice]))
    assert_same(runs / choice, runs / "resident")
    table = (runs / choice / "memory.txt").read_text()
    assert "policy gradients" in table
    assert "expected, without" in table


def test_fp32_run_from_the_host_resumes_to_the_same_bits(tiny: Path, tmp_path: Path):
    config = ppo_config(tiny, tmp_path / "run", saving=EVERY_STEP, residency=CHOICES["host"])
    train_until(config, 1)
    train(config)
    whole = dataclasses.replace(config, directory=tmp_path / "whole", residency=ResidencyConfig())
    train(whole)
    assert_same(tmp_path / "run", tmp_path / "whole")


def train_all(files: Path, folder: Path, runs: dict[str, tuple]) -> None:
    """Run PPO under every (layout, critic's layout, choice): folder/NAME."""
    for name, (layout, critic_layout, choice) in runs.items():
        config = ppo_config(
            files,
            folder / name,
            layout=layout,
            critic_layout=critic_layout,
            residency=CHOICES[choice],
            numerics=Numerics(dtype="bf16"),
            iterations=1,
        )
        train(config)


TP2, DP2, PP2 = ParallelLayout(tp=2), ParallelLayout(), ParallelLayout(pp=2)
TWO = {
    "tp2": (TP2, None, "resident"),
    "tp2_host": (TP2, None, "host"),
    "dp2": (DP2, None, "resident"),
    "dp2_sharded": (DP2, None, "sharded"),
}
FOUR = {
    f"{name}_{choice}": (layout, critic_layout, choice)
    for name, layout, critic_layout in (
        ("pp2_virtual", ParallelLayout(pp=2, virtual_pp=2), None),
        ("tp2_pp2", ParallelLayout(tp=2, pp=2, sequence_parallel=True), DP2),
    )
    for choice in ("resident", "host", "sharded")
}


def assert_same_on_ranks(folder: Path, runs: dict[str, tuple]) -> None:
    for name, (*_, choice) in runs.items():
        if choice != "resident":
            stem = name.removesuffix(f"_{choice}")
            resident = stem if stem in runs else f"{stem}_resident"
            assert_same(folder / name, folder / resident)


def test_choices_change_no_bit_on_two_ranks(tiny: Path, tmp_path: Path):
    run_ranks(train_all, 2, tiny, tmp_path, TWO)
    assert_same_on_ranks(tmp_path, TWO)
    shards = (tmp_path / "dp2_sharded" / "memory.txt").read_text().splitlines()
    whole = (tmp_path / "dp2" / "memory.txt").read_text().splitlines()
    in_rollout = [
        float(next(line for line in lines if line.startswith("reference")).split()[2])
        for lines in (shards, whole)
    ]
    assert in_rollout[0] == pytest.approx(in_rollout[1] / 2, rel=0.05)


@pytest.mark.slow
def test_choices_change_no_bit_on_four_ranks(tiny: Path, tmp_path: Path):
    run_ranks(train_all, 4, tiny, tmp_path, FOUR)
    assert_same_on_ranks(tmp_path, FOUR)
