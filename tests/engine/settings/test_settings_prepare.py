import pytest

from engine.errors import UserError
from engine.settings.prepare import PrepareConfig


@pytest.mark.parametrize(
    "options, problem",
    [
        ({"prefix_characters": 0}, "prefix-characters must be at least 1"),
        ({"max_prompts_per_user": 0}, "max-prompts-per-user must be at least 1"),
        ({"valid_fraction": 1.5}, "valid-fraction must be from 0 to 1"),
        ({"valid_fraction": 0.6, "test_fraction": 0.4}, "leave nothing for training"),
        ({"phone_regions": ("de",)}, "countries of two capital letters, got 'de'"),
        ({"seed": -1}, "seed must be at least 0"),
    ],
)
def test_numbers_that_mean_nothing_are_refused(options, problem):
    with pytest.raises(UserError, match=problem):
        PrepareConfig(**options)
