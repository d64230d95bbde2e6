import math
from pathlib import Path

import pytest

from engine.errors import UserError
from engine.plan_command import load_recipe
from engine.planning.hardware import GPUS, Assumptions, named_cluster
from engine.planning.plan import plan

RECIPES = Path(__file__).parents[3] / "recipes"
NODE = named_cluster("h100", 8)


def test_links_are_nvlink_within_its_domain_and_the_network_beyond():
    assert NODE.link_bandwidth(8) == pytest.approx(0.8 * 450e9)
    assert NODE.link_bandwidth(9) == pytest.approx(0.8 * 50e9)
    rack = named_cluster("gb200", 144)
    assert rack.link_bandwidth(72) == pytest.approx(0.8 * 900e9)
    assert rack.link_bandwidth(144) == pytest.approx(0.8 * 50e9)


def test_a_plan_counts_on_a_share_of_the_datasheet():
    assert NODE.flops == pytest.approx(0.62 * 989e12)
    assert NODE.memory_bandwidth == pytest.approx(0.6 * 3.35e12)
    assert NODE.host_bandwidth == pytest.approx(0.8 * 64e9)
    assert NODE.latency == pytest.approx(10e-6)
    assert NODE.free_bytes == 75 * 10**9
    roomy = named_cluster("h100", 8, assumptions=Assumptions(reserved_gb=2.5))
    assert roomy.free_bytes == 77_500_000_000


def test_no_gpu_of_the_table_is_slower_over_nvlink_than_over_the_network():
    for name, gpu in GPUS.items():
        assert gpu.network_bandwidth < gpu.nvlink_bandwidth < gpu.memory_bandwidth, name
        assert gpu.memory_bytes < gpu.host_memory_bytes, name


def test_assumptions_change_the_seconds():
    config = load_recipe(RECIPES, "sft_6b")
    slow = named_cluster("h100", 8, assumptions=Assumptions(compute=0.31))
    seconds = [plan(config, cluster).phases[0].seconds["compute"] for cluster in (NODE, slow)]
    assert seconds[1] == pytest.approx(2 * seconds[0])


def test_price_is_hours_times_gpus():
    cluster = named_cluster("h100", 8, dollars_per_hour=2.5)
    found = plan(load_recipe(RECIPES, "rm_6b"), cluster)
    assert found.dollars == pytest.approx(found.total_seconds / 3600 * 8 * 2.5)


def test_price_of_the_table_gives_way_to_one_that_is_named():
    assert NODE.price == GPUS["h100"].dollars_per_hour
    assert named_cluster("h100", 8, dollars_per_hour=0.0).price == 0.0


def test_unknown_gpu_is_an_error():
    with pytest.raises(UserError, match="no GPU is named"):
        named_cluster("tpu", 8)


@pytest.mark.parametrize("price", [-1.0, math.nan])
def test_price_that_is_none_is_an_error(price: float):
    with pytest.raises(UserError, match="--dollars-per-hour must not be negative"):
        named_cluster("h100", 8, dollars_per_hour=price)


@pytest.mark.parametrize(
    ("name", "value"), [("links", 0.0), ("memory", 1.01), ("latency_us", -1.0)]
)
def test_assumption_that_means_nothing_is_an_error(name: str, value: float):
    with pytest.raises(UserError, match=f"{name.replace('_', '-')} must be"):
        Assumptions(**{name: value})
