import dataclasses

import pytest

from engine.data.examples import LengthReport
from engine.data.limits import Limit, Limits, context_limit, prompt_limits, training_limits
from engine.errors import UserError


def report(num_kept: int, num_long_prompts: int, num_long_sequences: int) -> LengthReport:
    return LengthReport(
        kept=list(range(num_kept)),
        num_long_prompts=num_long_prompts,
        num_long_sequences=num_long_sequences,
    )


def test_the_limit_that_binds_is_named():
    context = context_limit(256, can_grow=True)
    limits = training_limits(max_tokens=1024, max_prompt_tokens=128, context=context)
    assert limits.prompt == Limit(128, "--data.max-prompt-tokens")
    assert limits.whole == Limit(256, "the model's context; --size small has 512")
    limits = training_limits(max_tokens=100, max_prompt_tokens=128, context=context)
    assert limits.whole == Limit(100, "--data.max-tokens")
    # Of equal ones the context: to raise the setting would not help.
    limits = training_limits(max_tokens=256, max_prompt_tokens=256, context=context)
    assert limits.whole == limits.prompt == context


def test_a_context_that_no_option_sets_has_no_remedy():
    assert context_limit(256, can_grow=False) == Limit(256, "the model's context")
    assert context_limit(2048, can_grow=True) == Limit(2048, "the model's context")


def test_nothing_left_is_an_error_that_says_what_and_why():
    limits = training_limits(
        max_tokens=1024, max_prompt_tokens=128, context=context_limit(256, can_grow=True)
    )
    limits.check(report(1, 5, 5), "--data.train a.jsonl")
    limits.check(report(0, 0, 0), "--data.train a.jsonl")
    with pytest.raises(UserError) as error:
        limits.check(report(0, 0, 8), "--data.train a.jsonl")
    assert str(error.value) == (
        "--data.train a.jsonl: all 8 examples are too long, 8 over 256 tokens (the model's "
        "context; --size small has 512) in all; raise what limits them, or cut them "
        "by --data.too-long"
    )
    with pytest.raises(UserError, match="all 3 .* 1 with a prompt over 128 tokens .*, 2 over 256"):
        limits.check(report(0, 1, 2), "x")


def test_what_is_said_of_lengths_has_the_limits_that_were_passed():
    limits = Limits(prompt=Limit(56, "the room"), whole=Limit(256, "the context"))
    assert limits.counts(report(5, 3, 0)) == {"a prompt over 56 tokens (the room)": 3}
    assert limits.counts(report(5, 0, 2)) == {"over 256 tokens (the context) in all": 2}
    assert limits.described(report(5, 0, 0)) == "5 kept, none too long"
    assert limits.described(dataclasses.replace(report(5, 0, 0), num_cut=2)) == (
        "5 kept (2 of them cut)"
    )
    assert limits.described(report(5, 3, 2)) == (
        "5 kept, 5 dropped: 3 with a prompt over 56 tokens (the room), "
        "2 over 256 tokens (the context) in all"
    )
    assert str(limits) == "a prompt of 56 tokens (the room) and 256 tokens (the context) in all"


def test_prompts_leave_a_response_room_in_the_shortest_context():
    contexts = {"policy": 256, "reward model": 96, "reference": 128}
    limits = prompt_limits(contexts, 64, max_prompt_tokens=128)
    assert limits == Limits(
        prompt=Limit(
            32, "what --sampling.max-new-tokens 64 leaves of the reward model's context of 96"
        )
    )
    assert prompt_limits(contexts, 64, max_prompt_tokens=20).prompt == Limit(
        20, "--data.max-prompt-tokens"
    )
    with pytest.raises(UserError) as error:
        prompt_limits(contexts, 96, max_prompt_tokens=128, prefix="selection.")
    assert str(error.value) == (
        "--selection.sampling.max-new-tokens 96 leaves no room for a prompt in the reward model's "
        "context of 96"
    )
