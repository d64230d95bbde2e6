import dataclasses

import pytest

from engine.data.pretraining import open_token_file
from engine.data.tokenizer import load_tokenizer
from engine.quickstart.files import Files, find_files, write_tokenizer
from engine.quickstart.settings import QuickstartConfig
from engine.quickstart.stages import ppo_stage, pretraining_stage, rm_stage, sft_stage
from engine.settings.layout import ParallelLayout
from engine.settings.numerics import Numerics
from tests.engine.quickstart.small_recipe import data_folder, tiny_config


@pytest.fixture(scope="module")
def config(tmp_path_factory: pytest.TempPathFactory) -> QuickstartConfig:
    """A quickstart of 60 demonstrations whose files and tokenizer are there."""
    folder = tmp_path_factory.mktemp("quickstart")
    shared = {"layout": ParallelLayout(tp=2), "numerics": Numerics(dtype="bf16"), "seed": 7}
    config = tiny_config(folder / "run", data_folder(folder / "data"), **shared)
    write_tokenizer(config, find_files(config), folder / "run" / "tokenizer.model")
    return config


@pytest.fixture
def files(config: QuickstartConfig) -> Files:
    return find_files(config)


def test_every_stage_starts_from_the_one_before(config: QuickstartConfig, files: Files):
    base, sft, rm = (make(config, files) for make in (pretraining_stage, sft_stage, rm_stage))
    assert base.init_from is None
    assert (sft.init_from, rm.init_from) == (base.directory, sft.directory)
    for name in ("ppo", "ppo_ptx"):
        ppo = ppo_stage(config, files, name)
        assert (ppo.policy, ppo.reward_model) == (sft.directory, rm.directory)
        assert ppo.directory == config.directory / name


def test_what_stages_share_is_the_quickstarts(config: QuickstartConfig, files: Files):
    stages = [make(config, files) for make in (pretraining_stage, sft_stage, rm_stage)]
    for stage in (*stages, ppo_stage(config, files, "ppo")):
        shared = (stage.layout, stage.numerics, stage.seed)
        assert shared == (ParallelLayout(tp=2), Numerics(dtype="bf16"), 7)


def test_accepted_changes_reach_the_stages_that_know_them(config: QuickstartConfig, files: Files):
    names = ("torch", "data.comparisons", "reward_model", "init_from")
    accepting = dataclasses.replace(config, accept_changed=names)
    rm, ppo = rm_stage(accepting, files), ppo_stage(accepting, files, "ppo")
    # What no stage knows goes to all, of which the first refuses it.
    assert rm.accept_changed == ("torch", "data.comparisons", "init_from")
    assert ppo.accept_changed == ("torch", "data.comparisons", "reward_model")


def test_passes_are_as_many_as_the_counts_need(config: QuickstartConfig, files: Files):
    demonstrations = len(files.demonstrations.read_text().splitlines())
    twice = dataclasses.replace(config, num_demonstrations=2 * demonstrations)
    assert sft_stage(twice, files).epochs == 2.0
    path = config.directory / "tokenizer.model"
    text = open_token_file(files.pretraining, load_tokenizer(path), config.directory / "tokens")
    twice = dataclasses.replace(config, num_pretraining_tokens=2 * len(text.tokens))
    assert pretraining_stage(twice, files).epochs == 2.0


def test_held_out_numbers_come_within_a_short_run(config: QuickstartConfig, files: Files):
    stages = {"pretrain": pretraining_stage, "sft": sft_stage, "rm": rm_stage}
    for name, make in stages.items():
        for every, found in ((1, 1), (0, 0), (None, None), (10**6, None)):
            stage = dataclasses.replace(getattr(config, name), eval_every=every)
            assert make(dataclasses.replace(config, **{name: stage}), files).eval_every == found


def test_ppo_has_pretraining_gradients_under_one_of_its_names(config, files: Files):
    with_ptx, without = (ppo_stage(config, files, name) for name in ("ppo_ptx", "ppo"))
    assert (with_ptx.ptx_coef, without.ptx_coef) == (config.ppo.ptx_coef, 0.0)
    assert config.ppo.ptx_coef > 0


def test_held_out_files_are_read_where_they_judge_and_nowhere_else(config, files: Files):
    sft, rm, ppo = (
        sft_stage(config, files),
        rm_stage(config, files),
        ppo_stage(config, files, "ppo"),
    )
    assert (sft.data.train, sft.data.valid) == (files.demonstrations, files.demonstrations_valid)
    assert (rm.data.train, rm.data.valid) == (files.comparisons, files.comparisons_valid)
    assert rm.data.demonstrations == files.demonstrations
    assert (ppo.data.prompts, ppo.data.valid) == (files.prompts, files.prompts_valid)
    assert ppo.data.pretraining == files.pretraining
    assert ppo.data.pretraining_valid == files.pretraining_valid
