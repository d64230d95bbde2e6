"""What a rollout waits for, besides memory and links: the host that launches and looks."""

import dataclasses
from pathlib import Path

import pytest

from engine.plan_command import load_recipe
from engine.planning.hardware import Assumptions, named_cluster
from engine.planning.memory import PlannedNetwork
from engine.planning.plan import plan
from engine.planning.seconds import Generation, head_flops, projection_flops
from engine.settings.layout import ParallelLayout
from engine.settings.numerics import Numerics
from models.sizes import SIZES

RECIPES = Path(__file__).parents[3] / "recipes"
WORK = Generation(
    sequences=64, slots=64, prompt_tokens=128.0, response_tokens=100.0, most_new_tokens=256
)


def rollout(layout: ParallelLayout | None = None, assumed: Assumptions | None = None, **sampling):
    """The seconds of a rollout of 6B on two nodes, by cause."""
    config = load_recipe(RECIPES, "ppo_6b")
    config = dataclasses.replace(
        config,
        layout=layout or config.layout,
        critic_layout=None,
        sampling=dataclasses.replace(config.sampling, **sampling),
    )
    cluster = named_cluster("h100", 16, assumptions=assumed or Assumptions())
    return plan(config, cluster).phases[0].seconds


@pytest.mark.parametrize("pp", [1, 2])
def test_projections_are_computed_at_both_ends_and_the_head_is_of_the_embeddings_width(pp: int):
    size = dataclasses.replace(SIZES["350m"], embedding_width=512)
    network = PlannedNetwork(
        kind="language", size=size, layout=ParallelLayout(pp=pp), numerics=Numerics(), dp=1
    )
    assert projection_flops(network) == (2 // pp) * 2 * 512 * 1024
    assert head_flops(network) == 2 * 512 * size.padded_vocab_size
    assert projection_flops(dataclasses.replace(network, size=SIZES["350m"])) == 0


def test_prompts_that_fill_the_slots_are_taken_in_without_graphs():
    assert WORK.eager_steps(1) == 64 * 128 / 1024
    assert WORK.eager_steps(4) == 16 * 128 / 1024


def test_with_a_queue_a_step_without_graphs_follows_most_looks():
    queued = dataclasses.replace(WORK, sequences=640)
    # 576 responses of 100 tokens drain through 64 slots in 900 steps. Of 64 slots one is free after
    # eight steps all but surely, after one step with probability 1 - 0.99^64.
    assert queued.eager_steps(1) == pytest.approx(8 + 900 / 9, rel=0.01)
    found = 1 - 0.99**16  # of a group's slots
    assert queued.eager_steps(4) == pytest.approx(2 + 900 * found / (1 + found), rel=0.01)


def test_without_graphs_every_step_takes_the_host_a_launch_of_each_layer():
    without, graphs = rollout(cuda_graphs=False), rollout()
    steps = 256  # the longest response of a replica's 128
    assert without["host"] > 5 * graphs["host"]
    device = without["memory"] + without["tp"]
    assert without["host"] + device > steps * 32 * 450e-6
    assert {**without, "host": 0} == {**graphs, "host": 0}


def test_graphs_leave_the_looks_of_the_host():
    none = Assumptions(layer_launch_us=0, graph_launch_us=0)
    every, eighth = (rollout(assumed=none, steps_per_sync=n)["host"] for n in (1, 8))
    assert every > 3 * eighth > 0
    assert rollout(assumed=dataclasses.replace(none, look_us=0))["host"] == 0


def test_a_launch_beside_a_longer_step_of_the_device_costs_nothing():
    hidden, seen = (
        rollout(assumed=Assumptions(look_us=0, layer_launch_us=0, graph_launch_us=launch))["host"]
        for launch in (100, 10_000)
    )
    assert hidden == 0
    assert seen > 0.5


def test_stages_send_whole_hidden_states_and_look_at_every_token():
    none = Assumptions(layer_launch_us=0)
    layouts = [ParallelLayout(tp=4, pp=4, sequence_parallel=is_sp) for is_sp in (False, True)]
    plain, sequence = (rollout(layout, none) for layout in layouts)
    assert plain["pipeline"] == sequence["pipeline"] > 0
    assert rollout(layouts[0], none, steps_per_sync=64)["host"] == plain["host"]
