import dataclasses

import pytest

from engine.errors import UserError
from engine.generation.sequence import LiveSequence
from engine.settings.checks import option_of
from engine.settings.sampling import SamplingConfig


@pytest.mark.parametrize(
    "change",
    [
        {"max_new_tokens": 0},
        {"num_slots": 0},
        {"prefill_tokens": 0},
        {"block_size": -1},
        {"temperature": -0.1},
        {"temperature": float("nan")},
        {"top_k": -1},
        {"top_p": 0.0},
        {"top_p": 1.1},
        {"min_new_tokens": 9, "max_new_tokens": 8},
        {"cache_fraction": 0.0},
    ],
)
def test_a_meaningless_setting_is_named(change):
    with pytest.raises(UserError, match=option_of(f"sampling.{next(iter(change))}")):
        dataclasses.replace(SamplingConfig(), **change).check()


def test_a_response_ends_with_a_stop_token_or_at_its_limit():
    stop_ids = frozenset([3])
    for tokens, has_eos in (([5, 3], True), ([5, 5, 5], False), ([5, 5, 3], True)):
        live = LiveSequence(sample_index=4, tokens=[9, 9], prompt_length=2, max_length=5)
        live.extend(tokens, [-1.0] * len(tokens), stop_ids)
        assert live.is_finished
        response = live.response(stop_ids)
        assert response.tokens.tolist() == tokens
        assert response.logprobs.tolist() == [-1.0] * len(tokens)
        assert response.has_eos is has_eos
