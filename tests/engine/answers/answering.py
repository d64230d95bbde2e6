"""A file of prompts to answer, and runs that are killed on the way."""

import functools
import json

import pytest

from engine.generation.generate import generate
from engine.settings.generate import GenerateConfig
from engine.settings.sampling import SamplingConfig
from tests.tiny import write_lines

SAMPLING = SamplingConfig(max_new_tokens=6)


def config(source, tmp_path, **changes) -> GenerateConfig:
    prompts = write_lines(
        tmp_path / "prompts.jsonl",
        [
            {"prompt": "the mill"},
            {"prompt": "a pub near the river " * 40},  # longer than the context
            {"messages": [{"role": "user", "content": "families"}]},
        ],
    )
    settings = {
        "source": source,
        "prompts": prompts,
        "out": tmp_path / "out.jsonl",
        "sampling": SAMPLING,
    }
    return GenerateConfig(**(settings | changes))


def answers(path) -> list[dict]:
    return [json.loads(line) for line in path.read_text().splitlines()]


class Killed(BaseException):
    """Stands for SIGKILL: nothing after it runs."""


def kill_after(num_answers: int, monkeypatch) -> None:
    """Let the process end when so many answers have come."""
    monkeypatch.setattr("engine.answers.batch.generate", functools.partial(dying, num_answers))


def dying(num_answers: int, *arguments, **options):
    for number, response in enumerate(generate(*arguments, **options)):
        if number == num_answers:
            raise Killed
        yield response


def assert_same(found: list[dict], expected: list[dict]) -> None:
    for answer, other in zip(found, expected, strict=True):
        # Rounding depends on which answers are drawn together.
        assert answer.pop("logprob") == pytest.approx(other.pop("logprob"), abs=1e-4)
        assert answer == other
