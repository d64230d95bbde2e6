"""Every public format in its exact form: which shape it is, and what each purpose has of it."""

import json
from pathlib import Path
from typing import Any

import pytest

from engine.containers.row import BadRecord
from engine.data.comparisons import read_comparisons
from engine.data.demonstrations import read_demonstrations
from engine.data.pairs import asked_in
from engine.data.prompts import read_prompts
from engine.errors import UserError
from engine.shapes.canonical import PURPOSES, Purpose
from engine.shapes.fields import Fields
from engine.shapes.shapes import SHAPES, recognised
from tests.engine.shapes.format_table import BEGIN, END, PAGE, table
from tests.engine.shapes.shape_samples import SAMPLES, Sample

READERS: dict[str, Any] = {
    "demonstrations": read_demonstrations,
    "comparisons": read_comparisons,
    "prompts": read_prompts,
}


def records_of(sample: Sample, purpose: Purpose) -> tuple[Any, Fields]:
    """Return the canonical records of a sample's rows, or the first error as text."""
    shaping = Fields(purpose, sample.fields)
    try:
        found = [record for _, record in shaping(sample.as_read())]
    except UserError as error:
        return str(error), shaping
    errors = [str(each) for each in found if isinstance(each, BadRecord)]
    return errors[0] if errors else found, shaping


@pytest.mark.parametrize("purpose", PURPOSES)
@pytest.mark.parametrize("sample", SAMPLES, ids=lambda sample: sample.format)
def test_rows_are_the_records_of_a_purpose(sample: Sample, purpose: Purpose) -> None:
    found, shaping = records_of(sample, purpose)
    expected = getattr(sample, purpose)
    if isinstance(expected, str):
        assert isinstance(found, str)
        assert expected in found
        return
    if purpose == "prompts" and sample.shape == "plain":  # which leave that to pairs.asked_in
        asked = [asked_in(record) for record in found]
        found = [{"prompt": each.text or list(each.messages)} for each in asked]
        expected = [{"prompt": e.get("prompt", e.get("messages"))} for e in expected]
    elif purpose == "text" or sample.shape == "plain":  # which leave what else a row has
        found = [{k: record[k] for k in e} for record, e in zip(found, expected, strict=True)]
    assert found == expected
    assert dict(shaping.left_out) == sample.left_out.get(purpose, {})


@pytest.mark.parametrize("purpose", READERS)
@pytest.mark.parametrize("sample", SAMPLES, ids=lambda sample: sample.format)
def test_a_file_of_them_is_read_or_refused(sample: Sample, purpose: str, tmp_path: Path) -> None:
    path = tmp_path / "rows.jsonl"
    path.write_text("".join(json.dumps(row) + "\n" for row in sample.rows))
    expected = getattr(sample, purpose)
    if isinstance(expected, str):
        with pytest.raises(UserError) as error:
            READERS[purpose](path, fields=sample.fields)
        assert expected in str(error.value)
        assert str(error.value).startswith(f"{path}:1: ")
        return
    records, report = READERS[purpose](path, fields=sample.fields)
    assert len(records) == report.num_read == len(expected)
    assert report.left_out == sample.left_out.get(purpose, {})
    assert report.read_as.partition(":")[0] == ("" if sample.shape == "plain" else sample.shape)


@pytest.mark.parametrize("sample", SAMPLES, ids=lambda sample: sample.format)
def test_one_row_has_one_prompt_for_all_purposes(sample: Sample) -> None:
    """What SFT and the reward model read before an answer is what PPO and generate answer."""
    if isinstance(sample.prompts, str) or sample.shape == "plain":
        return  # of our own fields the readers take the prompt, as test_prompts has it
    prompts = [json.dumps(record["prompt"]) for record in sample.prompts]
    for purpose in ("demonstrations", "comparisons"):
        records = getattr(sample, purpose)
        if sample.shape.startswith("oasst") and purpose == "demonstrations":
            continue  # whose prompts are all, not those of the best dialogue alone
        for record in records if isinstance(records, list) else []:
            prompt = record.get("prompt", record.get("messages", [])[:-1])
            assert json.dumps(prompt) in prompts


@pytest.mark.parametrize("sample", SAMPLES, ids=lambda sample: sample.format)
def test_every_row_of_a_file_is_of_one_shape(sample: Sample) -> None:
    for row in sample.rows:
        present = {key: value for key, value in row.items() if value is not None}
        expected = "plain" if sample.fields != "auto" else sample.shape
        assert recognised(present) == ([expected] if expected else [])


def test_every_shape_has_a_sample_and_names_what_it_has() -> None:
    assert {sample.shape for sample in SAMPLES} - {""} == set(SHAPES)
    for name, shape in SHAPES.items():
        samples = [sample for sample in SAMPLES if sample.shape == name]
        for purpose in READERS:
            has = any(isinstance(getattr(sample, purpose), list) for sample in samples)
            assert has == (purpose in shape.has), (name, purpose)


def test_the_table_in_the_documents_is_what_the_readers_do() -> None:
    text = PAGE.read_text()
    assert text.partition(BEGIN)[2].partition(END)[0] == f"\n{table()}\n", "run make formats"
