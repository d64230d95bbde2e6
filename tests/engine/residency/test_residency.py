"""Models take turns on the device and the state of optimizers rests on the host: no number changes,
and bytes are where the ledger says."""

import contextlib
import dataclasses
import gc
import weakref
from collections.abc import Callable
from pathlib import Path

import numpy as np
import pytest
import torch

from engine.data.examples import Example
from engine.errors import UserError
from engine.generation.generate import generate
from engine.ranks.parallel import Parallel
from engine.ranks.start import start_parallel
from engine.residency.expected import PHASES, ModelBytes, expected_bytes
from engine.residency.host import HostCopy, Link
from engine.residency.residency import Residency, model_bytes
from engine.residency.seat import Seat
from engine.rollout import generate_rollout
from engine.score import read_rollout
from engine.settings.layout import ParallelLayout
from engine.settings.numerics import Numerics
from engine.settings.residency import ResidencyConfig
from engine.settings.sampling import SamplingConfig
from engine.training.ema import EMA
from engine.training.network import Network
from engine.training.optimizer import Optimizer
from engine.update import Learner
from models.paged_attention import PagedCache
from tests.engine.generation.recorded import record_steps
from tests.ranks import run_ranks
from tests.tiny import (
    ADAM,
    SIZE,
    ppo_config,
    random_network,
    rows_of,
    train,
    train_until,
    weights_of,
)

CPU = torch.device("cpu")
SAMPLING = SamplingConfig(max_new_tokens=8, num_slots=4, cache_gib=0.01)
CHOICES = {
    "resident": ResidencyConfig(),
    "host": ResidencyConfig(reference="host", reward_model="host", critic="host", optimizer="host"),
    "sharded": ResidencyConfig(reference="sharded", reward_model="sharded", optimizer="host"),
    "critic_only": ResidencyConfig(critic="host"),
    "one_each": ResidencyConfig(reference="sharded", reward_model="host"),
}


@pytest.fixture
def parallel() -> Parallel:
    return start_parallel(ParallelLayout(), seed=1)


def numbers(network: Network) -> list[torch.Tensor]:
    """A copy of the weights that are in the network's memory."""
    return [p.detach().clone() for module in network.modules for p in module.parameters()]


def equal(ours: list[torch.Tensor], theirs: list[torch.Tensor]) -> bool:
    return len(ours) == len(theirs) and all(map(torch.equal, ours, theirs))


def nothing() -> None:
    """Observe nobody."""


def loader(source: Network) -> Callable[[Network | None], Network]:
    """Stand in for a checkpoint: what Residency loads is `source`'s weights."""

    def load(into: Network | None) -> Network:
        if into is None:
            return source
        pairs = zip(into.modules, source.modules, strict=True)
        for module, other in pairs:
            module.load_state_dict(other.state_dict())
        into.mark_changed()
        return into

    return load


@dataclasses.dataclass(kw_only=True)
class Scene:
    """Four models under a residency, and what each of them was given."""

    residency: Residency
    networks: dict[str, Network]
    given: dict[str, list[torch.Tensor]]
    learner: Learner


def scene(parallel: Parallel, config: ResidencyConfig, *, dtype: str = "bf16") -> Scene:
    kinds = {"policy": "language", "reference": "language"}
    made = {
        role: random_network(kinds.get(role, "scalar"), parallel, seed=seed, dtype=dtype)
        for seed, role in enumerate(("policy", "critic", "reference", "reward_model"))
    }
    given = {role: numbers(network) for role, network in made.items()}
    policy, critic = (Optimizer(made[r], ADAM, total_steps=5) for r in ("policy", "critic"))
    ema = EMA(policy, 0.9)
    residency = Residency(config, policy=policy, critic=critic, ema=ema)
    networks = {"policy": made["policy"], "critic": made["critic"]}
    for role in ("reference", "reward_model"):
        networks[role] = residency.frozen(role, SIZE, loader(made[role]))
    learner = Learner(policy=policy, critic=critic, ema=ema, pretraining=None)
    return Scene(residency=residency, networks=networks, given=given, learner=learner)


# Copies


@pytest.mark.parametrize("bucket_bytes", [64, 192, 1000, 10**6])
def test_host_copy_returns_every_byte_whatever_the_buckets(bucket_bytes: int):
    generator = torch.Generator().manual_seed(0)
    tensors = [torch.randn(n, generator=generator) for n in (1, 500, 16, 3)]
    before = [tensor.clone() for tensor in tensors]
    storages = [tensor.untyped_storage() for tensor in tensors]
    copy = HostCopy(Link(CPU, bucket_bytes=bucket_bytes), [s.nbytes() for s in storages])
    copy.save(storages)
    for tensor in tensors:
        tensor.zero_()
    copy.load(storages)
    assert equal(tensors, before)
    assert 4 * 520 <= copy.num_bytes <= 4 * 520 + 3 * 64


# One memory, two networks


def test_guest_borrows_the_memory_and_leaves_it_as_it_was(parallel: Parallel):
    case = scene(parallel, ResidencyConfig(reference="host"))
    policy, reference = case.networks["policy"], case.networks["reference"]
    masters = [m.clone() for _, _, m in case.learner.policy.owned_masters()]
    memory = [p.data_ptr() for p in policy.modules[0].parameters()]
    assert equal(numbers(policy), case.given["policy"])
    with reference.present():
        assert equal(numbers(reference), case.given["reference"])
        assert [p.data_ptr() for p in reference.modules[0].parameters()] == memory
        assert equal([m for _, _, m in case.learner.policy.owned_masters()], masters)
    with policy.present():
        assert equal(numbers(policy), case.given["policy"])
    assert equal([m for _, _, m in case.learner.policy.owned_masters()], masters)


def test_swapped_out_policy_neither_generates_nor_reads_nor_trains(parallel: Parallel):
    case = scene(parallel, ResidencyConfig(reference="host"))
    policy, reference = case.networks["policy"], case.networks["reference"]
    prompts = [np.array([3, 4, 5])] * 5
    running = generate(policy, prompts, SAMPLING, eos_id=-1, seed=0)
    next(running)
    with reference.present():
        with pytest.raises(RuntimeError, match="absent weights: this language network"):
            generate(policy, prompts, SAMPLING, eos_id=-1, seed=0)
        with pytest.raises(RuntimeError, match="absent weights"):
            list(running)  # a response under way would go on with the reference's weights
        with pytest.raises(RuntimeError, match="absent weights"):
            policy.settle()  # whoever saves or reshards weights calls it
    with pytest.raises(RuntimeError, match="absent weights"):
        reference.settle()
    with policy.present():
        assert len(list(generate(policy, prompts, SAMPLING, eos_id=-1, seed=0))) == 5


def test_weights_that_changed_are_copied_out_anew(parallel: Parallel):
    case = scene(parallel, ResidencyConfig(reference="host"))
    policy, reference = case.networks["policy"], case.networks["reference"]
    for phase in (case.residency.score, contextlib.nullcontext):  # begun ahead, or by the swap
        with case.residency.update(), torch.no_grad():
            for _, _, master in case.learner.policy.owned_masters():
                master += 0.5
            case.learner.policy.sync_weights()
        changed = numbers(policy)
        with phase(), reference.present():
            assert not equal(numbers(policy), changed)
        with policy.present():
            assert equal(numbers(policy), changed)


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


def test_optimizer_on_the_host_keeps_its_state_and_refuses_to_step_there(parallel: Parallel):
    case = scene(parallel, ResidencyConfig(optimizer="host"))
    optimizer, ema = case.learner.policy, case.learner.ema
    tensors = [*optimizer.state_tensors(), *ema.shadows]
    for n, tensor in enumerate(tensors):
        tensor.fill_(n)
    with case.residency.rollout():
        assert not any(tensor.untyped_storage().nbytes() for tensor in tensors)
        with pytest.raises(RuntimeError, match="the optimizer's state is in host memory"):
            optimizer.prepare_state()
    with case.residency.update():
        assert all(bool((tensor == n).all()) for n, tensor in enumerate(tensors))
        optimizer.prepare_state()


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


def held_bytes(case: Scene) -> int:
    """What the tensors of all four models, and of what trains, hold on the device."""
    tensors = [p for n in case.networks.values() for m in n.modules for p in m.parameters()]
    for optimizer in (case.learner.policy, case.learner.critic):
        tensors += optimizer.state_tensors()
        tensors += [b.grad_data for chunk in optimizer.network.chunks for b in chunk.buffers]
    storages = {t.untyped_storage()._cdata: t.untyped_storage() for t in tensors}
    storages |= {t.untyped_storage()._cdata: t.untyped_storage() for t in case.learner.ema.shadows}
    return sum(storage.nbytes() for storage in storages.values())


def test_a_cache_beside_torchs_allocator_is_counted(parallel: Parallel):
    case = scene(parallel, CHOICES["resident"])
    decoding = record_steps(case.networks["policy"])
    with case.residency.rollout() as network:
        list(generate(network, [np.array([3, 4, 5])], SAMPLING, eos_id=-1, seed=0))
        decoding.memory.last_bytes = 123
    assert case.residency.ledger.outside_bytes == 123
    with case.residency.score():
        assert case.residency.ledger.outside_bytes == 0


@pytest.mark.parametrize("dtype", ["fp32", "bf16"])
@pytest.mark.parametrize("choice", CHOICES)
def test_peaks_follow_the_plan(choice: str, dtype: str, parallel: Parallel):
    case = scene(parallel, CHOICES[choice], dtype=dtype)
    ledger = case.residency.ledger
    prompts = [Example(tokens=np.array([3, 4, 5]), prompt_length=3)] * 2
    with case.residency.rollout():
        rollout = generate_rollout(
            case.networks["policy"], prompts, SAMPLING, eos_id=-1, seed=0, first_sample_index=0
        )
        in_rollout = held_bytes(case)
    with case.residency.score():
        for role in ("policy", "critic", "reference", "reward_model"):
            read_rollout(case.networks[role], rollout, 100)
    with case.residency.update():
        in_update = held_bytes(case)
    expected = ledger.expected
    assert expected is not None
    for phase in PHASES:
        assert ledger.peaks[phase] == pytest.approx(expected.device_total(phase), rel=0.05), phase
    if "sharded" not in (case.residency.config.reference, case.residency.config.reward_model):
        assert ledger.peaks["rollout"] == in_rollout
        assert ledger.peaks["update"] == in_update
    host = ledger.metrics()["memory/host_bytes"]
    assert host == pytest.approx(expected.host_total, rel=0.05)
    assert (host > 0) == (choice != "resident")


def test_host_choices_leave_the_device_to_what_works():
    size = ModelBytes(weights=100, gradients=200, optimizer=600, layer=8, ends=20, dp=4)
    frozen = ModelBytes(weights=100, layer=8, ends=20, dp=4)
    models = {"policy": size, "critic": size, "reference": frozen, "reward_model": frozen}
    everything = expected_bytes(CHOICES["resident"], models)
    assert [everything.device_total(phase) for phase in PHASES] == [1600, 1600, 2000]
    least = expected_bytes(CHOICES["host"], models)
    assert [least.device_total(phase) for phase in PHASES] == [100, 200, 1800]
    assert least.host_total == 4 * 100 + 2 * 600
    spread = expected_bytes(CHOICES["sharded"], models)
    assert [spread.device_total(phase) for phase in PHASES] == [250, 250 + 36, 1850]
    larger = {"reference": dataclasses.replace(frozen, weights=150)}
    own = expected_bytes(CHOICES["host"], models | larger)
    assert [own.device_total(phase) for phase in PHASES] == [100, 350, 1800]
    assert own.host_total == 150 + 2 * 100 + 2 * 600  # the policy lends its memory to nobody


def test_out_of_memory_is_told_with_the_ledger_and_what_to_change(parallel: Parallel):
    case = scene(parallel, ResidencyConfig(optimizer="host"))
    with pytest.raises(UserError) as caught, case.residency.score():
        raise torch.OutOfMemoryError("CUDA out of memory. Tried to allocate 2.00 GiB. GPU 0 has")
    lines = str(caught.value).splitlines()
    assert lines[0] == "out of GPU memory in phase score: CUDA out of memory"
    assert lines[1].split() == ["MiB", *PHASES, "host"]
    assert any(line.startswith("policy optimizer") for line in lines)
    assert lines[-1] == (
        "set residency.reward_model host, residency.reference host; or lower micro_batch_tokens"
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
    config = ppo_config(tiny, tmp_path / "run", save_every=1, residency=CHOICES["host"])
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


@pytest.mark.gpu
def test_swap_on_a_gpu_returns_the_weights_and_keeps_the_peak(parallel: Parallel):
    size = dataclasses.replace(SIZE, num_layers=8, hidden_size=1024, vocab_size=50_000)
    owner = random_network("language", parallel, size=size, seed=0, dtype="bf16")
    given = numbers(owner)
    guest_source = random_network("language", parallel, size=size, seed=1, dtype="bf16")
    guest_given = numbers(guest_source)
    Optimizer(owner, ADAM, total_steps=5)
    seat = Seat(owner, Link(parallel.device, bucket_bytes=2**22), nothing)
    guest = seat.admit(loader(guest_source))
    del guest_source
    torch.cuda.synchronize()
    torch.cuda.reset_peak_memory_stats()
    before = torch.cuda.memory_allocated()
    for _ in range(3):
        with guest.present():
            assert equal(numbers(guest), guest_given)
        with owner.present():
            assert equal(numbers(owner), given)
        seat.vacate()
        weights = model_bytes(owner).weights
        assert torch.cuda.memory_allocated() <= before - weights
    # numbers() copies one network.
    assert torch.cuda.max_memory_allocated() <= 1.05 * (before + weights)
