"""The head of reward model and critic is fp32 in every dtype, with all that trains and saves it."""

import functools
import math
from pathlib import Path

import numpy as np
import pytest
import torch
from megatron.core.tensor_parallel.mappings import gather_from_sequence_parallel_region

from engine.checkpoints.checkpointer import Checkpointer
from engine.checkpoints.weights import load_weights
from engine.data.batches import PackedBatch, pack
from engine.data.examples import Example
from engine.ranks.parallel import Parallel
from engine.ranks.start import start_parallel
from engine.settings.adam import AdamConfig
from engine.settings.layout import ParallelLayout
from engine.settings.saving import SaveConfig
from engine.training.network import Network
from engine.training.optimizer import Optimizer
from engine.training.passes import forward, forward_backward
from engine.training.reduce import StepMetrics
from tests.ranks import run_ranks
from tests.tiny import random_network


def batch(length: int = 40) -> PackedBatch:
    tokens = np.random.default_rng(0).integers(0, 100, length)
    return pack([Example(tokens=tokens, prompt_length=1)], multiple_of=1)


def mean_square(batch: PackedBatch, readings: torch.Tensor) -> tuple[torch.Tensor, StepMetrics]:
    return (readings - 3.0).square().mean(), {}


def trained(
    directory: Path, parallel: Parallel, *, seed: int = 0, old: bool = False
) -> tuple[Optimizer, Checkpointer]:
    """A bf16 scalar network in training, and where it is saved; old: its head is bf16 too, as
    earlier versions had it."""
    network = random_network("scalar", parallel, seed=seed, dtype="bf16")
    if old:
        for head in heads(network):
            head.bfloat16().forward = functools.partial(_read_16_bits, head)
    optimizer = Optimizer(network, AdamConfig(lr=1e-3), total_steps=9)
    checkpointer = Checkpointer(
        directory=directory,
        parallel=parallel,
        saving=SaveConfig(save_in_background=False),
        networks={"critic": network},
        optimizers={"critic": optimizer},
    )
    return optimizer, checkpointer


def _read_16_bits(head: torch.nn.Module, hidden: torch.Tensor) -> torch.Tensor:
    readings = (hidden.float() @ head.weight.float().T + head.bias.float())[:, 0]
    if not head.config.sequence_parallel:
        return readings
    return gather_from_sequence_parallel_region(
        readings, tensor_parallel_output_grad=False, group=head._group
    )


def heads(network: Network) -> list[torch.nn.Module]:
    return [m.scalar_head for m in network.modules if hasattr(m, "scalar_head")]


def step(optimizer: Optimizer, position: int) -> None:
    optimizer.zero_gradients()
    forward_backward(optimizer.network, [batch(), batch()], mean_square)
    assert not optimizer.step(position).was_skipped


def tensors(optimizer: Optimizer) -> list[torch.Tensor]:
    weights = [p.detach().float() for m in optimizer.network.modules for p in m.parameters()]
    return [t.clone() for t in (*weights, *optimizer.state_tensors())]


@pytest.mark.parametrize("dtype", ["bf16", "fp16"])
def test_readings_are_finer_than_the_trunks_dtype(dtype: str):
    network = random_network("scalar", start_parallel(ParallelLayout(), seed=1), dtype=dtype)
    (head,) = heads(network)
    (low,) = forward(network, [batch()])
    with torch.no_grad():
        head.bias += 11.0 + 1e-3  # bf16 has 11.0 and 11.0625
    (high,) = forward(network, [batch()])
    torch.testing.assert_close(high - low, torch.full_like(low, 11.001), rtol=0, atol=3e-6)


def test_head_trains_by_itself_in_fp32():
    optimizer, _ = trained(Path(), start_parallel(ParallelLayout(), seed=1))
    (head,) = heads(optimizer.network)
    before = head.bias.item()
    step(optimizer, 0)
    assert head.bias.item() == pytest.approx(before + 1e-3, abs=1e-6)  # Adam's first step is lr
    of_head = [m for p, _, m in optimizer.owned_masters() if p is head.bias]
    assert of_head[0].data_ptr() == head.bias.data_ptr()


def test_checkpoint_with_a_16_bit_head_loads_and_resumes(tmp_path: Path):
    parallel = start_parallel(ParallelLayout(), seed=1)
    old, saver = trained(tmp_path, parallel, old=True)
    step(old, 0)
    saver.save(1, {})
    found = random_network("scalar", parallel, seed=5, dtype="bf16")
    load_weights(found, tmp_path / "step_00000001", role="critic")
    for ours, theirs in zip(heads(found), heads(old.network), strict=True):
        assert ours.weight.dtype is torch.float32
        assert torch.equal(ours.weight, theirs.weight.float())
    resumed, loader = trained(tmp_path, parallel, seed=5)
    assert loader.resume() is not None
    masters = [{id(p): m for p, _, m in o.owned_masters()} for o in (resumed, old)]
    for ours, theirs in zip(heads(resumed.network), heads(old.network), strict=True):
        # The fp32 master of the old head is the new head, to the last bit.
        assert torch.equal(masters[0][id(ours.weight)], masters[1][id(theirs.weight)])
    step(resumed, 1)


def resume_on_ranks(directory: Path) -> list[str]:
    """Train, save and resume in every layout; return what is amiss on this rank."""
    faults = []
    layouts = {
        "dp2": ParallelLayout(),
        "dp2_overlapped": ParallelLayout(overlap_grad_reduce=True, overlap_param_gather=True),
        "tp2_sequence": ParallelLayout(tp=2, sequence_parallel=True),
        "pp2_interleaved": ParallelLayout(pp=2, virtual_pp=2),
    }
    for name, layout in layouts.items():
        parallel = start_parallel(layout, seed=1)
        first, saver = trained(directory / name, parallel)
        step(first, 0)
        step(first, 1)
        saver.save(2, {})
        second, loader = trained(directory / name, parallel, seed=5)
        loader.resume()
        read = [forward(o.network, [batch(), batch()])[0] for o in (first, second)]
        if not (read[0] - read[1]).abs().max() <= 0.0:
            faults.append(f"{name}: reads {(read[0] - read[1]).abs().max()}")
        # Replicas hold the same head, whoever owns its master.
        for head in heads(second.network):
            flat = torch.cat([head.weight.flatten(), head.bias]).detach()
            others = [torch.empty_like(flat) for _ in range(parallel.num_replicas)]
            torch.distributed.all_gather(others, flat, group=parallel.replica_group)
            if not all(torch.equal(other, flat) for other in others):
                faults.append(f"{name}: replicas differ")
        step(first, 2)
        step(second, 2)
        first.network.settle()
        second.network.settle()
        pairs = zip(tensors(first), tensors(second), strict=True)
        if not all(torch.equal(a, b) for a, b in pairs):
            faults.append(f"{name}: a resume goes another way")
    return faults


@pytest.mark.slow
def test_resumes_on_two_ranks_agree(tmp_path: Path):
    assert run_ranks(resume_on_ranks, 2, tmp_path) == [[], []]


def test_head_starts_at_the_std_of_its_width():
    network = random_network("scalar", start_parallel(ParallelLayout(), seed=1), dtype="bf16")
    (head,) = heads(network)
    head.initialise()
    width = head.weight.shape[1]
    assert head.weight.std().item() == pytest.approx(1 / math.sqrt(width + 1), rel=0.5)
    assert (head.weight != head.weight.bfloat16().float()).any()  # drawn in fp32
