import pytest

from engine.errors import UserError
from engine.settings.tokenizer import TokenizerConfig


@pytest.mark.parametrize(
    "options, problem",
    [
        ({"vocab_size": 0}, "vocab-size must be at least 1"),
        ({"max_megabytes": 0.0}, "max-megabytes must be positive"),
    ],
)
def test_numbers_that_mean_nothing_are_refused(options, problem):
    with pytest.raises(UserError, match=problem):
        TokenizerConfig(**options)
