import dataclasses
from pathlib import Path

from engine.plan_command import load_recipe
from engine.planning.hardware import named_cluster
from engine.planning.misfits import Misfit, misfits
from engine.planning.plan import plan
from engine.planning.ranks import CacheRoom, RankMemory
from engine.settings.layout import ParallelLayout
from engine.settings.sampling import SamplingConfig

RECIPES = Path(__file__).parents[3] / "recipes"
NODE = named_cluster("h100", 8)  # 75 GB free of 80, 250 GB of host memory a GPU
GB = 10**9


def rank(stage: int, device_gb: int, host_gb: int) -> RankMemory:
    phases = {"rollout": {"weights": GB}, "update": {"weights": GB, "rest": (device_gb - 1) * GB}}
    return RankMemory(stage=stage, phases=phases, host={"checkpoint": host_gb * GB})


def test_what_fits_exactly_fits():
    assert misfits([rank(0, 75, 250), rank(1, 10, 0)], None, NODE) == []


def test_memory_that_is_missing_is_told_by_stage():
    found = misfits([rank(0, 60, 20), rank(1, 78, 251), rank(2, 76, 20)], None, NODE)
    assert [(each.resource, each.stage, each.missing) for each in found] == [
        ("GPU memory", 1, 3 * GB),
        ("host memory", 1, 1 * GB),
        ("GPU memory", 2, 1 * GB),
    ]
    assert found[0] == Misfit(resource="GPU memory", stage=1, needed=78 * GB, available=75 * GB)


def test_cache_must_hold_the_longest_sequence():
    room = CacheRoom(stage=3, tokens=2048, wanted_tokens=10**6, sequence_tokens=2048)
    assert misfits([], room, NODE) == []
    small = dataclasses.replace(room, tokens=2000)
    (found,) = misfits([], small, NODE)
    assert (found.resource, found.stage, found.missing) == ("key-value cache", 3, 48)


def test_run_whose_checkpoint_the_host_cannot_hold_does_not_fit():
    found = plan(load_recipe(RECIPES, "rm_6b"), NODE)
    needed = 2 * found.estimate.networks["reward model"].saved_bytes(0)
    for host_bytes, fits in ((needed, True), (needed - 1, False)):
        gpu = dataclasses.replace(NODE.gpu, host_memory_bytes=host_bytes)
        cluster = dataclasses.replace(NODE, gpu=gpu)
        assert dataclasses.replace(found, cluster=cluster).fits == fits


def test_a_plan_that_the_host_rules_out_says_how_much_the_worst_stage_needs():
    found = plan(load_recipe(RECIPES, "ppo_6b"), NODE)
    needed = max(rank.host_bytes for rank in found.ranks)
    gpu = dataclasses.replace(NODE.gpu, host_memory_bytes=needed - GB)
    short = dataclasses.replace(found, cluster=dataclasses.replace(NODE, gpu=gpu))
    (line,) = [line for line in short.lines() if "does not fit" in line]
    assert line == (
        f"  does not fit: a rank of stage 0 needs {needed / GB:.2f} GB of host memory, "
        f"there are {needed / GB - 1:.2f}"
    )
    assert not any("does not fit" in line for line in found.lines())


def test_a_plan_with_too_little_cache_does_not_fit_and_says_so():
    config = load_recipe(RECIPES, "ppo_1_3b")
    sampling = SamplingConfig(max_new_tokens=1024, cache_gib=0.1)
    found = plan(dataclasses.replace(config, sampling=sampling), NODE)
    (misfit,) = found.misfits
    assert misfit.resource == "key-value cache"
    assert not found.fits
    assert "  does not fit: one sequence may need 2,048 tokens of cache" in found.lines()


def test_a_copy_that_generates_has_the_cache_of_its_own_layout():
    # In tp 8 a token takes an eighth of the bytes: the cache holds eight times as many.
    config = dataclasses.replace(
        load_recipe(RECIPES, "ppo_1_3b"),
        sampling=SamplingConfig(max_new_tokens=1024, cache_gib=0.1),
        generation_layout=ParallelLayout(tp=8),
    )
    assert plan(config, NODE).misfits == []
