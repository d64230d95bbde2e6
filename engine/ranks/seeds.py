"""Seeds of weights and dropout: functions of the run's seed, the step and the rank's place."""

from collections.abc import Callable

import torch
from megatron.core import tensor_parallel

from engine.ranks.parallel import Parallel


def seed_for_initialisation(parallel: Parallel) -> None:
    """Seed the generators alike on all data-parallel ranks, so that they draw the same initial
    weights."""
    _seed(parallel, parallel.seed + 1_009 * parallel.pp_rank)


def seed_for_head(parallel: Parallel) -> None:
    """Seed the generators alike on every rank and in every layout, to draw a scalar head: it is
    what a checkpoint of a language model leaves open in a reward model."""
    _seed(parallel, parallel.seed + 50_021)


def seed_for_step(parallel: Parallel, step: int) -> None:
    """Seed dropout from (seed, step, pipeline stage, replica), at the start of an optimizer step.

    A resumed run so draws what an undisturbed one would, and checkpoints hold no generator state.
    tp ranks differ inside tensor-parallel regions only, as megatron wants it.
    """
    place = 1_009 * parallel.pp_rank + 101 * parallel.replica_rank
    _seed(parallel, parallel.seed + 100_003 * (step + 1) + place)


def kept_generators(parallel: Parallel) -> Callable[[], None]:
    """Return what puts the generators of dropout back to where they stand now."""
    tracker = tensor_parallel.get_cuda_rng_tracker()
    states = {name: state.clone() for name, state in tracker.get_states().items()}
    on_cpu = torch.get_rng_state()
    device = torch.cuda.get_rng_state() if parallel.device.type == "cuda" else None

    def put_back() -> None:
        tracker.set_states({name: state.clone() for name, state in states.items()})
        torch.set_rng_state(on_cpu)
        if device is not None:
            torch.cuda.set_rng_state(device)

    return put_back


def _seed(parallel: Parallel, key: int) -> None:
    torch.manual_seed(key)
    with parallel.active():
        tensor_parallel.model_parallel_cuda_manual_seed(key, force_reset_rng=True)
