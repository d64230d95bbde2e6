import dataclasses
from pathlib import Path

import pytest

from engine.plan_command import load_recipe
from engine.planning.hardware import named_cluster
from engine.planning.memory import PlannedNetwork
from engine.planning.plan import Plan, plan
from engine.planning.ranks import (
    PPONetworks,
    cache_room,
    num_slots,
    ppo_ranks,
    training_ranks,
)
from engine.planning.workload import Batch
from engine.settings.layout import ParallelLayout
from engine.settings.numerics import Numerics
from engine.settings.residency import ResidencyConfig
from engine.settings.sampling import SamplingConfig
from models.sizes import SIZES

RECIPES = Path(__file__).parents[3] / "recipes"
NODE = named_cluster("h100", 8)
EPISODES = Batch(count=512, mean_tokens=300, limit=2048, span=300)


def recipe_plan(name: str, num_gpus: int, **changes) -> Plan:
    config = dataclasses.replace(load_recipe(RECIPES, name), **changes)
    return plan(config, named_cluster("h100", num_gpus))


def network(layout: ParallelLayout, kind: str = "language", size: str = "1.3b") -> PlannedNetwork:
    return PlannedNetwork(
        kind=kind,
        size=SIZES[size],
        layout=layout,
        numerics=Numerics(dtype="bf16"),
        dp=layout.dp(NODE.num_gpus),
    )


def networks(layout: ParallelLayout, episodes: Batch = EPISODES, **sampling) -> PPONetworks:
    policy = network(layout)
    return PPONetworks(
        policy=policy,
        reference=policy,
        critic=network(layout, "scalar"),
        generator=policy.in_generation(),
        is_refitted=False,
        residency=ResidencyConfig(),
        sampling=SamplingConfig(max_new_tokens=1024, **sampling),
        episodes=episodes,
        policy_batches=[episodes],
        critic_batches=[episodes],
        budget=2048,
        most_tokens=2048,
    )


def test_rank_in_training_holds_weights_gradients_and_its_share_of_the_optimizer():
    one = network(ParallelLayout(tp=2))  # dp 4
    (rank,) = training_ranks(one, [EPISODES], 2048)
    rows = rank.phases["train"]
    per_parameter = {name: rows[name] / rows["weights"] * 2 for name in rows}
    assert per_parameter["gradients"] == pytest.approx(4, rel=1e-3)
    assert per_parameter["fp32 masters"] == pytest.approx(4 / 4, rel=1e-3)
    assert per_parameter["Adam moments"] == pytest.approx(8 / 4, rel=1e-3)
    assert rank.peak_bytes == sum(rows.values())
    assert rank.host == {"checkpoint": one.checkpoint_host_bytes(0)}


def test_reward_model_that_selects_is_held_besides():
    one, judge = network(ParallelLayout()), network(ParallelLayout(), "scalar", "6b")
    (alone,), (both,) = (training_ranks(one, [EPISODES], 2048, each) for each in (None, judge))
    assert both.peak_bytes - alone.peak_bytes == judge.weight_bytes(0)


def test_slots_fill_the_groups_of_a_pipeline():
    four = ParallelLayout(pp=4)  # dp 2
    assert num_slots(networks(four, num_slots=10)) == 12
    few = dataclasses.replace(EPISODES, count=6)
    assert num_slots(networks(four, few, num_slots=10)) == 4  # three sequences a replica
    assert num_slots(networks(ParallelLayout(), few, num_slots=10)) == 1


def test_room_for_keys_and_values_is_that_of_the_fullest_rank():
    ppo = networks(ParallelLayout(pp=2), cache_gib=1.0)
    room = cache_room(ppo, ppo_ranks(ppo, NODE))
    a_token = 2 * 12 * 2048 * 2  # keys and values of twelve layers in bf16
    assert room.tokens == 2**30 // a_token
    assert room.wanted_tokens == 64 * 2048
    assert room.sequence_tokens == 2048
    # What is left decides without a limit, and a stage with the head has less.
    tight = dataclasses.replace(NODE, gpu=dataclasses.replace(NODE.gpu, memory_bytes=28 * 10**9))
    ppo = networks(ParallelLayout(pp=2))
    ranks = ppo_ranks(ppo, tight)
    held = [rank.phases["rollout"]["key-value cache"] // a_token for rank in ranks]
    room = cache_room(ppo, ranks)
    assert held[0] != held[1]
    assert (room.tokens, room.stage) == (min(held), held.index(min(held)))


def test_plan_follows_where_models_rest():
    resident = recipe_plan("ppo_6b", 8, residency=ResidencyConfig())
    parked = recipe_plan("ppo_6b", 8)
    weights = resident.fullest.phases["update"]["reference weights"]
    assert weights == resident.fullest.phases["update"]["policy weights"]
    assert "reference weights" not in parked.fullest.phases["update"]
    assert parked.fullest.host["reference weights"] == weights
    assert resident.fullest.host.keys() == {"checkpoint"}
    assert parked.phases[1].seconds["swap"] > 0 == resident.phases[1].seconds["swap"]
    taken = [sum(found.fullest.phases["update"].values()) for found in (resident, parked)]
    assert taken[0] - taken[1] == 2 * weights + 4 * 4097  # the reward model's fp32 head besides


def test_critic_may_be_cut_otherwise_than_the_policy():
    config = load_recipe(RECIPES, "ppo_1_3b")
    whole = plan(dataclasses.replace(config, critic_layout=ParallelLayout()), NODE)
    halved = plan(dataclasses.replace(config, critic_layout=ParallelLayout(pp=2)), NODE)
    key = "critic gradients"
    assert halved.fullest.phases["update"][key] < 0.55 * whole.fullest.phases["update"][key]
    assert len(halved.ranks) == 1  # stages are the policy's


def test_every_phase_and_the_host_have_the_fullest_of_a_stages_ranks():
    config = dataclasses.replace(
        load_recipe(RECIPES, "ppo_1_3b"),
        layout=ParallelLayout(pp=2),
        critic_layout=ParallelLayout(pp=4),
    )
    found = plan(config, NODE)
    policy, critic = (found.estimate.networks[role] for role in ("policy", "critic"))
    saved = [critic.checkpoint_host_bytes(stage) for stage in (2, 3)]
    assert saved[0] < saved[1]  # the head
    rest = policy.checkpoint_host_bytes(1, has_average=True)
    assert found.ranks[1].host["checkpoint"] == rest + saved[1]
    phases = found.ranks[1].phases
    assert phases["rollout"]["critic weights"] == critic.weight_bytes(3)
    # Updates take most where two rows are in flight.
    assert phases["update"]["critic weights"] == critic.weight_bytes(2) < critic.weight_bytes(3)
