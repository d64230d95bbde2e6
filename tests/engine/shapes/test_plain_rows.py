import pytest

from engine.containers.row import BadRecord
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


@pytest.mark.parametrize(
    ("scores", "ranks", "said"),
    [
        ([1, 2], [1, 2], NEITHER),
        ([1, 2], [2, "1"], NEITHER),
        ([1, 2], [2], NEITHER),
        ([1, 1], None, r"is 1 for all 2: all ties say nothing"),
        ([1], None, "has 1 scores for 2 completions"),
        ([1, float("nan")], None, r'"scores\[1\]" must be a number, not nan'),
        ([1, True], None, r'"scores\[1\]" must be a number, not True'),
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
