"""Bytes of the head's workspace: what the kernels take."""

import dataclasses

import numpy as np
import pytest

from benchmarks.timing import peak_bytes
from engine.data.batches import pack
from engine.data.examples import Example
from engine.losses import NegativeLogLikelihood
from engine.planning.memory import HEAD_ROWS, HEAD_WORKSPACE, PlannedNetwork
from engine.ranks.start import start_parallel
from engine.settings.adam import AdamConfig
from engine.settings.layout import ParallelLayout
from engine.settings.numerics import Numerics
from engine.training.network import build_network
from engine.training.optimizer import Optimizer
from engine.training.passes import forward_backward
from kernels.workspace import MOST_ROWS, WORKSPACE_BYTES, chunk_rows
from models.sizes import SIZES, GPTSize


def planned(tp: int = 1, pp: int = 1, dtype: str = "bf16", **changes: object) -> PlannedNetwork:
    network = PlannedNetwork(
        kind="language",
        size=SIZES["1.3b"],
        layout=ParallelLayout(tp=tp, pp=pp),
        numerics=Numerics(dtype=dtype),  # type: ignore[arg-type]
        dp=1,
    )
    return dataclasses.replace(network, **changes)


def test_a_tokens_cache_is_its_heads_of_keys_and_values(monkeypatch):
    assert planned(tp=2, pp=4).cache_bytes_a_token() == 2 * 6 * 8 * 128 * 2  # 24 layers, 16 heads
    monkeypatch.setattr(GPTSize, "num_kv_heads", property(lambda self: 4))
    monkeypatch.setattr(GPTSize, "head_dim", property(lambda self: 96))
    assert planned(tp=2, pp=4).cache_bytes_a_token() == 2 * 6 * 2 * 96 * 2


@pytest.mark.parametrize("num_tokens", [100, 10**5])
@pytest.mark.parametrize("tp", [1, 8])
def test_the_head_has_the_workspace_that_the_kernels_take(tp: int, num_tokens: int) -> None:
    assert (WORKSPACE_BYTES["cuda"], MOST_ROWS) == (HEAD_WORKSPACE, HEAD_ROWS)
    language, scalar = (
        planned(tp, kind=kind).workspace_bytes(0, num_tokens, trains=False)
        for kind in ("language", "scalar")
    )
    logits = language - scalar - 3 * 2 * 2048 * num_tokens
    columns = SIZES["1.3b"].padded_vocab_size // tp
    taken = 4 * columns * chunk_rows(num_tokens, columns, 4, WORKSPACE_BYTES["cuda"])
    assert taken <= logits <= 1.05 * taken


@pytest.mark.parametrize(
    ("network", "stage", "matrices", "zeros"),
    [
        (planned(), 0, 1, 0),
        (planned(tp=8), 0, 1, 0),
        (planned(pp=4), 3, 1, 1),  # the hook of the embedding's copy wants a gradient
        (planned(pp=4), 1, 0, 0),
        (planned(dtype="fp16"), 0, 0, 0),  # two passes, which add to the buffer
        (planned(kind="scalar"), 0, 0, 0),
    ],
)
def test_the_head_holds_its_weights_gradient_in_training(network, stage, matrices, zeros) -> None:
    size, tokens = network.size, 10**6
    elements = size.padded_vocab_size * size.hidden_size // network.layout.tp
    bare = dataclasses.replace(network, numerics=Numerics(dtype="fp16"), kind="scalar")
    trained, read = (
        network.workspace_bytes(stage, tokens, trains=trains)
        - bare.workspace_bytes(stage, tokens, trains=trains)
        for trains in (True, False)
    )
    assert trained - read == 4 * matrices * elements + 2 * zeros * elements


def test_an_embedding_of_another_width_counts_with_what_its_projections_read():
    size = dataclasses.replace(SIZES["1.3b"], embedding_width=512)
    counts = {"rows": 8, "row_tokens": 100}
    # In: 512 numbers of 2 bytes a token, of as many rows as stages. Out: 2048, one row at a time.
    for pp, stage, kept in ((1, 0, 512 + 2048), (4, 0, 4 * 512), (4, 1, 0), (4, 3, 2048)):
        narrow = planned(pp=pp, size=size).activation_bytes(stage, **counts)
        assert narrow - planned(pp=pp).activation_bytes(stage, **counts) == 2 * 100 * kept
    spared = 50257 * (2048 - 512)
    for kind, head in (("language", 0), ("scalar", 2048 - 512)):
        narrow, usual = planned(kind=kind, size=size), planned(kind=kind)
        saved = usual.num_parameters - narrow.num_parameters
        assert saved == spared + head - 2 * 512 * 2048
    # 6 N: the head's matrix counts, the embedding of a network without one does not.
    assert narrow.num_counted == narrow.num_parameters - 50257 * 512


@pytest.mark.parametrize("hidden", [256, 512])
def test_a_training_step_takes_the_memory_that_is_planned(hidden: int) -> None:
    """Of a network whose head outweighs the rest, as a GPU's kernels would hold it."""
    size = GPTSize(
        num_layers=1, hidden_size=hidden, num_heads=4, vocab_size=8192, context_length=64
    )
    network = build_network(
        "language", size, start_parallel(ParallelLayout(), seed=0), numerics=Numerics()
    )
    Optimizer(network, AdamConfig(), total_steps=1)  # brings the gradients' buffers
    batch = pack([Example(tokens=np.arange(16), prompt_length=1)], multiple_of=1)
    loss = NegativeLogLikelihood(15)
    measured = peak_bytes(lambda: forward_backward(network, [batch], loss), network.parallel.device)
    # What the CPU's reference makes of the logits is gone when the gradient is there.
    assert hidden > 3 * 15
    plan = planned(dtype="fp32", size=size)
    found = plan.activation_bytes(0, 1, 16) + plan.workspace_bytes(0, 16, trains=True)
    assert measured <= found < 1.15 * measured
    assert found - 4 * hidden * size.padded_vocab_size < 0.3 * measured  # most is the gradient
