import dataclasses
from pathlib import Path

import pytest

from engine.plan_command import load_recipe, plan_command
from engine.planning.hardware import named_cluster
from engine.planning.plan import plan
from engine.planning.search import proposal_lines, search_layouts
from engine.planning.sizes import sizes_at
from engine.planning.workload import Workload
from engine.settings.layout import ParallelLayout

RECIPES = Path(__file__).parents[3] / "recipes"
NODE = named_cluster("h100", 8)


def test_search_proposes_what_fits_and_says_how_to_have_it(capsys):
    cluster = named_cluster("h100", 64)
    config = load_recipe(RECIPES, "ppo_175b")
    found = search_layouts(config, cluster)
    assert found and all(each.fits for each in found)
    seconds = [each.step_seconds for each in found]
    assert seconds == sorted(seconds)
    # Only beside a critic that is split as far does the policy fit without recomputation.
    pp8 = dataclasses.replace(config, layout=dataclasses.replace(config.layout, pp=8))
    assert seconds[0] <= plan(pp8, cluster).step_seconds < 0.9 * seconds[1]
    plan_command(RECIPES, ["ppo_175b", "--gpus", "64", "--search"])
    sizes = sizes_at(config)
    *said, head, first = capsys.readouterr().out.splitlines()[: len([*sizes.lines()]) + 2]
    assert said == [*sizes.lines()] and head.split()[-1] == "options"
    options = first.split("   ")[-1].split()
    plan_command(RECIPES, ["ppo_175b", "--gpus", "64", *options])
    fastest = plan(found[0].config, cluster, sizes=sizes)
    assert capsys.readouterr().out.splitlines() == fastest.lines()


@pytest.mark.parametrize("name", ["sft_6b", "ppo_1_3b"])
def test_search_leaves_context_parallelism_as_it_is(name: str):
    config = load_recipe(RECIPES, name)
    config = dataclasses.replace(config, layout=dataclasses.replace(config.layout, cp=2))
    found = search_layouts(config, NODE)
    assert found and {each.config.layout.cp for each in found} == {2}
    assert all("--layout.cp" not in line for line in proposal_lines(found, config))


def test_search_of_a_smaller_model_finds_what_trying_all_layouts_finds():
    config = load_recipe(RECIPES, "rm_1_3b")
    found = search_layouts(config, NODE)
    best = min(
        plan(
            dataclasses.replace(
                config,
                layout=ParallelLayout(tp=tp, sequence_parallel=tp > 1),
                micro_batch_tokens=contexts * 2048,
            ),
            NODE,
        ).step_seconds
        for tp in (1, 2, 4, 8)
        for contexts in (1, 2, 4)
    )
    assert found[0].step_seconds <= best


def test_search_deals_batches_evenly():
    config = dataclasses.replace(load_recipe(RECIPES, "sft_1_3b"), batch_size=12)
    found = search_layouts(config, NODE)
    assert found
    assert {12 % each.config.layout.dp(8) for each in found} == {0}
    # Nor does the critic of PPO share its minibatches unevenly: dp 8 is left out.
    config = load_recipe(RECIPES, "ppo_1_3b")
    config = dataclasses.replace(config, rollout_batch_size=36, minibatch_size=12)
    found = search_layouts(config, NODE)
    assert found
    assert all(12 % each.config.critic_layout.dp(8) == 0 for each in found)


def test_search_plans_for_the_workload_that_is_asked_for():
    config, long = load_recipe(RECIPES, "ppo_6b"), Workload(response_tokens=512)
    found = search_layouts(config, NODE, long)[0]
    assert found.lines() == plan(found.config, NODE, long).lines()
    assert found.lines() != plan(found.config, NODE).lines()


def test_proposals_are_options_of_the_recipe():
    config = dataclasses.replace(
        load_recipe(RECIPES, "sft_6b"), layout=ParallelLayout(tp=2, sequence_parallel=True)
    )
    other = dataclasses.replace(config, layout=ParallelLayout(tp=1), micro_batch_tokens=4096)
    lines = proposal_lines([plan(config, NODE), plan(other, NODE)], config)
    assert lines[0].split() == ["s/step", "GB", "MFU", "dollars", "options"]
    assert lines[1].endswith("(as the recipe has it)")
    assert lines[2].endswith(
        "   --micro-batch-tokens 4096 --layout.tp 1 --layout.no-sequence-parallel"
    )


def test_where_nothing_fits_the_proposal_is_more_room():
    config = load_recipe(RECIPES, "sft_6b")
    assert search_layouts(config, named_cluster("h100", 1)) == []
    (said,) = proposal_lines([], config)
    assert said == "no layout fits: take more or larger GPUs"
    (said,) = proposal_lines([], load_recipe(RECIPES, "ppo_6b"))
    assert said.endswith("larger GPUs, or --residency.optimizer host and the like")
