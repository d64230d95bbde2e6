import dataclasses

import pytest

from models.form import Form, Rotary
from models.sizes import SIZES, GPTSize, size_as_json, size_of_json

# Brown et al. 2020, Table 2.1, counted out with its vocabulary of 50,257 and context of 2,048.
MILLIONS = {
    "125m": 125.2,
    "350m": 355.9,
    "760m": 760.3,
    "1.3b": 1315.7,
    "2.7b": 2651.6,
    "6b": 6658,
    "13b": 12853,
    "175b": 174604,
}


@pytest.mark.parametrize("name", MILLIONS)
def test_parameters_are_those_of_the_paper(name: str):
    digits = 1 if MILLIONS[name] < 5000 else 0
    assert round(SIZES[name].num_parameters / 1e6, digits) == MILLIONS[name]


def test_every_named_size_of_the_paper_is_counted():
    assert SIZES.keys() - MILLIONS.keys() == {"tiny", "small"}


def test_parameters_by_hand():
    # One layer: attention 4 x 4 + 8, MLP 16 + 8 + 16 + 2, two norms of 4; final norm 4.
    size = GPTSize(num_layers=1, hidden_size=2, num_heads=1, vocab_size=3, context_length=5)
    assert size.num_parameters == (16 + 8) + (16 + 8 + 16 + 2) + 8 + 4 + 3 * 2 + 5 * 2


def test_an_embedding_of_another_width_is_projected_in_and_out():
    size = GPTSize(num_layers=1, hidden_size=8, num_heads=1, vocab_size=3, context_length=5)
    narrow = dataclasses.replace(size, embedding_width=2)
    assert (size.embedding_dim, narrow.embedding_dim) == (8, 2)
    assert narrow.num_parameters == size.num_parameters - 3 * (8 - 2) + 2 * 2 * 8
    untied = dataclasses.replace(narrow, form=Form(is_tied=False, rotary=Rotary()))
    assert untied.num_parameters == narrow.num_parameters + 3 * 2 - 5 * 8
    form = Form(activation="relu", is_post_norm=True)
    opt = dataclasses.replace(SIZES["350m"], vocab_size=50272, embedding_width=512, form=form)
    assert opt.num_parameters == 331_196_416 - 2 * 1024  # of OPT-350m, without two padding rows


def test_a_width_is_described_where_it_is_another():
    size = dataclasses.replace(SIZES["tiny"], embedding_width=96)
    assert size_of_json(size_as_json(size)) == size
    assert size_as_json(size) == size_as_json(SIZES["tiny"]) | {"embedding_width": 96}
    assert dataclasses.replace(size, embedding_width=192) == SIZES["tiny"]


@pytest.mark.parametrize(
    ("vocab_size", "padded"), [(1, 128), (128, 128), (129, 256), (50257, 50304)]
)
def test_vocabulary_is_padded_for_any_tp_that_divides_128(vocab_size: int, padded: int):
    size = GPTSize(num_layers=1, hidden_size=8, num_heads=2, vocab_size=vocab_size)
    assert size.padded_vocab_size == padded


def test_heads_must_divide_the_width():
    with pytest.raises(ValueError, match="hidden_size 10 must be a multiple of num_heads 4"):
        GPTSize(num_layers=1, hidden_size=10, num_heads=4)


def test_heads_are_of_64_to_128_dimensions():
    for name in MILLIONS:
        assert 64 <= SIZES[name].head_dim <= 128
        assert SIZES[name].num_kv_heads == SIZES[name].num_heads  # GPT-3 shares none
