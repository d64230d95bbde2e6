"""A gradient that is not finite on one rank alone is skipped by all ranks."""

import contextlib
import itertools
import math
from collections.abc import Iterator

import pytest
import torch

import engine.training.optimizer
from engine.ranks.start import start_parallel
from engine.settings.adam import AdamConfig
from engine.settings.layout import ParallelLayout
from engine.training.network import Network
from engine.training.optimizer import Optimizer
from tests.engine.training.test_optimizer import masters, take_step
from tests.ranks import run_ranks
from tests.tiny import random_network

LAYOUTS = {
    "tp2": ParallelLayout(tp=2),
    "tp2_sequence": ParallelLayout(tp=2, sequence_parallel=True),
    "pp2": ParallelLayout(pp=2),
    "dp2": ParallelLayout(),
    "dp2_overlapped": ParallelLayout(overlap_grad_reduce=True, overlap_param_gather=True),
}


def spoil_each() -> list[str]:
    """Spoil one parameter after the other on one rank at a time, in the backward pass or behind the
    reduction; return what was not skipped, or changed something, on this rank."""
    return [f"{name}: {fault}" for name, layout in LAYOUTS.items() for fault in faults(layout)]


def faults(layout: ParallelLayout) -> Iterator[str]:
    parallel = start_parallel(layout, seed=1)
    network = random_network("language", parallel, dtype="bf16")
    optimizer = Optimizer(network, AdamConfig(lr=1e-3, max_skipped_steps=99), total_steps=9)
    names = [name for name, _ in network.modules[0].named_parameters()]
    norm = next(name for name in names if "layernorm.weight" in name)  # the same on all tp ranks
    # A replica reads its own part of reduced gradients, so nothing is amiss there.
    places = (False, True) if layout.tp * layout.pp > 1 else (False,)
    for rank, name, is_reduced in itertools.product((0, 1), (names[0], norm, names[-1]), places):
        before = [m.clone() for m in masters(optimizer)]
        version = network.weights_version
        parameter = network.modules[0].get_parameter(name)
        with spoiled(parameter if parallel.rank == rank else None, is_reduced=is_reduced):
            result = take_step(optimizer, 0)
        pairs = zip(before, masters(optimizer), strict=True)
        is_same = all(torch.equal(a, b) for a, b in pairs) and network.weights_version == version
        if not result.was_skipped or not is_same:
            yield f"{name} on rank {rank}, reduced {is_reduced}: {result}, unchanged {is_same}"
    if take_step(optimizer, 0).was_skipped:
        yield "a sound step after them is skipped"


@contextlib.contextmanager
def spoiled(parameter: torch.nn.Parameter | None, *, is_reduced: bool) -> Iterator[None]:
    """Run a block in which one number of the parameter's gradient is NaN, if one is given."""
    if parameter is None:
        yield
    elif is_reduced:
        finish = engine.training.optimizer.finish_gradients

        def finish_and_spoil(network: Network) -> None:
            finish(network)
            parameter.main_grad.view(-1)[-1] = math.nan

        with pytest.MonkeyPatch.context() as patch:
            patch.setattr(engine.training.optimizer, "finish_gradients", finish_and_spoil)
            yield
    else:

        def spoil(gradient: torch.Tensor) -> torch.Tensor:
            changed = gradient.clone()
            changed.view(-1)[-1] = math.nan
            return changed

        hook = parameter.register_hook(spoil)
        yield
        hook.remove()


@pytest.mark.slow
def test_all_ranks_skip_what_one_rank_cannot_take():
    assert run_ranks(spoil_each, 2) == [[], []]
