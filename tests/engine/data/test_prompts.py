import json
from pathlib import Path

import pytest
from hypothesis import given
from hypothesis import strategies as st

from engine.data.demonstrations import Demonstration
from engine.data.prompt_format import Prompt, Reply
from engine.data.prompts import (
    hold_out,
    hold_out_prompts,
    prompt_examples,
    read_prompts,
    split_by_prompt,
)
from engine.data.tokenizer import Tokenizer
from engine.errors import UserError
from tests.engine.data.made_tokenizer import made_tokenizer


def test_text_and_messages_are_read(tmp_path: Path) -> None:
    path = tmp_path / "prompts.jsonl"
    records = [{"prompt": "a"}, {"messages": [{"role": "user", "content": "b"}]}]
    path.write_text("\n".join(json.dumps(record) for record in records))
    asked = Prompt("User: b\n\nAssistant:", is_dialogue=True)
    assert read_prompts(path)[0] == [Prompt("a", "\n"), asked]


def test_a_bad_prompt_is_named(tmp_path: Path) -> None:
    path = tmp_path / "prompts.jsonl"
    path.write_text('{"prompt": "a"}\n{"question": "b"}\n')
    with pytest.raises(UserError, match=r'prompts\.jsonl:2: field "prompt" is missing'):
        read_prompts(path)
    assert read_prompts(path, skip_bad_lines=True)[1].num_bad == 1


def test_long_prompts_are_dropped_and_the_kept_ones_known(tokenizer: Tokenizer) -> None:
    prompts = [Prompt("The Mill " * 50), Prompt("The Mill"), Prompt("pub")]
    examples, report = prompt_examples(prompts, tokenizer, max_prompt_length=20)
    assert report.kept == [1, 2]
    assert report.num_long_prompts == 1
    assert [tokenizer.decode(example.tokens) for example in examples] == ["The Mill", "pub"]
    assert all(example.prompt_length == len(example.tokens) for example in examples)


def test_what_begins_a_prompt_counts_as_its_tokens() -> None:
    letters = made_tokenizer(lambda texts: [list(map(ord, text)) for text in texts], bos_ids=(7,))
    examples, report = prompt_examples([Prompt("ab"), Prompt("abc")], letters, max_prompt_length=3)
    assert [example.tokens.tolist() for example in examples] == [[7, 97, 98]]
    assert (report.num_long_prompts, examples[0].prompt_length) == (1, 3)


@given(
    prompts=st.lists(st.text(max_size=5)),
    valid_fraction=st.floats(0, 1),
    seed=st.integers(0, 10),
)
def test_equal_prompts_are_on_one_side(
    prompts: list[str], valid_fraction: float, seed: int
) -> None:
    train, valid = split_by_prompt(prompts, valid_fraction, seed)
    assert sorted(train + valid) == list(range(len(prompts)))
    assert not {prompts[index] for index in train} & {prompts[index] for index in valid}
    # What was decided for a prompt stays when others come.
    more_train, _ = split_by_prompt([*prompts, "another"], valid_fraction, seed)
    assert [index for index in more_train if index < len(prompts)] == train


@given(
    prompts=st.lists(st.text("ab", max_size=3), min_size=1),
    valid_fraction=st.floats(0, 1),
    most=st.integers(1, 5),
)
def test_no_prompt_is_answered_twice_nor_trained_on_where_it_is_held_out(
    prompts: list[str], valid_fraction: float, most: int
) -> None:
    _, would_be = split_by_prompt(prompts, valid_fraction, 0)
    would_be_held_out = {prompts[index] for index in would_be}
    asked = [Prompt(text) for text in prompts]
    num_held_out = min(most, len(would_be_held_out))
    if num_held_out == len(set(prompts)):
        if valid_fraction == 1:
            with pytest.raises(UserError, match="holds out all prompts"):
                hold_out_prompts(asked, valid_fraction, 0, most=most)
        else:
            assert hold_out_prompts(asked, valid_fraction, 0, most=most) == (asked, [])
        return
    found = hold_out_prompts(asked, valid_fraction, 0, most=most)
    kept, held_out = ([prompt.text for prompt in part] for part in found)
    assert len(held_out) == len(set(held_out)) == num_held_out
    assert set(held_out) <= would_be_held_out
    assert kept == [prompt for prompt in prompts if prompt not in held_out]
    # The order of the file decides nothing of it.
    other_way = hold_out_prompts(asked[::-1], valid_fraction, 0, most=most)[1]
    assert {prompt.text for prompt in other_way} == set(held_out)


def test_the_fraction_is_about_right_and_the_seed_matters() -> None:
    prompts = [f"prompt {number}" for number in range(10_000)]
    _, valid = split_by_prompt(prompts, 0.1, 0)
    assert 900 < len(valid) < 1100
    assert split_by_prompt(prompts, 0.1, 1)[1] != valid
    assert split_by_prompt(prompts, 0.0, 0)[1] == []
    assert split_by_prompt(prompts, 1.0, 0)[0] == []


def test_held_out_records_are_the_others_and_some_must_be_left() -> None:
    records = [Demonstration(Prompt(f"prompt {n}"), Reply("")) for n in range(50)]
    kept, held_out = hold_out(records, 0.3, 0)
    train, valid = split_by_prompt([record.prompt.text for record in records], 0.3, 0)
    assert (kept, held_out) == ([records[n] for n in train], [records[n] for n in valid])
    assert kept and held_out
    with pytest.raises(UserError, match="^--data.valid-fraction 1.0 holds out all prompts"):
        hold_out(records, 1.0, 0)


def test_few_prompts_that_a_fraction_would_take_all_of_are_trained_on() -> None:
    records = [Demonstration(Prompt("the same"), Reply(str(n))) for n in range(9)]
    taken = next(seed for seed in range(99) if split_by_prompt(["the same"], 0.3, seed)[1])
    assert hold_out(records, 0.3, taken) == (records, [])


def test_real_prompts_are_read(data_pack: Path) -> None:
    prompts, report = read_prompts(data_pack / "mini" / "prompts.jsonl")
    assert report.num_read == len(prompts) == 200


@pytest.mark.parametrize("seed", range(20))
def test_prompts_that_whitespace_alone_tells_apart_are_on_one_side(seed: int) -> None:
    prompts = [Prompt(f"question {n}{end}") for n in range(40) for end in ("", "\n")]
    kept, out = hold_out([Demonstration(each, Reply("a")) for each in prompts], 0.2, seed)
    assert {each.prompt.key for each in kept}.isdisjoint(each.prompt.key for each in out)
    trained, held_out = hold_out_prompts(prompts, 0.2, seed, most=5)
    assert {each.key for each in trained}.isdisjoint(each.key for each in held_out)
    assert len(held_out) <= 5
    assert len(trained) == len(prompts) - 2 * len(held_out)
