import json
from pathlib import Path

import pytest

from engine.data.comparisons import Comparison, comparison_examples, read_comparisons
from engine.data.prompt_format import Prompt, Reply
from engine.data.tokenizer import Tokenizer
from engine.errors import UserError

USER = {"role": "user", "content": "Why?"}
GOOD = {"role": "assistant", "content": "Because."}
BAD = {"role": "assistant", "content": "No."}
CHAT = "User: Why?\n\nAssistant:"
HH = "\n\nHuman: Why?\n\nAssistant: Hm.\n\nHuman: Well?\n\nAssistant:"


def comparison(prompt: str, completions: list[str], ranks: list[int]) -> Comparison:
    return Comparison(Prompt(prompt), [Reply(text) for text in completions], ranks)


def read_one(tmp_path: Path, record: object) -> Comparison:
    path = tmp_path / "rm.jsonl"
    path.write_text('{"prompt": "a", "chosen": "b", "rejected": "c"}\n' + json.dumps(record))
    return read_comparisons(path)[0][1]


def test_rankings_with_ties_are_read(tmp_path: Path) -> None:
    record = {"prompt": "a", "completions": ["b", "c", "d"], "ranks": [2, 1, 2]}
    assert read_one(tmp_path, record) == Comparison(
        Prompt("a", "\n"), [Reply("b"), Reply("c"), Reply("d")], [2, 1, 2]
    )


def test_only_the_order_of_ranks_is_kept(tmp_path: Path) -> None:
    record = {"prompt": "a", "completions": ["b", "c", "d"], "ranks": [10**30, 0, 7.0]}
    assert read_one(tmp_path, record).ranks == [3, 1, 2]


@pytest.mark.parametrize(
    ("record", "expected"),
    [
        ({"prompt": "a", "chosen": "b", "rejected": "c"}, ("a", "b", "c")),
        ({"prompt": [USER], "chosen": [GOOD], "rejected": [BAD]}, (CHAT, " Because.", " No.")),
        ({"prompt": [USER], "chosen": "Because.", "rejected": "No."}, (CHAT, " Because.", " No.")),
        (
            {"messages": [USER], "chosen": "Because.", "rejected": "No."},
            (CHAT, " Because.", " No."),
        ),
        ({"chosen": [USER, GOOD], "rejected": [USER, BAD]}, (CHAT, " Because.", " No.")),
        (
            {"prompt": "Why?", "chosen": [USER, GOOD], "rejected": [USER, BAD]},
            (CHAT, " Because.", " No."),
        ),
        ({"chosen": HH + " Yes", "rejected": HH + " No"}, (HH, " Yes", " No")),
        (
            {"chosen": "The sky is blue.", "rejected": "The sky is black."},
            ("The sky is", " blue.", " black."),
        ),
        ({"chosen": "Sky?\nblue", "rejected": "Sky?\nblack"}, ("Sky?\n", "blue", "black")),
        ({"prompt": HH, "chosen": HH + " Yes", "rejected": HH + " No"}, (HH, " Yes", " No")),
    ],
)
def test_pairs_are_comparisons_of_two(
    tmp_path: Path, record: object, expected: tuple[str, str, str]
) -> None:
    found = read_one(tmp_path, record)
    assert (found.prompt.text, *(each.text for each in found.completions)) == expected
    assert found.ranks == [1, 2]
    # A suffix closes what stands alone; what is open, or was cut out of two texts, goes on.
    assert found.prompt.suffix == ("\n" if expected[0] == "a" else "")


@pytest.mark.parametrize(
    ("change", "problem"),
    [
        ({"ranks": [1, 2]}, 'field "ranks" has 2 ranks for 3 completions'),
        ({"ranks": [1, 1, 1]}, 'field "ranks" is 1 for all 3: all ties'),
        ({"ranks": [1, 2, float("nan")]}, r'field "ranks\[2\]" must be a whole number .* nan'),
        ({"ranks": [1, 2, float("inf")]}, r'field "ranks\[2\]" must be a whole number .* inf'),
        ({"ranks": [1, -2, 2]}, r'field "ranks\[1\]" must be a whole number .* -2'),
        ({"ranks": [1, 1.5, 2]}, r'field "ranks\[1\]" must be a whole number .* 1.5'),
        ({"ranks": [1, True, 2]}, r'field "ranks\[1\]" must be a whole number .* True'),
        ({"ranks": [1, "b", 2]}, r'field "ranks\[1\]" must be a whole number .* \'b\''),
        ({"ranks": "123"}, 'field "ranks" must be a list, not a string'),
        ({"completions": "bcd"}, 'field "completions" must be a list, not a string'),
        ({"completions": ["b"], "ranks": [1]}, 'field "completions" needs at least 2'),
        ({"completions": ["b", "", "d"]}, r'field "completions\[1\]" is empty'),
        ({"completions": ["b", None, "d"]}, r'field "completions\[1\]" must be a text'),
        ({"prompt": ""}, 'field "prompt" is empty'),
    ],
)
def test_a_bad_ranking_is_named(tmp_path: Path, change: dict, problem: str) -> None:
    record = {"prompt": "a", "completions": ["b", "c", "d"], "ranks": [1, 2, 2]}
    with pytest.raises(UserError, match=rf"rm\.jsonl:2: {problem}"):
        read_one(tmp_path, record | change)


@pytest.mark.parametrize(
    ("record", "problem"),
    [
        ({"prompt": "a", "completions": ["b", "c"]}, 'field "ranks" is missing'),
        ({"prompt": "a", "ranks": [1, 2]}, 'field "completions" is missing'),
        ({"prompt": "a", "chosen": "b"}, 'field "rejected" is missing'),
        ({"prompt": "a", "chosen": "b", "rejected": "b"}, 'field "rejected" is the same text'),
        ({"prompt": "a", "chosen": "b", "rejected": ""}, 'field "rejected" is empty'),
        ({"chosen": "Yes", "rejected": "No"}, 'field "prompt" is missing'),
        ({"chosen": "a b", "rejected": 3}, 'field "rejected" must be a string'),
        ({"chosen": HH + " Yes", "rejected": "X" + HH + " No"}, 'field "rejected" must equal'),
        ({"chosen": HH + " Yes", "rejected": HH + " No" + HH + "x"}, 'field "rejected" must equal'),
        ({"chosen": [USER, GOOD], "rejected": [BAD]}, 'field "rejected" must equal chosen up to'),
        (
            {"prompt": "Else?", "chosen": [USER, GOOD], "rejected": [USER, BAD]},
            'field "prompt" is not in the dialogue',
        ),
    ],
)
def test_a_bad_pair_is_named(tmp_path: Path, record: object, problem: str) -> None:
    with pytest.raises(UserError, match=rf"rm\.jsonl:2: {problem}"):
        read_one(tmp_path, record)


def test_a_comparison_becomes_sequences_of_one_prompt(tokenizer: Tokenizer) -> None:
    ranked = comparison("The Mill", [" is a pub", " is cheap"], [2, 1])
    [unit], _ = comparison_examples([ranked], tokenizer, max_length=64)
    prompt = tokenizer.encode("The Mill")
    for example, completion, rank in zip(unit, ranked.completions, [2, 1], strict=True):
        assert list(example.tokens) == [
            *prompt,
            *tokenizer.encode(completion.text),
            tokenizer.eos_id,
        ]
        assert example.prompt_length == len(prompt)
        assert example.fields == {"ranks": rank}


def test_a_comparison_with_one_long_completion_is_dropped_whole(tokenizer: Tokenizer) -> None:
    comparisons = [
        comparison("The Mill", ["pub " * 50, "pub"], [1, 2]),
        comparison("The Mill", ["cheap", "pub"], [1, 2]),
    ]
    units, report = comparison_examples(comparisons, tokenizer, max_length=50)
    assert report.kept == [1]
    assert report.num_long_sequences == 1
    assert len(units[0]) == 2


def test_real_comparisons_are_read_as_they_are(data_pack: Path) -> None:
    comparisons, report = read_comparisons(data_pack / "mini" / "comparisons.jsonl")
    assert report.num_read == 180
    lines = (data_pack / "mini" / "comparisons.jsonl").read_text().splitlines()
    for each, line in zip(comparisons, lines, strict=True):
        record = json.loads(line)
        assert each.prompt == Prompt(record["prompt"], "\n")
        assert [completion.text for completion in each.completions] == record["completions"]
        assert each.ranks == record["ranks"]


def test_real_pairs_are_read(data_pack: Path) -> None:
    comparisons, report = read_comparisons(data_pack / "pairs" / "hh_harmless.val.jsonl.gz")
    assert report.num_read == 236
    assert all(comparison.ranks == [1, 2] for comparison in comparisons)


def test_a_ranking_of_equal_texts_says_nothing(tmp_path: Path):
    path = tmp_path / "c.jsonl"
    path.write_text('{"prompt": "a", "completions": ["x", "x", "x"], "ranks": [1, 2, 3]}\n')
    with pytest.raises(
        UserError, match='c.jsonl:1: field "completions" has the same text each time'
    ):
        read_comparisons(path)
