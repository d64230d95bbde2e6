"""What is said of weights, batches and passes."""

import math

import numpy as np
import pytest
import torch

from engine.data.examples import Example
from engine.ranks.start import start_parallel
from engine.replay.report import of_batch, of_pass, of_weights
from engine.replay.watch import Finding
from engine.settings.layout import ParallelLayout
from tests.tiny import random_network


def test_weights_that_are_not_finite_are_named_beside_the_largest():
    network = random_network("language", start_parallel(ParallelLayout(), seed=1))
    (module,) = network.modules
    with torch.no_grad():
        module.decoder.layers[1].mlp.linear_fc1.weight[0, 0] = 7.0
    place = "decoder.layers.1.mlp.linear_fc1.weight"
    assert of_weights(network) == f"finite; the largest is 7 in {place}"
    with torch.no_grad():
        module.decoder.layers[2].mlp.linear_fc2.bias[1] = -math.inf
    broken = "decoder.layers.2.mlp.linear_fc2.bias"
    assert of_weights(network) == f"not finite in {broken}; the largest is 7 in {place}"


def test_batch_is_counted_and_its_broken_fields_are_named():
    numbers = np.array([0.0, math.nan, 1.0], np.float32)
    fields = {"values": numbers, "raw_score": math.inf, "returns": np.zeros(3, np.float32)}
    tokens = np.arange(3)
    broken = Example(tokens=tokens, prompt_length=1, fields=fields)
    sound = Example(tokens=tokens[:2], prompt_length=1)
    assert of_batch({"episodes": [broken], "ptx": [[sound, sound]]}) == (
        "batch: episodes 1 sequences of 3 tokens, not finite: raw_score, values; "
        "ptx 2 sequences of 4 tokens"
    )


@pytest.mark.parametrize(
    ("finding", "line"),
    [
        (None, "critic: finite"),
        (
            Finding(spot="the head (GPT)", term="sample 3", numbers="1 of 4"),
            "critic, first not finite on rank 0: the head (GPT), for sample 3: 1 of 4",
        ),
    ],
)
def test_a_pass_is_finite_or_says_on_which_rank_it_is_not(finding: Finding | None, line: str):
    start_parallel(ParallelLayout(), seed=1)
    assert of_pass("critic", finding) == [line]
