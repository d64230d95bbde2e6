"""Checkpoints of several ranks: who writes and reads how much, and what another layout makes of
them."""

import dataclasses
from collections.abc import Iterator
from contextlib import contextmanager
from pathlib import Path

import numpy as np
import pytest
import torch
from safetensors.torch import load_file

from engine.checkpoints import reading
from engine.checkpoints.boxes import within
from engine.checkpoints.checkpointer import Checkpointer
from engine.checkpoints.index import piece_name, read_index
from engine.checkpoints.manifest import read_manifest
from engine.checkpoints.weights import load_weights
from engine.data.batches import pack
from engine.data.examples import Example
from engine.losses import NegativeLogLikelihood
from engine.planning.memory import PlannedNetwork
from engine.ranks.parallel import Parallel
from engine.ranks.start import start_parallel
from engine.settings.adam import AdamConfig
from engine.settings.layout import ParallelLayout
from engine.settings.numerics import Numerics
from engine.settings.saving import SaveConfig
from engine.training.ema import EMA
from engine.training.network import build_network
from engine.training.optimizer import Optimizer
from engine.training.passes import forward_backward
from models.sizes import GPTSize
from tests.ranks import run_ranks
from tests.tiny import SIZE

# Wide enough that tensors, not what describes them, make up the files.
WIDE = dataclasses.replace(SIZE, hidden_size=128)
NARROW = GPTSize(num_layers=1, hidden_size=2, num_heads=1, vocab_size=100, context_length=128)
LAYOUTS = [  # of two ranks; of four, each has two replicas
    ParallelLayout(),
    ParallelLayout(tp=2, sequence_parallel=True),
    ParallelLayout(overlap_grad_reduce=True, bucket_elements=100_000),  # several buckets
    ParallelLayout(pp=2, virtual_pp=2),
    ParallelLayout(cp=2),
    ParallelLayout(pp=2),
]


@dataclasses.dataclass(kw_only=True)
class Training:
    """A policy in training whose every number is drawn, its average, and where both are saved."""

    optimizer: Optimizer
    checkpointer: Checkpointer
    tensors: list[torch.Tensor]
    """Weights, masters, moments and the average, of this rank."""


def training(folder: Path, parallel: Parallel, *, seed: int, size: GPTSize = WIDE) -> Training:
    network = build_network("language", size, parallel, numerics=Numerics(dtype="bf16"))
    optimizer = Optimizer(network, AdamConfig(), total_steps=9)
    ema = EMA(optimizer, 0.9)
    optimizer.prepare_state()
    weights = [
        parameter.detach() for module in network.modules for parameter in module.parameters()
    ]
    generator = torch.Generator().manual_seed(seed)  # the same weights on all data-parallel ranks
    for tensor in weights:
        tensor.normal_(generator=generator)
    generator.manual_seed(10 * seed + parallel.replica_rank)
    state = [*optimizer.state_tensors(), *ema.shadows]
    for tensor in state:
        tensor.normal_(generator=generator)
    return Training(
        optimizer=optimizer,
        checkpointer=Checkpointer(
            directory=folder,
            parallel=parallel,
            saving=SaveConfig(keep=len(LAYOUTS), save_in_background=False),
            networks={"policy": network},
            optimizers={"policy": optimizer},
            ema=ema,
        ),
        tensors=[*weights, *state],
    )


@contextmanager
def reads() -> Iterator[list[int]]:
    """Collect the bytes that are read of stored pieces in a block."""
    found: list[int] = []
    read = reading._Fill.read

    def note(self, stored):  # type: ignore[no-untyped-def]
        found.append(self.part.tensor[self.into].nbytes)
        return read(self, stored)

    reading._Fill.read = note  # type: ignore[method-assign]
    try:
        yield found
    finally:
        reading._Fill.read = read  # type: ignore[method-assign]


def save_and_resume(folder: Path, layout: ParallelLayout) -> dict[str, int]:
    """Return the bytes that this rank writes, reads at a resume, and reads of weights alone."""
    parallel = start_parallel(layout, seed=1)
    first = training(folder, parallel, seed=1)
    first.checkpointer.save(3, {})
    files = folder.glob(f"step_00000003/*/*-{parallel.rank:05d}.safetensors")
    with reads() as resumed:
        second = training(folder, parallel, seed=2)
        second.checkpointer.resume()
    for ours, theirs in zip(second.tensors, first.tensors, strict=True):
        assert torch.equal(ours, theirs)
    frozen = build_network("language", WIDE, parallel, numerics=Numerics(dtype="bf16"))
    with reads() as loaded:
        load_weights(frozen, folder, role="policy")
    (module,) = frozen.modules
    for ours, theirs in zip(module.parameters(), first.tensors, strict=False):
        assert torch.equal(ours, theirs)
    return {
        "written": sum(path.stat().st_size for path in files),
        "resumed": sum(resumed),
        "loaded": sum(loaded),
    }


@pytest.mark.parametrize(
    ("num_ranks", "cp"),
    [(2, 1), (2, 2), pytest.param(4, 2, marks=pytest.mark.slow)],
)
def test_every_rank_writes_and_reads_its_share(num_ranks: int, cp: int, tmp_path: Path):
    layout = ParallelLayout(cp=cp)
    found = run_ranks(save_and_resume, num_ranks, tmp_path, layout)
    planned = PlannedNetwork(
        kind="language",
        size=WIDE,
        layout=layout,
        numerics=Numerics(dtype="bf16"),
        dp=num_ranks // cp,
    )
    share = planned.saved_bytes(0, has_average=True)
    for what, size in (
        ("written", share),
        ("resumed", share),
        ("loaded", planned.weight_bytes(0) / num_ranks),
    ):
        counts = [rank[what] for rank in found]
        # All of it once; what describes the pieces takes a little.
        assert sum(counts) == pytest.approx(num_ranks * size, rel=0.1), what
        uneven = 0.1 if what == "loaded" else 0.05  # weights are dealt as whole tensors
        assert counts == pytest.approx([sum(counts) / num_ranks] * num_ranks, rel=uneven), what


def steps_with_and_without_a_resume(folder: Path) -> dict[str, list]:
    """Return weights, masters and moments after two steps, the second perhaps by a resumed run, and
    how much of the state every rank owns."""
    parallel = start_parallel(ParallelLayout(), seed=1)
    batch = pack([Example(tokens=np.arange(40) % 30, prompt_length=1)], multiple_of=1)

    def step(position: int, into: Training) -> None:
        into.optimizer.zero_gradients()
        forward_backward(into.optimizer.network, [batch], NegativeLogLikelihood(40))
        into.optimizer.step(position)

    whole = training(folder, parallel, seed=1, size=NARROW)
    owned = whole.optimizer.num_owned_by_rank()
    assert owned[parallel.rank] == sum(m.numel() for _, _, m in whole.optimizer.owned_masters())
    for tensor in whole.optimizer.state_tensors():
        tensor.abs_()  # squares have roots
    step(0, whole)
    whole.checkpointer.save(1, {})
    step(1, whole)
    resumed = training(folder, parallel, seed=2, size=NARROW)
    assert resumed.checkpointer.resume() == {"step": 1}
    step(1, resumed)
    return {"whole": whole.tensors, "resumed": resumed.tensors, "owned": owned}


@pytest.mark.slow
def test_rank_that_owns_nothing_but_padding_saves_and_resumes(tmp_path: Path):
    # 1,408 elements, padded to a multiple of 5 x 128: a fifth of 1,920 begins behind the last.
    found = run_ranks(steps_with_and_without_a_resume, 5, tmp_path)
    assert found[0]["owned"][3] > found[0]["owned"][4] == 0
    for rank in found:
        for ours, theirs in zip(rank["resumed"], rank["whole"], strict=True):
            assert torch.equal(ours, theirs) and ours.isfinite().all()


def hand_on(folder: Path) -> None:
    """Save in the first layout as 0; resume in each of the others, and save what came of it."""
    first = training(folder, start_parallel(LAYOUTS[0], seed=1), seed=9)
    first.checkpointer.save(0, {})
    for step, layout in enumerate(LAYOUTS[1:]):
        other = training(folder, start_parallel(layout, seed=1), seed=step)
        assert other.checkpointer.resume() == {"step": step}
        other.checkpointer.save(step + 1, {})


def tensors_of(folder: Path) -> dict[str, torch.Tensor]:
    """Return every whole tensor of a checkpoint."""
    found = {}
    for role in ("policy", "ema"):
        index = read_index(folder / role, read_manifest(folder))
        for name, tensor in index.tensors.items():
            whole = found[f"{role}: {name}"] = torch.empty(tensor.shape)
            for piece in tensor.pieces:
                stored = load_file(folder / role / piece.file)[piece_name(name, piece.offset)]
                whole[within((piece.offset, piece.shape), ((0,) * whole.dim(), whole.shape))] = (
                    stored
                )
    return found


@pytest.mark.slow
def test_checkpoint_of_one_layout_resumes_in_another(tmp_path: Path):
    run_ranks(hand_on, 4, tmp_path)
    start_parallel(ParallelLayout(), seed=0)
    first, *others = (tensors_of(tmp_path / f"step_{n:08d}") for n in range(len(LAYOUTS)))
    for kind in ("param", "exp_avg", "exp_avg_sq"):
        assert f"policy: optimizer.state.{kind}.embedding.word_embeddings.weight" in first
    for layout, other in zip(LAYOUTS[1:], others, strict=True):
        assert other.keys() == first.keys()
        for name, tensor in first.items():
            assert torch.equal(other[name], tensor), (name, layout)
