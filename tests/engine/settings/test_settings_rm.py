"""The defaults are those of InstructGPT's 6B reward model, appendix C.2."""

import pytest

from engine.errors import UserError
from engine.settings.rm import RMConfig, RMData


def test_defaults_are_the_papers():
    config = RMConfig()
    assert (config.epochs, config.batch_size) == (1.0, 64)
    assert (config.adam.lr, config.adam.schedule) == (9e-6, "cosine")
    assert (config.adam.final_fraction, config.adam.warmup) == (0.1, 0)
    # App. C: prompts over 1k tokens are dropped, the context is 2k.
    assert (config.data.max_prompt_tokens, config.data.max_tokens) == (1024, 2048)


@pytest.mark.parametrize(
    ("change", "cause"),
    [
        ({"batch_size": 0}, "batch-size must be at least 1, got 0"),
        ({"micro_batch_tokens": 0}, "micro-batch-tokens must be at least 1, got 0"),
        ({"epochs": 0.0}, "epochs must be positive, got 0.0"),
        ({"epochs": 1e308}, "epochs must be at most 1e+09, got 1e+308"),
        ({"seed": -1}, "seed must be at least 0, got -1"),
        ({"eval_every": -1}, "eval-every must be at least 0, got -1"),
    ],
)
def test_a_number_of_the_run_that_means_nothing_is_an_error(change: dict[str, float], cause: str):
    with pytest.raises(UserError) as error:
        RMConfig(**change)
    assert str(error.value) == f"--{cause}"


@pytest.mark.parametrize(
    ("change", "cause"),
    [
        ({"num_demonstrations": 0}, "data.num-demonstrations must be at least 1, got 0"),
        ({"valid_fraction": 1.5}, "data.valid-fraction must be from 0 to 1, got 1.5"),
    ],
)
def test_a_number_of_the_data_that_means_nothing_is_an_error(change: dict, cause: str):
    with pytest.raises(UserError) as error:
        RMData(**change)
    assert str(error.value) == f"--{cause}"
