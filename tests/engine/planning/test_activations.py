"""Activations are planned as a layer keeps them, whole rows and rows that two ranks share."""

import dataclasses
from collections.abc import Sequence
from typing import Any

import numpy as np
import pytest
import torch

from engine.data.batches import pack
from engine.data.examples import Example
from engine.losses import NegativeLogLikelihood
from engine.planning.memory import PlannedNetwork
from engine.ranks.start import start_parallel
from engine.settings.layout import ParallelLayout
from engine.settings.numerics import Numerics
from engine.training.network import build_network
from engine.training.passes import forward_backward
from engine.training.trainable import make_trainable
from models.sizes import GPTSize
from tests.forms import FORMS
from tests.ranks import run_ranks

SIZE = GPTSize(num_layers=2, hidden_size=64, num_heads=4, vocab_size=100, context_length=512)
SIZES = {
    "gpt3": SIZE,
    **{
        name: dataclasses.replace(form, num_layers=2, context_length=512)
        for name, form in FORMS.items()
    },
}
RECOMPUTE = ("none", "selective", "full")
NUM_TOKENS = 512


class FlashAttention(torch.autograd.Function):
    """Keeps for its backward pass what flash attention does; computes nothing."""

    @staticmethod
    def forward(ctx: Any, query: Any, key: Any, value: Any) -> torch.Tensor:
        out = torch.ones_like(query, memory_format=torch.contiguous_format)
        ctx.save_for_backward(query, key, value, out)
        return out

    @staticmethod
    def backward(ctx: Any, grad: torch.Tensor) -> Any:
        return tuple(torch.zeros_like(saved) for saved in ctx.saved_tensors[:3])


class LossThatStops(NegativeLogLikelihood):
    """Ends the pass once the forward pass is through."""

    def metrics(self, batch: Any, logprobs: torch.Tensor) -> Any:
        raise StopIteration


def deeper(size: GPTSize) -> GPTSize:
    return dataclasses.replace(size, num_layers=4)


def kept_bytes(layout: ParallelLayout, of: GPTSize) -> dict[str, float]:
    """Return by recomputation the bytes that a layer keeps when a forward pass is through: what two
    more layers add, halved."""
    parallel = start_parallel(layout, seed=1)
    batch = pack([Example(tokens=np.arange(NUM_TOKENS) % 90, prompt_length=1)], multiple_of=1)
    found: dict[str, float] = {}
    with pytest.MonkeyPatch.context() as patch:
        patch.setattr("models.attention.packed_attention", lambda q, k, v, *_: _flash(q, k, v))
        for recompute in RECOMPUTE:
            counts = []
            for size in (of, deeper(of)):
                network = build_network(
                    "language", size, parallel, numerics=Numerics(recompute=recompute)
                )
                make_trainable(network)
                weights = {
                    buffer.param_data.untyped_storage()._cdata
                    for chunk in network.chunks
                    for buffer in chunk.buffers
                }
                kept: dict[int, torch.UntypedStorage] = {}

                def note(tensor: torch.Tensor) -> torch.Tensor:
                    storage = tensor.untyped_storage()
                    kept[storage._cdata] = storage  # noqa: B023 - called within the loop
                    return tensor

                with (
                    torch.autograd.graph.saved_tensors_hooks(note, lambda tensor: tensor),
                    pytest.raises(StopIteration),
                ):
                    forward_backward(network, [batch], LossThatStops(NUM_TOKENS - 1))
                counts.append(sum(s.nbytes() for key, s in kept.items() if key not in weights))
            found[recompute] = (counts[1] - counts[0]) / 2
    return found


def _flash(query: torch.Tensor, key: torch.Tensor, value: torch.Tensor) -> torch.Tensor:
    return FlashAttention.apply(query, key, value)


@pytest.mark.parametrize("cp", [1, 2, pytest.param(4, marks=pytest.mark.slow)])
def test_layer_keeps_the_activations_that_are_planned(cp: int):
    layout = ParallelLayout(cp=cp)
    assert_as_planned(layout, SIZE, run_ranks(kept_bytes, cp, layout, SIZE))


@pytest.mark.parametrize("name", FORMS)
def test_layer_of_a_form_keeps_the_activations_that_are_planned(name: str):
    layout = ParallelLayout()
    assert_as_planned(layout, SIZES[name], [kept_bytes(layout, SIZES[name])])


def assert_as_planned(
    layout: ParallelLayout, of: GPTSize, ranks: Sequence[dict[str, float]]
) -> None:
    for rank in ranks:
        for recompute, kept in rank.items():
            few, many = (
                PlannedNetwork(
                    kind="language",
                    size=size,
                    layout=layout,
                    numerics=Numerics(recompute=recompute),
                    dp=1,
                ).activation_bytes(0, 1, NUM_TOKENS)
                for size in (of, deeper(of))
            )
            # The statistics of the norms, two numbers a token, are not planned.
            assert kept == pytest.approx((many - few) / 2, rel=0.04), recompute
