import contextlib
import dataclasses

import numpy as np
import pytest
import torch

from engine.generation.generate import generate
from engine.ranks.parallel import Parallel
from engine.residency.host import Link
from engine.residency.residency import model_bytes
from engine.residency.seat import Seat
from engine.settings.residency import ResidencyConfig
from engine.training.optimizer import Optimizer
from tests.engine.residency.scene import SAMPLING, equal, loader, nothing, numbers, scene
from tests.tiny import (
    ADAM,
    SIZE,
    random_network,
)


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
