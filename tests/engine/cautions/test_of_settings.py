"""Each caution at its threshold, with its number; and what real runs say, once."""

import dataclasses

import pytest

from engine.alarms import Alarm
from engine.cautions.of_settings import (
    evaluation_cautions,
    interval_cautions,
    ppo_cautions,
    room_cautions,
    schedule_cautions,
)
from engine.data.limits import Limit
from engine.ranks.parallel import Parallel
from engine.ranks.start import start_parallel
from engine.settings.adam import AdamConfig
from engine.settings.kl import KLConfig
from engine.settings.layout import ParallelLayout
from engine.settings.ppo import PPOConfig
from engine.settings.sampling import SamplingConfig
from engine.settings.saving import SaveConfig
from models.sizes import SIZES

TRAINED = {"adam": SIZES["1.3b"], "critic_adam": SIZES["6b"]}


def names(found: list[Alarm]) -> list[str]:
    return [alarm.name for alarm in found]


def only(found: list[Alarm]) -> str:
    (alarm,) = found
    return alarm.message


def test_a_warm_up_must_end_within_the_run():
    adam = AdamConfig(lr=1e-3, warmup=20, warmup_start=0.1)
    assert schedule_cautions("adam", adam, 21) == []
    message = only(schedule_cautions("adam", adam, 20))
    assert "adam.warmup 20 outlasts the run of 20 steps" in message
    assert "ends at 0.000955 and never reaches --adam.lr 0.001" in message  # 0.1 + 0.9 x 19 / 20


def test_rates_that_teach_nothing_or_too_much():
    adam = AdamConfig(warmup=2, warmup_start=0.0)
    assert names(schedule_cautions("critic_adam", adam, 9)) == ["zero_lr"]
    assert names(schedule_cautions("adam", AdamConfig(lr=0.02), 9)) == []
    assert names(schedule_cautions("adam", AdamConfig(lr=1000.0), 9)) == ["large_lr"]


# Widths and pretraining rates of GPT-3 (Brown et al. 2020, Table 2.1).
GPT3_RATES = {
    "125m": 6e-4,
    "350m": 3e-4,
    "760m": 2.5e-4,
    "1.3b": 2e-4,
    "2.7b": 1.6e-4,
    "6b": 1.2e-4,
    "13b": 1e-4,
    "175b": 0.6e-4,
}


@pytest.mark.parametrize(("name", "rate"), GPT3_RATES.items())
def test_a_trained_model_is_not_gone_on_from_at_the_rates_that_pretrain_it(name, rate):
    size = SIZES[name]
    adam = AdamConfig(lr=rate)
    assert schedule_cautions("adam", adam, 9) == []
    message = only(schedule_cautions("adam", adam, 9, size))
    assert f"adam.lr {rate:g} is for a model that starts from nothing" in message
    assert f"of width {size.hidden_size}, where more than" in message
    assert schedule_cautions("adam", AdamConfig(lr=rate / 10), 9, size) == []


@pytest.mark.parametrize(
    ("name", "rates"),
    [
        ("1.3b", (9.65e-6, 5e-6, 1.5e-5, 5.49e-6, 9e-6)),
        ("6b", (9.65e-6, 1.04e-5, 9e-6, 5.49e-6)),
        ("175b", (5.03e-6, 2.45e-6, 5e-6, 3.74e-6)),
    ],
)
def test_the_papers_rates_are_not_too_large(name, rates):
    for rate in rates:
        assert schedule_cautions("adam", AdamConfig(lr=rate), 9, SIZES[name]) == []


def test_what_minutes_taught_is_taught_on_at_the_same_rates():
    for name in ("tiny", "small"):
        assert schedule_cautions("adam", AdamConfig(lr=3e-3), 9, SIZES[name]) == []
    large = dataclasses.replace(SIZES["125m"], hidden_size=576, num_heads=9, num_layers=30)
    assert names(schedule_cautions("adam", AdamConfig(lr=3e-3), 9, large)) == ["large_lr"]
    limit = 0.1 / 576
    assert schedule_cautions("adam", AdamConfig(lr=limit), 9, large) == []
    assert schedule_cautions("adam", AdamConfig(lr=1.01 * limit), 9, large)


def test_intervals_beyond_the_run():
    assert interval_cautions(SaveConfig(save_every=22), 22, 22) == []
    found = interval_cautions(SaveConfig(save_every=23), 23, 22)
    assert names(found) == ["save_every", "eval_every"]
    assert "save-every 23 is beyond the run's 22 steps" in found[0].message
    never = SaveConfig(save_every_minutes=0.0)
    assert names(interval_cautions(never, None, 22)) == ["no_saves"]
    assert interval_cautions(SaveConfig(), 0, 22) == []


def alone() -> Parallel:
    return start_parallel(ParallelLayout(), seed=0)


def ppo(**changes) -> list[str]:
    config = dataclasses.replace(PPOConfig(), **changes)
    return names(ppo_cautions(config, alone(), 31_000, 10**7, TRAINED))


@pytest.mark.parametrize(
    ("changes", "name"),
    [
        ({}, None),  # the paper's
        ({"kl": KLConfig(coef=0.0)}, "kl_coef"),
        ({"sampling": SamplingConfig(top_k=1)}, "greedy"),
        ({"sampling": SamplingConfig(top_p=0.9)}, "cut_distribution"),
        ({"sampling": SamplingConfig(top_k=50)}, "cut_distribution"),
        ({"sampling": SamplingConfig(min_new_tokens=64)}, "no_end"),
        ({"minibatch_size": 4}, "many_updates"),
        ({"adam": AdamConfig(warmup=500)}, "warmup"),
        ({"critic_adam": AdamConfig(warmup=500)}, "warmup"),
        ({"ema_decay": 0.99999}, "average"),
    ],
)
def test_settings_of_ppo(changes: dict, name: str | None):
    assert ppo(**changes) == ([name] if name else [])


def test_prompts_and_text_that_ppo_reads_often():
    config = PPOConfig(iterations=100, rollout_batch_size=64, ptx_examples_per_episode=1)
    found = ppo_cautions(config, alone(), 50, 100, TRAINED)
    assert names(found) == ["repeated", "small_data", "repeated"]
    assert "each of 50 prompts is read 128 times" in found[0].message
    assert "each is answered 1.28 times in one iteration" in found[1].message
    assert "each of 100 pretraining sequences is read 64 times" in found[2].message


def test_held_out_prompts_that_are_few_or_take_much_of_the_run():
    config = PPOConfig(iterations=100, rollout_batch_size=64)  # looked at 10 times
    assert evaluation_cautions(config, 0) == []
    assert "15 prompts are held out: their mean reward is known to 26%" in only(
        evaluation_cautions(config, 15)
    )
    assert evaluation_cautions(config, 16) == []
    assert evaluation_cautions(config, 213) == []  # 2,130 beside 6,400
    message = only(evaluation_cautions(config, 214))
    assert "214 held-out prompts are answered 10 times: 25% of the run's responses" in message
    assert evaluation_cautions(dataclasses.replace(config, eval_every=0), 214) == []
    assert evaluation_cautions(PPOConfig(), 256) == []  # the paper's
    never = dataclasses.replace(PPOConfig(), eval_every=501)
    assert names(ppo_cautions(never, alone(), 31_000, 10**7, TRAINED)) == ["eval_every"]


def test_a_room_that_is_tiny():
    sampling = SamplingConfig(max_new_tokens=240)
    # Contexts of 8,192 tokens and more are not there to be filled by prompts.
    assert room_cautions(sampling, Limit(256, "x"), 131_072) == []
    assert names(room_cautions(sampling, Limit(255, "x"), 131_072)) == ["prompt_room"]
    assert room_cautions(sampling, Limit(32, "x"), 256) == []
    assert "prompts have at most 31 tokens (x)" in only(
        room_cautions(sampling, Limit(31, "x"), 256)
    )
