import gzip
import json
from pathlib import Path
from typing import Any

import pytest

from engine.containers.row import BadRecord
from engine.data.comparisons import read_comparisons
from engine.data.demonstrations import read_demonstrations
from engine.data.prompts import read_prompts
from engine.errors import UserError
from engine.shapes.fields import Fields
from tests.engine.shapes.shape_samples import SAMPLES
from tests.tiny import write_lines

ALPACA = {"instruction": "a", "input": "", "output": "b"}


def records(purpose: Any, rows: list[Any], fields: str = "auto") -> list[Any]:
    return [
        found for _, found in Fields(purpose, fields)((f"f:{n}", r) for n, r in enumerate(rows, 1))
    ]


def test_the_first_row_decides_for_the_file() -> None:
    found = records("demonstrations", [ALPACA, {"prompt": "a", "response": "b"}, ALPACA])
    assert found[0] == found[2] == {"prompt": "a", "response": "b"}
    assert str(found[1]) == "is of the shape plain, in a file of Alpaca"
    found = records("demonstrations", [{"x": 1}, ALPACA])
    assert isinstance(found[0], BadRecord)  # it is no good one, and decides nothing
    assert found[1] == {"prompt": "a", "response": "b"}


def test_what_is_read_as_what_is_said(tmp_path: Path) -> None:
    path = write_lines(tmp_path / "a.jsonl", [ALPACA])
    _, report = read_demonstrations(path)
    assert str(report) == "1 records, read as alpaca: instruction, input, output"
    _, report = read_demonstrations(write_lines(path, [{"prompt": "a", "response": "b"}]))
    assert str(report) == "1 records"
    _, report = read_demonstrations(
        write_lines(path, [{"q": "a", "r": "b"}]), fields="prompt=q,response=r"
    )
    assert str(report) == "1 records, read as prompt=q, response=r"


def test_fields_are_named_by_paths() -> None:
    row = {"q": {"text": "a"}, "answers": [{"v": "b"}], "a.b": "c"}
    assert records("demonstrations", [row], "prompt=q.text,response=answers.0.v") == [
        {"prompt": "a", "response": "b"}
    ]
    assert records("prompts", [row], "prompt=a.b") == [{"prompt": "c"}]
    # What is ours by name stays, and nothing else comes along.
    row = {"question": "a", "completions": ["x", "y"], "ranks": [1, 2], "id": 5}
    assert records("comparisons", [row], "prompt=question") == [
        {"prompt": "a", "completions": ["x", "y"], "ranks": [1, 2]}
    ]


@pytest.mark.parametrize(
    ("fields", "said"),
    [
        ("prompt=q.t", 'field "q.t" is missing; there is q, answers'),
        ("prompt=answers.1", 'field "answers.1" is missing'),
        ("prompt=q,response=none", 'field "none" is missing; there is q, answers'),
    ],
)
def test_a_path_that_leads_nowhere_is_a_bad_row(fields: str, said: str) -> None:
    (found,) = records("demonstrations", [{"q": {"text": "a"}, "answers": ["b"]}], fields)
    assert said in str(found)


@pytest.mark.parametrize(
    ("fields", "said"),
    [
        ("alpacca", "--data.fields alpacca: no such shape; perhaps alpaca"),
        ("zzz", "--data.fields zzz: no such shape; there are auto, plain, alpaca"),
        ("prompt=", "--data.fields prompt=: 'prompt=' names none; it is OURS=THEIRS,..."),
        ("promt=q", "--data.fields promt=q: 'promt' is no field of ours; it is OURS=THEIRS"),
        ("prompt=a,prompt=b", "--data.fields prompt=a,prompt=b: prompt is named twice"),
        ("prompt=a,response", "'response' names none"),
    ],
)
def test_a_choice_that_is_none_is_refused_with_those_there_are(fields: str, said: str) -> None:
    with pytest.raises(UserError) as error:
        Fields("prompts", fields)
    assert said in str(error.value)


def test_unknown_and_ambiguous_rows_say_what_to_type() -> None:
    (found,) = records("demonstrations", [{"question": "a", "options": [], "correct": 1}])
    assert str(found) == (
        'field "prompt" is missing; there is question, options, correct; a known shape that is '
        "near: question-answer (question, answer), openorca (question, response), "
        "truthfulqa-choices (question, mc1_targets); name the fields by --data.fields "
        "prompt=...,response=..."
    )
    (found,) = records("demonstrations", [{"Prompt": "a", " response": "b", "id": 1}])
    assert str(found) == (
        'field "prompt" is missing; there is Prompt,  response, id; names are told apart by their '
        "capitals and blanks; name the fields by --data.fields prompt=Prompt,response= response"
    )
    (found,) = records("prompts", [{**ALPACA, "question": "a", "answer": "b"}])
    assert str(found) == (
        "may be of alpaca or question-answer; name one: --data.fields alpaca, or the fields: "
        "--data.fields prompt=..."
    )
    named = records("prompts", [{**ALPACA, "question": "c", "answer": "b"}], "question-answer")
    assert named == [{"prompt": "c"}]


def test_a_file_without_anything_for_the_purpose_is_an_error_at_once(tmp_path: Path) -> None:
    path = write_lines(tmp_path / "a.jsonl", [ALPACA] * 3)
    with pytest.raises(UserError) as error:
        read_comparisons(path, skip_bad_lines=True)
    assert str(error.value) == (
        f"{path}:1: a file of Alpaca (alpaca) has no answers of one prompt that are ranked; it has "
        "demonstrations, which recipes/sft_*.py --data.train reads; and prompts, which "
        "recipes/ppo_*.py --data.prompts reads"
    )


def test_only_ties_are_no_record_and_no_bad_line(tmp_path: Path) -> None:
    webgpt = next(sample for sample in SAMPLES if sample.shape == "webgpt")
    path = write_lines(tmp_path / "a.jsonl", [webgpt.rows[1]] * 3)
    with pytest.raises(UserError, match="nothing of it is a record; left out: 3 ties"):
        read_comparisons(path)


def test_text_is_its_own_field_or_content_or_what_is_named() -> None:
    assert records("text", [{"text": "a", "prompt": "b"}]) == [{"text": "a", "prompt": "b"}]
    assert records("text", [{"content": "a"}]) == [{"text": "a"}]
    assert records("text", [{"body": "a"}], "prompt=q,text=body") == [{"text": "a"}]
    (found,) = records("text", [{"body": "a"}], "prompt=q")  # which is the demonstrations'
    assert str(found) == (
        'field "text" is missing; there is body; name it by --data.fields text=...'
    )
    (found,) = records("text", [{"role": "user", "content": "a"}])
    assert isinstance(found, BadRecord)
    assert records("demonstrations", [ALPACA], "text=body") == [{"prompt": "a", "response": "b"}]


def lines_of(path: Path) -> list[Any]:
    """Return a real file's objects, of JSON lines or of one array."""
    content = path.read_bytes()
    text = (gzip.decompress(content) if path.suffix == ".gz" else content).decode()
    if text.startswith("["):
        return json.loads(text)
    return [json.loads(line) for line in text.splitlines() if line]


REAL = {
    "eval/llmbar/*.json": ("llmbar", {"comparisons": 419, "prompts": 419}),
    "eval/pandalm/testset-v1.json": ("pandalm", {"comparisons": 836, "prompts": 993}),
    "eval/truthfulqa/mc_task.json": ("truthfulqa-choices", {"comparisons": 817, "prompts": 817}),
    "eval/prompts/*_bench_question.jsonl": ("turns", {"prompts": 160}),
    "eval/prompts/user_oriented_instructions.jsonl": (
        "self-instruct",
        {"demonstrations": 252, "prompts": 252},
    ),
    "eval/prompts/koala_test_set.jsonl": ("plain", {"prompts": 180}),
    "eval/gsm8k/test.jsonl": ("question-answer", {"demonstrations": 1319, "prompts": 1319}),
    "eval/humaneval/HumanEval.jsonl.gz": ("plain", {"prompts": 164}),
    "eval/lambada/lambada_test.jsonl": ("plain", {"text": 5153}),
    "eval/rtp_100_prompts.jsonl": ("plain", {"prompts": 100}),
    "eval/pandalm/kway_human.jsonl": ("plain", {"comparisons": 87, "prompts": 87}),
    "eval/e2e_heldout.jsonl": ("plain", {"prompts": 238}),
}


@pytest.mark.parametrize("pattern", REAL)
def test_real_files_are_read(pattern: str, data_pack: Path) -> None:
    shape, expected = REAL[pattern]
    for purpose, number in expected.items():
        num_found = 0
        for path in sorted(data_pack.glob(pattern)):
            shaping = Fields(purpose)  # type: ignore[arg-type]
            found = [row for _, row in shaping((str(path), row) for row in lines_of(path))]
            bad = [str(row) for row in found if isinstance(row, BadRecord)]
            assert len(bad) == (
                6 if shape == "pandalm" else 0
            )  # which has booleans among its answers
            assert (shaping.read_as.partition(":")[0] or "plain") == shape
            num_found += len(found) - len(bad)
        assert num_found == number


def test_the_pack_itself_is_read_as_it_was(data_pack: Path) -> None:
    """Our own fields go through unchanged, but for a prompt, which is all that is asked."""
    for name in ("sft", "comparisons", "prompts", "pairs"):
        purpose: Any = {"sft": "demonstrations", "pairs": "comparisons"}.get(name, name)
        for path in sorted((data_pack / name).glob("*.val.jsonl.gz")):
            rows = lines_of(path)
            assert records(purpose, rows) == rows
            assert len(read_prompts(path)[0]) == len(rows)


def test_a_command_without_the_option_does_not_name_it() -> None:
    said = [str(each) for _, each in Fields("demonstrations", option="")([("f:1", {"a": "b"})])]
    assert said == ['field "prompt" is missing; there is a']
    assert "--" not in said[0]


@pytest.mark.parametrize(
    ("purpose", "row", "said"),
    [
        (
            "demonstrations",
            {"prompt": "a", "chosen": "b", "rejected": "c"},
            "has no answer to imitate; there is prompt, chosen, rejected: comparisons, which "
            "recipes/rm_*.py --data.train reads; or name the fields by --data.fields "
            "prompt=...,response=...",
        ),
        (
            "comparisons",
            {"messages": []},
            "has no answers of one prompt that are ranked; there is messages: demonstrations, ",
        ),
        (
            "prompts",
            {"text": "a"},
            "has no prompts; there is text: pretraining text, which --dat",
        ),
        ("text", {"prompt": "a"}, "has no text; there is prompt: prompts, which recipes/ppo_*.py"),
        ("text", ALPACA, "has no text; there is instruction, input, output: demonstrations, "),
    ],
)
def test_a_row_for_another_stage_says_which(
    purpose: Any, row: Any, said: str, tmp_path: Path
) -> None:
    (found,) = records(purpose, [row])
    assert str(found).startswith(said)
    assert found.says_remedy


def test_a_row_that_lacks_a_field_among_good_ones_is_for_no_other_stage() -> None:
    good = {"prompt": "a", "response": "b"}
    first, _, last = records("demonstrations", [{"prompt": "a"}, good, {"prompt": "a"}])
    assert "which recipes/ppo_*.py --data.prompts reads" in str(first)
    assert str(last).startswith('field "response" is missing; there is prompt; name the fields by')
    assert not last.says_remedy
    first, _, last = records("text", [good, {"text": "a"}, good])
    assert "which recipes/sft_*.py" in str(first)
    assert str(last).startswith('field "text" is missing')
