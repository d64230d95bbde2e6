from typing import Any

import pytest

from engine.containers.row import BadRecord
from engine.shapes.canonical import LeftOut
from engine.shapes.fields import Fields
from engine.shapes.plain_rows import claimed_by_plain, plain
from tests.engine.shapes.shape_samples import asked

NEITHER = "says another order than ranks do"


def test_our_own_fields_are_known() -> None:
    assert claimed_by_plain({"prompt": "a", "response": "b", "id": 1}) == {"prompt", "response"}
    assert claimed_by_plain({"chosen": "a", "rejected": "b"}) == {"chosen", "rejected"}
    assert claimed_by_plain({"prompt": {"text": "a"}}) == set()
    assert claimed_by_plain({"text": "a"}) == set()


def test_scores_are_ranks_the_highest_first() -> None:
    row = {"prompt": "a", "completions": ["x", "y", "z"], "scores": [-1, 2.5, 2.5]}
    (found,) = plain(row, "comparisons")
    assert found == {"prompt": "a", "completions": ["x", "y", "z"], "ranks": [2, 1, 1]}
    agreeing = {**row, "ranks": [7, 3, 3]}
    assert plain(agreeing, "comparisons") == [found]
    # As tables have numbers.
    assert plain({**row, "scores": ["-1", "2.5", 2.5]}, "comparisons") == [found]
    ranks = {"prompt": "a", "completions": ["x", "y", "z"], "ranks": ["2", "1.0", 1]}
    assert plain(ranks, "comparisons") == [found]


@pytest.mark.parametrize(
    ("scores", "ranks", "said"),
    [
        ([1, 2], [1, 2], NEITHER),
        ([1, 2], ["1", "2"], NEITHER),
        ([1, 2], [2], NEITHER),
        ([1, 1], None, r"is 1 for all 2: all ties say nothing"),
        ([1], None, "has 1 scores for 2 completions"),
        ([1, float("nan")], None, r'"scores\[1\]" must be finite, not nan'),
        ([1, True], None, r'"scores\[1\]" must be a number, not a boolean'),
        ([1, "good"], None, r'"scores\[1\]" must be a number, not \'good\''),
        ("12", None, '"scores" must be a list, not a string'),
    ],
)
def test_scores_that_say_nothing_or_something_else_are_bad(
    scores: object, ranks: object, said: str
) -> None:
    row = {"prompt": "a", "completions": ["x", "y"], "scores": scores}
    with pytest.raises(BadRecord, match=said):
        plain(row if ranks is None else {**row, "ranks": ranks}, "comparisons")


def test_parts_of_contents_are_joined_in_every_field() -> None:
    parts = [{"role": "assistant", "content": [{"type": "text", "text": "b"}]}]
    row = {"prompt": asked("a"), "completions": [parts, "c"], "ranks": [1, 2]}
    (found,) = plain(row, "comparisons")
    assert isinstance(found, dict)
    assert found["completions"] == [[{"role": "assistant", "content": "b"}], "c"]


@pytest.mark.parametrize("label", [False, "False", 0, "0.0"])
@pytest.mark.parametrize("row", [{"prompt": "a", "response": "b"}, {"messages": asked("a", "b")}])
def test_an_answer_that_is_labelled_false_is_not_imitated(row: Any, label: object) -> None:
    left_out = [LeftOut("completions labelled false")]
    assert plain({**row, "label": label}, "demonstrations") == left_out
    assert plain({**row, "label": label}, "prompts") == [{**row, "label": label}]
    for fine in (True, "sports", 3):
        assert plain({**row, "label": fine}, "demonstrations") == [{**row, "label": fine}]


def test_a_label_counts_as_well_where_fields_are_named() -> None:
    row = {"prompt": "a", "completion": "c", "label": "False"}
    for fields in ("auto", "completion", "prompt=prompt,response=completion"):
        shaping = Fields("demonstrations", fields)
        assert list(shaping([("f:1", row)])) == []
        assert dict(shaping.left_out) == {"completions labelled false": 1}


def test_a_pair_beside_a_ranking_is_ambiguous() -> None:
    pair = {"prompt": "a", "chosen": "z", "rejected": "y"}
    row = {**pair, "completions": ["x", "y", "z"], "scores": [3, 2, 1]}
    with pytest.raises(
        BadRecord, match=r"a pair and a ranking \(chosen, rejected, completions, sc"
    ):
        plain(row, "comparisons")
    assert plain(row, "prompts") == [row]
    for named in ({"chosen": "z", "rejected": "y"}, {"completions": ["x", "y", "z"]}):
        fields = "prompt=prompt," + ",".join(f"{key}={key}" for key in named)
        ((_, found),) = Fields("comparisons", fields)([("f:1", row)])
        ranks = {"ranks": [1, 2, 3]} if "completions" in named else {}
        assert found == {"prompt": "a", **named, **ranks}
