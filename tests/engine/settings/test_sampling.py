import dataclasses
import math

import pytest

from engine.errors import UserError
from engine.settings.sampling import SamplingConfig


@pytest.mark.parametrize(
    ("name", "value", "rule"),
    [
        ("max_new_tokens", 0, "be at least 1"),
        ("num_slots", 0, "be at least 1"),
        ("prefill_tokens", 0, "be at least 1"),
        ("block_size", 0, "be at least 1"),
        ("temperature", -0.1, "not be negative"),
        ("temperature", math.nan, "not be negative"),
        ("top_k", -1, "not be negative"),
        ("min_new_tokens", -1, "not be negative"),
        ("cache_gib", -1.0, "not be negative"),
        ("steps_per_sync", -1, "not be negative"),
        ("top_p", 0.0, r"lie in \(0, 1\]"),
        ("top_p", 1.1, r"lie in \(0, 1\]"),
        ("cache_fraction", math.nan, r"lie in \(0, 1\]"),
    ],
)
def test_number_that_means_nothing_is_refused(name: str, value: float, rule: str):
    config = dataclasses.replace(SamplingConfig(), **{name: value})
    with pytest.raises(UserError, match=f"sampling.{name.replace('_', '-')} must {rule}"):
        config.check()


def test_a_response_cannot_be_longer_at_the_least_than_at_the_most():
    SamplingConfig(min_new_tokens=64).check()
    with pytest.raises(UserError, match="min-new-tokens 65 is more than --sampling.max-new"):
        SamplingConfig(min_new_tokens=65).check()


def test_greedy_takes_the_likeliest_and_keeps_the_rest():
    config = SamplingConfig(temperature=0.7, top_k=5, top_p=0.9, num_slots=3, stop_token_ids=(7,))
    found = config.greedy()
    assert (found.temperature, found.top_k, found.top_p) == (0.0, 0, 1.0)
    assert (found.num_slots, found.stop_token_ids) == (3, (7,))
    found.check()
