"""Plans of runs whose rows several ranks share, and of a critic that is cut otherwise."""

import dataclasses
from pathlib import Path

import pytest

from engine.plan_command import load_recipe
from engine.planning.hardware import named_cluster
from engine.planning.plan import Plan, plan
from engine.settings.layout import ParallelLayout
from engine.settings.numerics import Numerics
from engine.settings.sft import SFTConfig, SFTData

RECIPES = Path(__file__).parents[3] / "recipes"
NODE = named_cluster("h100", 8)


def recipe_plan(name: str, num_gpus: int, layout: ParallelLayout) -> Plan:
    config = dataclasses.replace(load_recipe(RECIPES, name), layout=layout)
    return plan(config, named_cluster("h100", num_gpus))


def long_rows(layout: ParallelLayout, recompute: str = "none") -> SFTConfig:
    """6B on two rows of 2,048 tokens."""
    return SFTConfig(
        size="6b",
        data=SFTData(pretraining=Path("text.jsonl")),
        batch_size=2,
        micro_batch_tokens=2048,
        dropout=0.0,
        layout=layout,
        numerics=Numerics(dtype="bf16", recompute=recompute),
    )


def test_ranks_that_share_rows_share_the_optimizer_and_the_tokens():
    shared = plan(long_rows(ParallelLayout(tp=2, cp=2)), NODE)
    apart = plan(long_rows(ParallelLayout(tp=2)), NODE)
    rows, whole = (found.fullest.phases["train"] for found in (shared, apart))
    for what in ("weights", "gradients", "fp32 masters", "Adam moments"):
        assert rows[what] == whole[what], what  # four replicas both
    assert shared.fullest.host == apart.fullest.host
    # Half of the tokens; of a layer 16 h + 16 h / 2 bytes each and 2 h (2 x 2 + 1) / 2 besides: the
    # gathered keys and values, and the attention's output joined from two pieces.
    assert whole["activations"] == (8 + 24 // 2) * 2048 * 4096 * 32
    assert rows["activations"] == (8 + 24 // 2 + 10 // 2) * 1024 * 4096 * 32
    # Beside them the row's gathered keys and values twice, and their gradients; the head's
    # logits, and its weight's gradient in fp32.
    passing = 2 * 4096 * (2 * (4 + 8 // 2) + 3) * 1024 + 2 * 4096 * 2 * 4 // 2 * 2048
    assert rows["workspace"] == passing + 4 * (1024 + 4096) * 50_304 // 2
    assert "x dp 2 x cp 2, recompute none" in shared.lines()[1]
    assert "x dp 4, recompute none" in apart.lines()[1]


@pytest.mark.parametrize(("recompute", "passes"), [("none", 2), ("selective", 3), ("full", 3)])
def test_shared_rows_gather_keys_and_values_by_layer(recompute: str, passes: int):
    found = plan(long_rows(ParallelLayout(tp=2, cp=4), recompute), NODE).phases[0].seconds["cp"]
    # One way or the other the keys and values of 3/4 of a row, 2 x 4,096 / 2 numbers a token, at
    # 80% of 450 GB/s after 10 us; in 32 layers, for two rows.
    message = 3 / 4 * 2048 * 2 * 4096 / 2 * 2 / (0.8 * 450e9)
    assert found == pytest.approx(2 * 32 * passes * (message + 10e-6))


def test_two_ranks_compute_a_row_in_half_the_time_and_reduce_gradients_with_the_others():
    waits = {"overlap_grad_reduce": False, "overlap_param_gather": False}
    alone, shared = (
        plan(long_rows(ParallelLayout(tp=2, cp=cp, **waits)), NODE).phases[0].seconds
        for cp in (1, 2)
    )
    assert shared["compute"] == pytest.approx(alone["compute"] / 2)
    latency = 32 * 4 * 10e-6  # of four all-reduces a layer; their messages are half as long
    assert shared["tp"] - latency == pytest.approx((alone["tp"] - latency) / 2)
    assert shared["cp"] > 0 == alone["cp"]
    assert shared["gradients"] == alone["gradients"]
    assert shared["optimizer"] == alone["optimizer"]


def test_head_of_shared_rows_computes_all_tokens():
    found = [recipe_plan("sft_6b", 8, ParallelLayout(tp=4, cp=cp)).phases[0] for cp in (1, 2)]
    config = load_recipe(RECIPES, "sft_6b")
    tokens = config.batch_size * (408 + 43) / 2  # of a rank
    head = 3 * 2 * 4096 * 50_304 / 4 * tokens / (989e12 * 0.62)
    more = found[1].seconds["compute"] - found[0].seconds["compute"]
    assert more == pytest.approx(head * (1 - 43 / 451), rel=0.01)
