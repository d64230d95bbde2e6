import dataclasses

import torch

from engine.ranks.parallel import Parallel
from engine.ranks.seeds import seed_for_head, seed_for_initialisation, seed_for_step


def test_every_step_and_seed_draws_other_numbers(parallel: Parallel):
    def draw(parallel: Parallel, step: int) -> float:
        seed_for_step(parallel, step)
        return torch.rand(()).item()

    drawn = [draw(parallel, step) for step in range(4)]
    drawn.append(draw(dataclasses.replace(parallel, seed=6), 0))
    drawn.append(draw(dataclasses.replace(parallel, dp_rank=1), 0))
    drawn.append(draw(dataclasses.replace(parallel, pp_rank=1), 0))
    assert len(set(drawn)) == len(drawn)
    assert draw(parallel, 2) == drawn[2]


def test_initial_weights_are_alike_on_data_parallel_ranks_only(parallel: Parallel):
    def draw(parallel: Parallel) -> float:
        seed_for_initialisation(parallel)
        return torch.rand(()).item()

    first = draw(parallel)
    assert draw(dataclasses.replace(parallel, dp_rank=1)) == first
    assert draw(dataclasses.replace(parallel, pp_rank=1)) != first


def test_heads_are_alike_on_every_rank(parallel: Parallel):
    def draw(parallel: Parallel) -> float:
        seed_for_head(parallel)
        return torch.rand(()).item()

    first = draw(parallel)
    assert draw(dataclasses.replace(parallel, pp_rank=1, dp_rank=1, tp_rank=1)) == first
    assert draw(dataclasses.replace(parallel, seed=6)) != first
