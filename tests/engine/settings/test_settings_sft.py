"""The defaults are those of InstructGPT's SFT baseline, appendix C.1."""

import pytest

from engine.errors import UserError
from engine.settings.sft import SelectionConfig, SFTConfig, SFTData


def test_defaults_are_the_papers():
    config = SFTConfig()
    assert (config.epochs, config.batch_size, config.dropout) == (16.0, 32, 0.2)
    assert (config.adam.lr, config.adam.schedule) == (9.65e-6, "cosine")
    assert (config.adam.final_fraction, config.adam.warmup) == (0.1, 0)
    # App. C: prompts over 1k tokens are dropped, responses are up to 1k tokens, the context is 2k.
    assert (config.data.max_prompt_tokens, config.data.max_tokens) == (1024, 2048)
    assert config.selection.sampling.max_new_tokens == 1024
    assert config.data.pretraining_fraction == 0.0  # that is the RLHF initialisation's, C.3


@pytest.mark.parametrize(
    ("change", "cause"),
    [
        ({"batch_size": 0}, "batch-size must be at least 1, got 0"),
        ({"micro_batch_tokens": 0}, "micro-batch-tokens must be at least 1, got 0"),
        ({"epochs": -1.0}, "epochs must be positive, got -1.0"),
        ({"epochs": 1e308}, "epochs must be at most 1e+09, got 1e+308"),
        ({"seed": -1}, "seed must be at least 0, got -1"),
        ({"eval_every": -1}, "eval-every must be at least 0, got -1"),
        ({"dropout": 1.5}, "dropout must be from 0 to 1, got 1.5"),
    ],
)
def test_a_number_of_the_run_that_means_nothing_is_an_error(change: dict[str, float], cause: str):
    with pytest.raises(UserError) as error:
        SFTConfig(**change)
    assert str(error.value) == f"--{cause}"


@pytest.mark.parametrize("fraction", [-0.1, 1.0, float("nan")])
def test_pretraining_text_leaves_room_for_demonstrations(fraction: float):
    with pytest.raises(UserError, match=r"data\.pretraining-fraction must be in \[0, 1\), got"):
        SFTData(pretraining_fraction=fraction)
    assert SFTData(pretraining_fraction=0.0) == SFTData()


def test_a_share_and_a_count_of_the_data_are_checked():
    with pytest.raises(UserError, match=r"^--data\.valid-fraction must be from 0 to 1, got 2\.0$"):
        SFTData(valid_fraction=2.0)
    with pytest.raises(UserError, match=r"^--selection\.num-prompts must be at least 1, got 0$"):
        SelectionConfig(num_prompts=0)
