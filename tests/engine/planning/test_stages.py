import dataclasses
from pathlib import Path

import pytest

from engine.plan_command import load_recipe
from engine.planning.hardware import named_cluster
from engine.planning.plan import Plan, plan
from engine.planning.sizes import named_sizes
from engine.planning.stages import estimate_ppo, estimate_sft
from engine.planning.workload import Workload
from engine.settings.layout import ParallelLayout
from engine.settings.sft import SelectionConfig

RECIPES = Path(__file__).parents[3] / "recipes"
NODE = named_cluster("h100", 8)


def recipe_plan(name: str, num_gpus: int, **changes) -> Plan:
    config = dataclasses.replace(load_recipe(RECIPES, name), **changes)
    return plan(config, named_cluster("h100", num_gpus))


def test_number_of_steps_is_the_papers():
    assert recipe_plan("sft_1_3b", 8).estimate.num_steps == 6363  # 16 x 12,725 / 32
    assert recipe_plan("rm_6b", 8).estimate.num_steps == 519  # 33,207 / 64
    assert recipe_plan("ppo_175b", 512).estimate.num_steps == 500
    # A tenth of 32 is 3 pretraining sequences a step.
    assert recipe_plan("init_6b", 8).estimate.num_steps == 878  # 2 x 12,725 / 29


def test_generation_without_pipeline_takes_a_copy_and_less_time():
    pipeline = recipe_plan("ppo_175b", 512)
    copied = recipe_plan("ppo_175b", 512, generation_layout=ParallelLayout(tp=16))
    rows = copied.fullest.phases
    # 174.6 B parameters in bf16 on 16 ranks, in rollouts only.
    assert rows["rollout"]["generation weights"] == pytest.approx(2 * 174.6e9 / 16, rel=0.01)
    assert "generation weights" not in rows["score"] | rows["update"]
    assert rows["update"] == pipeline.fullest.phases["update"]
    before, after = (p.phases[0].seconds for p in (pipeline, copied))
    assert after["refit"] > 0
    assert sum(after.values()) < 0.9 * sum(before.values())
    assert not recipe_plan("ppo_175b", 512, generation_layout=ParallelLayout(tp=4)).fits


def test_ranks_that_share_rows_generate_apart():
    shared, apart = (recipe_plan("ppo_6b", 16, layout=ParallelLayout(cp=cp)) for cp in (2, 1))
    assert shared.phases[0].seconds == apart.phases[0].seconds
    assert shared.fullest.phases["rollout"] == apart.fullest.phases["rollout"]
    assert shared.phases[1].seconds["cp"] > 0


def test_an_update_costs_six_flops_a_parameter_and_token():
    config = dataclasses.replace(load_recipe(RECIPES, "ppo_6b"), ptx_coef=0.0, ppo_epochs=2)
    found = estimate_ppo(config, NODE, Workload(), named_sizes(config))
    policy, critic = (found.networks[role].num_counted for role in ("policy", "critic"))
    tokens = 2 * 512 * (166 + 128)  # two epochs of an iteration's episodes
    assert found.tokens == tokens
    assert found.phases[2].flops == pytest.approx(6 * (policy + critic) * tokens)


@pytest.mark.parametrize(("source", "policy_reads"), [("sampled", 1), ("scored", 2), ("auto", 2)])
def test_scoring_reads_the_policy_where_its_own_logprobs_are_wanted(source, policy_reads):
    # The reference reads all responses, the critic and the reward model too: bf16's "auto" scores.
    config = dataclasses.replace(load_recipe(RECIPES, "ppo_6b"), policy_logprobs=source)
    found = estimate_ppo(config, NODE, Workload(), named_sizes(config))
    policy, critic = (found.networks[role].num_counted for role in ("policy", "critic"))
    tokens = 512 * (166 + 128)
    expected = 2 * (policy_reads * policy + 2 * critic) * tokens
    assert found.phases[1].flops == pytest.approx(expected)


def test_what_the_host_holds_moves_in_the_phases_that_need_it():
    found = recipe_plan("ppo_6b", 8)  # frozen models and optimizers rest on the host
    host, link = found.fullest.host, 0.8 * 64e9
    parked = host["policy optimizer"] + host["critic optimizer"]
    frozen = host["reference weights"] + host["reward_model weights"]
    rollout, score, update = (phase.seconds["swap"] for phase in found.phases)
    assert rollout == update == pytest.approx(parked / link)
    assert score == pytest.approx(2 * frozen / link)  # in, and out again


def test_selection_takes_the_reward_model_of_the_paper_to_be_6b():
    selects = load_recipe(RECIPES, "sft_1_3b")  # by the reward of its epochs
    config = dataclasses.replace(selects, selection=SelectionConfig())
    without, found = (
        estimate_sft(each, NODE, Workload(), named_sizes(each)) for each in (config, selects)
    )
    more = found.ranks[0].peak_bytes - without.ranks[0].peak_bytes
    tp = config.layout.tp
    assert more == pytest.approx(2 * 6.7e9 / tp, rel=0.02)
    (line,) = [line for line in plan(selects, NODE).lines() if "reward model: " in line]
    assert line.endswith("context 2,048; the size 6b")
