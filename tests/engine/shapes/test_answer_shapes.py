import pytest

from engine.containers.row import BadRecord
from engine.shapes.answer_shapes import (
    alpaca,
    helpsteer_prompt,
    openorca,
    prompt_completion,
    self_instruct,
    together,
    truthfulqa,
    turns,
)
from engine.shapes.canonical import LeftOut
from tests.engine.shapes.shape_samples import asked


def test_a_system_message_makes_a_dialogue_of_all_rows() -> None:
    row = {"instruction": "a", "output": "b"}
    assert alpaca(row) == {"prompt": "a", "response": "b"}
    assert alpaca({**row, "system": ""}) == {"prompt": asked("a"), "response": "b"}
    with pytest.raises(BadRecord, match=r'"history\[0\]" must be a pair'):
        alpaca({**row, "history": [["a"]]})
    with pytest.raises(BadRecord, match='"system_prompt" must be a string, not a list'):
        openorca({"question": "a", "response": "b", "system_prompt": []})


@pytest.mark.parametrize("labels", [(True, False), ("True", "false"), (" 1", "0"), (1.0, 0)])
def test_a_label_is_true_or_false(labels: tuple[object, object]) -> None:
    found = [prompt_completion({"prompt": "a", "completion": "b", "label": x}) for x in labels]
    assert ["unfit" in each for each in found] == [False, True]
    with pytest.raises(BadRecord, match="\"label\" must be true or false, not 'good'"):
        prompt_completion({"prompt": "a", "completion": "b", "label": "good"})


def test_rows_of_equal_prompts_come_together_where_the_first_was() -> None:
    rows = [(f"f:{n}", {"prompt": prompt}) for n, prompt in enumerate("abab", 1)]
    assert together(rows) == [
        ("f:1", {"prompt": "a", "rows": [{"prompt": "a"}] * 2}),
        ("f:2", {"prompt": "b", "rows": [{"prompt": "b"}] * 2}),
    ]
    broken = [("f:1", {"prompt": 5}), ("f:2", {"prompt": 5})]
    assert [where for where, _ in together(broken)] == ["f:1", "f:2"]


def test_a_turn_of_helpsteers_prompt_has_a_known_speaker() -> None:
    assert helpsteer_prompt({"prompt": "a\n<extra_id_1>Assistant\nb\n<extra_id_1>User\nc"}) == (
        asked("a", "b", "c")
    )
    with pytest.raises(BadRecord, match="has a turn of 'Judge'"):
        helpsteer_prompt({"prompt": "a\n<extra_id_1>Judge\nb"})


def test_right_answers_that_are_also_wrong_are_right() -> None:
    row = {
        "Question": "q",
        "Best Answer": "a",
        "Correct Answers": "a; b; a",
        "Incorrect Answers": "b; c",
    }
    assert truthfulqa(row, "comparisons") == [
        {"prompt": "q", "completions": ["a", "b", "c"], "ranks": [1, 1, 2]}
    ]
    alone = {**row, "Incorrect Answers": "a"}
    assert truthfulqa(alone, "comparisons") == [LeftOut("ties")]


def test_a_field_that_is_wrong_is_named_with_its_path() -> None:
    with pytest.raises(BadRecord, match=r'"turns\[0\]" is empty'):
        turns({"turns": [""]})
    with pytest.raises(BadRecord, match=r'"instances\[0\].output" is missing'):
        self_instruct({"instruction": "a", "instances": [{"input": ""}]}, "demonstrations")
