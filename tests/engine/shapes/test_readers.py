from typing import Any

import pytest

from engine.shapes.canonical import PURPOSES
from engine.shapes.readers import READERS, purposes_of, read_by
from tests.engine.shapes.shape_samples import SAMPLES


@pytest.mark.parametrize(
    ("row", "purposes"),
    [
        ({"prompt": "a", "response": "b"}, ["demonstrations"]),
        ({"messages": []}, ["demonstrations"]),
        ({"chosen": "a", "rejected": "b"}, ["comparisons"]),
        ({"prompt": "a", "completions": [], "scores": []}, ["comparisons"]),
        ({"prompt": "a", "id": 1}, ["prompts"]),
        ({"text": "a"}, ["text"]),
        ({"content": "a"}, ["text"]),
        ({"instruction": "a", "output": "b"}, ["demonstrations", "prompts"]),
        ({"text": 1, "a": "b"}, []),
        ({"prompt": "a", "ranks": [1, 2]}, []),
    ],
)
def test_a_row_is_for_what_its_fields_are_made_for(row: dict[str, Any], purposes: list[str]):
    assert purposes_of(row) == purposes


def test_every_sample_is_read_by_a_stage():
    for sample in SAMPLES:
        assert purposes_of({k: v for k, v in sample.rows[0].items() if v is not None}), (
            sample.format
        )


def test_what_reads_it_is_said_by_its_option():
    assert READERS.keys() == set(PURPOSES)
    assert (
        read_by(["text"], with_options=True) == "pretraining text, which --data.pretraining reads"
    )
    assert read_by(["comparisons", "prompts"], with_options=False) == "comparisons, prompts"
