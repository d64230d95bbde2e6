import numpy as np
import pytest

from engine.answers.kept import Answers, Origin, digest_of_prompts
from engine.errors import UserError
from engine.ranks.start import start_parallel
from engine.settings.layout import ParallelLayout
from engine.settings.sampling import SamplingConfig

ORIGIN = Origin(
    weights="w", prompts="p", num_samples=1, sampling=SamplingConfig(), dtype="fp32", seed=1
)


def test_an_answer_is_in_a_file_before_the_next_is_drawn(tmp_path):
    answers = Answers(tmp_path / "out.jsonl", ORIGIN, start_parallel(ParallelLayout(), seed=0))
    for number in (1, 0):
        answers.add(number, {"response": f"ö {number}"})
        lines = (tmp_path / "out.jsonl.partial" / "0.jsonl").read_text().splitlines()
        assert lines[-1] == f'{{"number": {number}, "response": "ö {number}"}}'
    answers.finish(2)
    assert (tmp_path / "out.jsonl").read_text() == '{"response": "ö 0"}\n{"response": "ö 1"}\n'
    assert [path.name for path in tmp_path.iterdir()] == ["out.jsonl"]


def test_a_folder_that_lacks_answers_becomes_no_file(tmp_path):
    answers = Answers(tmp_path / "out.jsonl", ORIGIN, start_parallel(ParallelLayout(), seed=0))
    answers.add(0, {"response": ""})
    with pytest.raises(UserError, match="1 answers of 2"):
        answers.finish(2)
    assert not (tmp_path / "out.jsonl").exists()


def test_prompts_are_told_apart_by_where_they_end():
    digests = {
        digest_of_prompts([np.array(tokens) for tokens in prompts], fingerprint)
        for prompts in ([[1, 2], [3]], [[1], [2, 3]], [[1, 2, 3]])
        for fingerprint in ("a", "b")
    }
    assert len(digests) == 6
