"""Steps of this engine's SFT and reward model as engine/sft.py and engine/rm.py take them.

A ranking's prompt is computed once a completion, as by the others: benchmarks/shared_prompts.py has
what computing it once saves.
"""

from pathlib import Path
from typing import Any

import numpy as np
import torch

from benchmarks.padded_steps import HEAD
from benchmarks.real_job import ADAM, RealJob, num_tokens
from benchmarks.turns import Turns
from engine.feed import step_batch
from engine.huggingface.convert import load_huggingface
from engine.losses import NegativeLogLikelihood, comparison_loss
from engine.ranks.parallel import Parallel
from engine.ranks.seeds import seed_for_step
from engine.ranks.start import start_parallel
from engine.settings.layout import ParallelLayout
from engine.training.network import Network, build_network
from engine.training.optimizer import Optimizer
from engine.training.passes import LanguageLoss, ScalarLoss, forward_backward
from engine.training.reduce import reduce_metrics


def run(turns: Turns, folder: Path, passes: int) -> None:
    """Take the steps on one rank, a batch packed into about `passes` rows without padding."""
    job = turns.job
    parallel = start_parallel(ParallelLayout(), seed=0)
    network = _network(job, parallel, folder)
    optimizer = Optimizer(network, ADAM, total_steps=1)
    optimizer.prepare_state()

    def state() -> list[torch.Tensor]:
        buffers = [buffer for chunk in network.chunks for buffer in chunk.buffers]
        both = [t for buffer in buffers for t in (buffer.param_data, buffer.grad_data)]
        return [*both, *optimizer.state_tensors()]

    turns.state = state
    for step in turns.steps():
        seed_for_step(parallel, step)
        optimizer.zero_gradients()
        units = job.units(step)
        batch = step_batch(units, parallel, -(-num_tokens(units) // passes))
        batches = batch.batches
        loss: LanguageLoss | ScalarLoss
        if job.task == "sft":
            loss = NegativeLogLikelihood(batch.num_targets)
        else:
            loss = comparison_loss(len(units))
        sums = forward_backward(network, batches, loss)
        optimizer.step(step)
        found = reduce_metrics(sums, parallel)
        turns.report(
            loss=found["loss"],
            num_tokens=sum(int(batch.cu_seqlens[batch.num_sequences]) for batch in batches),
            num_positions=sum(len(batch.tokens) for batch in batches),
            num_passes=len(batches),
        )


def settings() -> dict[str, Any]:
    """Return what the provider is told, for the record."""
    return {}


def _network(job: RealJob, parallel: Parallel, folder: Path) -> Network:
    """Return the network with the folder's weights, or with random ones where it has none."""
    has_weights = (folder / "config.json").exists()
    language = build_network("language", job.size, parallel, numerics=job.numerics)
    if has_weights:
        load_huggingface(language, folder)
    if job.task == "sft":
        return language
    scalar = build_network("scalar", job.size, parallel, numerics=job.numerics)
    if has_weights:
        mine = dict(scalar.modules[0].named_parameters())
        for name, parameter in language.modules[0].named_parameters():
            mine[name].data.copy_(parameter.data)
        mine["scalar_head.weight"].data.copy_(torch.from_numpy(np.load(folder / HEAD)))
    return scalar
