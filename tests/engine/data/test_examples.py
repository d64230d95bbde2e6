import numpy as np
import pytest

from engine.data.examples import (
    TRAINED,
    Example,
    TooLong,
    drop_long,
    encode_prompts,
    encode_replies,
)
from engine.data.prompt_format import Prompt, Reply
from engine.data.tokenizer import Tokenizer
from engine.errors import UserError
from tests.engine.data.made_tokenizer import made_tokenizer


def example(prompt_length: int, length: int) -> Example:
    return Example(tokens=np.arange(length), prompt_length=prompt_length)


def test_prompt_and_response_are_encoded_apart(tokenizer: Tokenizer) -> None:
    # "pu" + "b" is one piece when it is read as one word.
    (prompt,) = encode_prompts([Prompt("a pu")], tokenizer)
    (response,) = encode_replies([Reply("b")], tokenizer)
    tokens = [*prompt, *response]
    assert prompt.dtype == response.dtype == np.int64
    assert tokens == [*tokenizer.encode("a pu"), *tokenizer.encode("b"), tokenizer.eos_id]
    assert tokens[:-1] != tokenizer.encode("a pub")


def test_the_suffix_closes_the_prompt(tokenizer: Tokenizer) -> None:
    found = encode_prompts([Prompt("a pub", "\n"), Prompt("x")], tokenizer)
    assert [tokenizer.decode(tokens) for tokens in found] == ["a pub\n", "x"]


def test_what_has_its_tokens_keeps_them(tokenizer: Tokenizer) -> None:
    made = np.array([3, 1, 4])
    plain, kept = encode_prompts([Prompt("a pub"), Prompt("b", tokens=made)], tokenizer)
    assert (plain.tolist(), kept.tolist()) == (tokenizer.encode("a pub"), [3, 1, 4])
    kept, plain = encode_replies([Reply("b", made), Reply("a pub")], tokenizer)
    assert kept.tolist() == [3, 1, 4]
    assert plain.tolist() == [*tokenizer.encode("a pub"), tokenizer.eos_id]


def test_every_prompt_begins_as_its_tokenizer_has_it() -> None:
    letters = made_tokenizer(lambda texts: [list(map(ord, text)) for text in texts], bos_ids=(7, 9))
    asked = [Prompt("ab", "\n"), Prompt("", "\n"), Prompt("c", "\n")]
    found = [tokens.tolist() for tokens in encode_prompts(asked, letters)]
    assert found == [[7, 9, 97, 98, 10], [7, 9, 10], [7, 9, 99, 10]]
    (empty,) = encode_prompts([Prompt("")], letters)
    assert empty.dtype == np.int64
    assert Example(tokens=empty, prompt_length=len(empty)).tokens.tolist() == [7, 9]
    (reply,) = encode_replies([Reply("x")], letters)
    assert reply.tolist() == [120, letters.eos_id]  # nothing begins it


def test_what_is_not_trained_is_given() -> None:
    trained = np.array([False, False, True, False, True])
    whole = Example(tokens=np.arange(5), prompt_length=2)
    part = Example(tokens=np.arange(5), prompt_length=2, fields={TRAINED: trained})
    assert (whole.num_given, part.num_given) == (2, 3)


def test_what_is_over_a_limit_is_dropped_and_counted() -> None:
    units = [example(5, 9), example(6, 7), example(2, 10), example(5, 10), example(2, 11)]
    kept, report = drop_long(units, max_length=10, max_prompt_length=5)
    assert report.kept == [0, 2, 3]
    assert [len(unit.tokens) for unit in kept] == [9, 10, 10]
    assert (report.num_long_prompts, report.num_long_sequences) == (1, 1)


def test_a_group_goes_when_one_of_its_sequences_is_too_long() -> None:
    kept, report = drop_long([[example(2, 4), example(2, 9)], [example(2, 4)]], max_length=8)
    assert report.kept == [1]
    assert len(kept[0]) == 1


def test_all_may_go() -> None:
    kept, report = drop_long([example(6, 7), example(2, 20)], max_length=10, max_prompt_length=5)
    assert (kept, report.kept, report.num_dropped) == ([], [], 2)


def test_a_prompt_loses_its_beginning_behind_what_begins_a_text() -> None:
    units = [example(7, 9), example(4, 8), example(3, 12), example(3, 4)]
    kept, report = drop_long(
        units, max_length=8, max_prompt_length=5, too_long="cut-left", num_first=1
    )
    # The first by 2, for its prompt; the third by 4 is more than there is.
    assert [unit.tokens.tolist() for unit in kept] == [
        [0, 3, 4, 5, 6, 7, 8],
        list(range(8)),
        list(range(4)),
    ]
    assert [unit.prompt_length for unit in kept] == [5, 4, 3]
    assert (report.kept, report.num_cut, report.num_long_sequences) == ([0, 1, 3], 1, 1)


def test_something_of_a_prompt_stays() -> None:
    kept, _ = drop_long([example(4, 8)], max_length=6, too_long="cut-left", num_first=1)
    assert [unit.tokens.tolist() for unit in kept] == [[0, 3, 4, 5, 6, 7]]
    kept, report = drop_long([example(4, 8)], max_length=5, too_long="cut-left", num_first=1)
    assert (kept, report.num_dropped, report.num_cut) == ([], 1, 0)


def test_the_completions_of_a_prompt_keep_one_prompt() -> None:
    unit = [example(6, 8), example(6, 11)]
    ((short, long),), report = drop_long([unit], max_length=9, too_long="cut-left")
    assert short.tokens.tolist() == [2, 3, 4, 5, 6, 7]
    assert long.tokens.tolist() == list(range(2, 11))
    assert (short.prompt_length, long.prompt_length, report.num_cut) == (4, 4, 1)


@pytest.mark.parametrize(
    ("too_long", "kept"), [("cut-left", [0, 2, 3, 4]), ("cut-right", [0, 1, 2, 3])]
)
def test_what_goes_with_a_token_is_cut_with_it(too_long: TooLong, kept: list[int]) -> None:
    fields = {"weights": np.arange(5) * 0.5, "ranks": 3}
    whole = Example(tokens=np.arange(5), prompt_length=3, fields=fields)
    (cut,), _ = drop_long([whole], max_length=4, too_long=too_long, num_first=1)
    assert cut.tokens.tolist() == kept
    assert np.asarray(cut.fields["weights"]).tolist() == [0.5 * n for n in kept]
    assert cut.fields["ranks"] == 3


def test_a_response_loses_its_end() -> None:
    units = [example(3, 9), example(3, 4), example(5, 9), example(6, 9)]
    kept, report = drop_long(units, max_length=5, max_prompt_length=5, too_long="cut-right")
    assert [unit.tokens.tolist() for unit in kept] == [list(range(5)), list(range(4))]
    assert (report.num_cut, report.num_long_prompts, report.num_long_sequences) == (1, 1, 1)


@pytest.mark.parametrize("prompt_length", [0, 5])
def test_the_prompt_has_a_token_and_is_within_the_sequence(prompt_length: int) -> None:
    with pytest.raises(ValueError, match="is not within 1 to 4 tokens"):
        example(prompt_length, 4)


def test_a_dialogue_does_not_lose_its_beginning(tokenizer: Tokenizer) -> None:
    prompts = [Prompt("a"), Prompt("User: b\n\nAssistant:", is_dialogue=True)]
    assert len(list(encode_prompts(prompts[:1], tokenizer, "cut-left"))) == 1
    with pytest.raises(UserError, match="cut-left is for plain texts"):
        list(encode_prompts(prompts, tokenizer, "cut-left"))
