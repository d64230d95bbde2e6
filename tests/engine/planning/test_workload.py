import math
from pathlib import Path

import pytest

from engine.errors import UserError
from engine.plan_command import load_recipe
from engine.planning.hardware import named_cluster
from engine.planning.plan import plan
from engine.planning.workload import Batch, Workload, harmonic

RECIPES = Path(__file__).parents[3] / "recipes"
NODE = named_cluster("h100", 8)


def test_batches_fall_on_ranks_as_the_engine_deals_them():
    fixed = Batch(count=512, mean_tokens=2048, limit=2048, span=2048)
    assert fixed.rows(8, 8192) == (16, 8192)
    assert fixed.rows(8, 3000) == (64, 2048)
    assert fixed.rows(64, 8192, 8) == (8, 8192)  # filled up for an interleaved schedule
    varied = Batch(count=64, mean_tokens=100, limit=2048, span=100)
    assert varied.rows(1, 2048) == (4, 2048)
    # One rank has one of 64, perhaps the longest: 100 x (1 + 1/2 + ... + 1/64).
    assert varied.rows(64, 2048) == (1, pytest.approx(474.4, abs=0.5))
    assert harmonic(31) == pytest.approx(harmonic(33), rel=0.02)


def test_padding_fills_every_sequence_of_a_group_up_to_the_context():
    # A prompt with five answers: groups of 5 x 200 tokens become 5 x 2,048.
    groups = Batch(count=64, mean_tokens=1000, limit=18_432, span=200)
    padded = groups.padded(2048)
    assert (padded.mean_tokens, padded.span) == (5 * 2048, 2048)
    assert padded.tokens == 64 * 5 * 2048


def test_the_longest_of_a_batch_is_no_longer_than_the_limit():
    few, many = (Batch(count=n, mean_tokens=100, limit=600, span=100) for n in (2, 10**6))
    assert few.longest() == 150  # 100 x (1 + 1/2)
    assert many.longest() == 600


def test_fullest_rank_has_its_share_or_the_longest_sequence():
    batch = Batch(count=64, mean_tokens=100, limit=2048, span=100)
    assert batch.share(2) == 3200
    assert batch.share(64) == batch.longest() > 100
    whole = Batch(count=10, mean_tokens=100, limit=100, span=100)
    assert whole.share(4) == 300  # three sequences, not two and a half


def test_harmonic_numbers_are_sums_of_reciprocals():
    for count in (1, 5, 31, 32, 1000):
        assert harmonic(count) == pytest.approx(math.fsum(1 / n for n in range(1, count + 1)), 1e-4)


def test_longer_responses_take_longer():
    config = load_recipe(RECIPES, "ppo_6b")
    short, long = (plan(config, NODE, Workload(response_tokens=n)) for n in (64, 512))
    assert long.phases[0].seconds["memory"] > 4 * short.phases[0].seconds["memory"]
    assert long.pf_days > short.pf_days


@pytest.mark.parametrize("name", ["comparisons", "completions", "response_tokens"])
def test_workload_without_examples_is_refused(name: str):
    with pytest.raises(UserError, match=f"workload.{name.replace('_', '-')} must be"):
        Workload(**{name: 0})
