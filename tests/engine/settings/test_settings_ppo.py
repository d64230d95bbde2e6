"""The defaults are those of InstructGPT's PPO-ptx, appendix C.4."""

import pytest

from engine.errors import UserError
from engine.settings.layout import ParallelLayout
from engine.settings.numerics import Numerics
from engine.settings.ppo import PPOConfig, PPOData


def test_defaults_are_the_papers():
    config = PPOConfig()
    assert config.iterations * config.rollout_batch_size == 256_000  # 256k episodes
    assert (config.rollout_batch_size, config.minibatch_size, config.ppo_epochs) == (512, 64, 1)
    assert (config.gamma, config.cliprange, config.kl.coef) == (1.0, 0.2, 0.02)
    assert (config.sampling.temperature, config.sampling.max_new_tokens) == (1.0, 1024)
    assert (config.ptx_coef, config.ptx_examples_per_episode) == (27.8, 8)
    assert config.ema_decay == 0.992
    assert config.data.max_prompt_tokens == 1024
    assert config.reference is None  # the KL is measured to where the policy starts


def test_learning_rates_are_constant_after_ten_iterations_from_a_tenth():
    for adam in (PPOConfig().adam, PPOConfig().critic_adam):
        assert (adam.schedule, adam.warmup, adam.warmup_start) == ("constant", 10, 0.1)
    assert PPOConfig().critic_adam.lr == 9e-6
    # E.9: without pretraining gradients every run above 8.05e-6 diverged.
    assert 2.55e-6 <= PPOConfig().adam.lr <= 8.05e-6


@pytest.mark.parametrize(
    ("change", "cause"),
    [
        ({"iterations": 0}, "iterations must be at least 1, got 0"),
        ({"ppo_epochs": 0}, "ppo-epochs must be at least 1, got 0"),
        ({"show_every": 0}, "show-every must be at least 1, got 0"),
        ({"micro_batch_tokens": 0}, "micro-batch-tokens must be at least 1, got 0"),
        ({"ptx_examples_per_episode": 0}, "ptx-examples-per-episode must be at least 1, got 0"),
        ({"cliprange": 0.0}, "cliprange must be positive, got 0.0"),
        ({"value_cliprange": 0.0}, "value-cliprange must be positive, got 0.0"),
        ({"eos_penalty": -1.0}, "eos-penalty must be at least 0, got -1.0"),
        ({"ptx_coef": -1.0}, "ptx-coef must be at least 0, got -1.0"),
        ({"num_shown": -1}, "num-shown must be at least 0, got -1"),
        ({"eval_every": -1}, "eval-every must be at least 0, got -1"),
        ({"gamma": 1.1}, "gamma must be from 0 to 1, got 1.1"),
        ({"lam": 1.1}, "lam must be from 0 to 1, got 1.1"),
        ({"ema_decay": 1.1}, "ema-decay must be from 0 to 1, got 1.1"),
    ],
)
def test_a_number_that_means_nothing_is_an_error(change: dict[str, float], cause: str):
    with pytest.raises(UserError) as error:
        PPOConfig(**change)
    assert str(error.value) == f"--{cause}"


@pytest.mark.parametrize(
    ("change", "cause"),
    [
        ({"valid_fraction": 1.5}, "data.valid-fraction must be from 0 to 1, got 1.5"),
        ({"num_valid": 0}, "data.num-valid must be at least 1, got 0"),
    ],
)
def test_a_held_out_part_that_means_nothing_is_an_error(change: dict[str, float], cause: str):
    with pytest.raises(UserError) as error:
        PPOData(**change)
    assert str(error.value) == f"--{cause}"


def test_no_value_clip_and_no_pretraining_gradients_are_choices():
    PPOConfig(value_cliprange=None, ptx_coef=0.0)


@pytest.mark.parametrize(
    ("source", "dtype", "reads_again"),
    [
        ("auto", "fp32", False),
        ("auto", "bf16", True),
        ("auto", "fp16", True),
        ("sampled", "bf16", False),
        ("scored", "fp32", True),
    ],
)
def test_a_policy_reads_its_responses_again_where_rounding_tells(source, dtype, reads_again):
    config = PPOConfig(policy_logprobs=source, numerics=Numerics(dtype=dtype))
    assert config.scores_policy is reads_again


def test_a_layout_to_generate_in_is_one_that_weights_can_be_copied_to():
    PPOConfig().check_generation_layout()
    pipeline = ParallelLayout(pp=2)
    PPOConfig(layout=pipeline, generation_layout=ParallelLayout(tp=2)).check_generation_layout()
    same = PPOConfig(layout=ParallelLayout(tp=2), generation_layout=ParallelLayout(tp=2))
    with pytest.raises(UserError, match="^generation_layout: tp 2 x pp 1 is the layout that"):
        same.check_generation_layout()
    with pytest.raises(UserError, match="^generation_layout: weights are copied to a layout"):
        PPOConfig(generation_layout=pipeline).check_generation_layout()
