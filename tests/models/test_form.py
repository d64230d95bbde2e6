import dataclasses
import json

import pytest

from models.form import GPT3_FORM, Form, Rotary, RotaryScaling, fields_that_differ, form_of

LLAMA_3 = Form(
    norm="rms",
    activation="silu",
    is_gated=True,
    bias="none",
    is_tied=False,
    rotary=Rotary(
        base=500_000.0,
        scaling=RotaryScaling(kind="llama3", factor=8.0, original_context=8192),
    ),
)


@pytest.mark.parametrize("form", [GPT3_FORM, LLAMA_3, Form(is_parallel=True, window=7)])
def test_a_form_is_stored_by_what_differs_and_read_again(form: Form):
    stored = json.loads(json.dumps(fields_that_differ(form)))
    assert form_of(stored) == form
    assert (stored == {}) == (form == GPT3_FORM)


@pytest.mark.parametrize(
    ("stored", "words"),
    [
        ([], "no object"),
        ({"norms": "rms"}, "'norms' is no field of a form"),
        ({"norm": "batch"}, "norm is 'batch'"),
        ({"norm": ["rms"]}, "norm is"),
        ({"norm_epsilon": 0}, "norm_epsilon is 0"),
        ({"norm_epsilon": float("nan")}, "norm_epsilon is nan"),
        ({"norm_epsilon": True}, "norm_epsilon is True"),
        ({"is_gated": 1}, "is_gated is 1"),
        ({"window": -1}, "window is -1"),
        ({"window": 2.0}, "window is 2.0"),
        ({"rotary": 3}, "rotary is no object"),
        ({"rotary": {"scaling": {"kind": "yarn"}}}, "lacks fields"),
        ({"rotary": {"scaling": {"kind": "ntk", "factor": 2.0}}}, "kind is 'ntk'"),
        ({"is_parallel": True, "is_post_norm": True}, "norms before"),
    ],
)
def test_what_is_no_form_is_an_error_that_names_it(stored, words):
    with pytest.raises(ValueError, match=words):
        form_of(stored)


def test_forms_are_compared_and_hashed_by_their_fields():
    again = dataclasses.replace(LLAMA_3)
    assert {LLAMA_3: 1}[again] == 1
    assert dataclasses.replace(LLAMA_3, is_tied=True) != LLAMA_3
