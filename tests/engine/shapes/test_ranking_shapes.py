from typing import Any

import pytest

from engine.containers.row import BadRecord
from engine.shapes.ranking_shapes import (
    arena_kaggle,
    pandalm,
    shp,
    summaries,
    truthfulqa_choices,
    ultrafeedback,
    webgpt,
)
from tests.engine.shapes.shape_samples import COMPARISONS


def row_of(format_: str) -> dict[str, Any]:
    """Return a copy of a sample's first row, without its nulls."""
    return next(each for each in COMPARISONS if each.format == format_).as_read()[0][1]


def test_ratings_decide_and_not_the_number_that_is_known_to_be_wrong() -> None:
    row = row_of("UltraFeedback")
    assert ultrafeedback(row)["scores"] == [1.0, 5.0, 5.0]  # overall_score: 10, 8.5, 8
    row["completions"][0]["annotations"]["honesty"]["Rating"] = "N/A"
    assert ultrafeedback(row)["scores"] == [10, 8.5, 8]


@pytest.mark.parametrize(
    ("votes", "scores"), [((1, 1, 2), [1, -1]), ((0, 0, 2), [0, 0]), ((1, 2), [0, 0])]
)
def test_most_annotators_decide(votes: tuple[int, ...], scores: list[int]) -> None:
    row = {"instruction": "a", "input": "", "response1": "x", "response2": "y"}
    annotators = {f"annotator{n}": vote for n, vote in enumerate(votes, 1)}
    assert pandalm(row | annotators)["scores"] == scores


def test_a_choice_that_is_none_is_bad() -> None:
    row = row_of("summarize-from-feedback: comparisons of posts")
    with pytest.raises(BadRecord, match='"choice" must be one of 0, 1, not 2'):
        summaries({**row, "choice": 2})
    with pytest.raises(BadRecord, match='"summaries" must hold 2, not 1'):
        summaries({**row, "summaries": row["summaries"][:1]})
    del row["info"]["post"]
    with pytest.raises(BadRecord, match='"info.post" is missing'):
        summaries(row)


def test_a_field_that_is_wrong_is_named_with_its_path() -> None:
    row = row_of("WebGPT comparisons")
    row["question"]["full_text"] = ""
    with pytest.raises(BadRecord, match='"question.full_text" is empty'):
        webgpt(row)
    kaggle = row_of("Chatbot Arena, Kaggle's")
    with pytest.raises(BadRecord, match='"prompt" must be a list of texts in JSON'):
        arena_kaggle({**kaggle, "prompt": "What?"}, "prompts")


def test_choices_without_labels_are_an_error() -> None:
    row = {"question": "a", "mc1_targets": {"choices": ["b", "c", "d"], "labels": [0, 1]}}
    with pytest.raises(BadRecord, match='"mc1_targets" has 2 labels for 3 choices'):
        truthfulqa_choices(row)


def test_choices_are_read_as_tables_have_them() -> None:
    row = {"history": "a", "human_ref_A": "b", "human_ref_B": "c"}
    for label in (1, "1", "1.0", 1.0):
        assert shp({**row, "labels": label})["scores"] == [1, -1]
