import contextlib
import dataclasses
from pathlib import Path

import pytest

from engine.errors import UserError
from engine.settings.size import banded, check_named_size, check_starts, named_size, size_with
from models.form import Form
from models.sizes import SIZES

TINY = dataclasses.replace(SIZES["tiny"], vocab_size=9)


@pytest.mark.parametrize("name", list(SIZES))
def test_a_name_of_the_table_is_its_size(name: str):
    assert named_size(name) is SIZES[name]


@pytest.mark.parametrize("name", ["7b", "", "175B"])
def test_unknown_name_is_answered_with_those_there_are(name: str):
    with pytest.raises(UserError, match=f"no size is named {name!r}; the sizes are tiny, .*175b"):
        named_size(name)


def test_a_size_has_the_vocabulary_and_context_that_are_asked_for():
    size = size_with("125m", 100)
    assert (size.vocab_size, size.context_length) == (100, SIZES["125m"].context_length)
    assert size_with("125m", 100, 128).context_length == 128
    with pytest.raises(UserError, match="no size is named '1.3B'.*1.3b, .*175b"):
        size_with("1.3B", 100)


def test_a_stage_has_something_to_start_from():
    check_starts("tiny", None)
    check_starts("", Path("run"))
    with pytest.raises(UserError, match="--init-from is required: .* --size names .*: tiny, small"):
        check_starts("", None)


def test_a_band_is_of_every_second_layer():
    assert banded(TINY, 0) is TINY
    form = banded(TINY, 5).form
    assert form == Form(window=5, windowed_layers="every second")
    assert dataclasses.replace(banded(TINY, 5), form=TINY.form) == TINY


@pytest.mark.parametrize(
    ("size", "fits"),
    [
        (TINY, True),
        (dataclasses.replace(TINY, form=Form(activation="gelu")), True),
        (dataclasses.replace(TINY, embedding_width=96), True),
        (dataclasses.replace(TINY, num_layers=3), False),
        (dataclasses.replace(TINY, query_groups=2), False),
    ],
)
def test_a_named_size_is_one_of_dimensions_whatever_vocabulary_and_family(size, fits):
    with contextlib.nullcontext() if fits else pytest.raises(UserError, match="a tiny has"):
        check_named_size("tiny", size, Path("run"), "policy")
    check_named_size("", size, Path("run"), "policy")  # none is named


def test_another_size_than_is_named_is_an_error_with_both():
    message = (
        "^run: the policy has 2 layers of width 192 and a context of 256 tokens, a 1.3b has 24 of "
        "2048 and 2048; with an empty size"
    )
    with pytest.raises(UserError, match=message):
        check_named_size("1.3b", TINY, Path("run"), "policy")
