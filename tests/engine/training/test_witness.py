"""What a rank has seen amiss ends all ranks in the same words."""

import pytest
import torch

from engine.errors import UserError
from engine.ranks.start import start_parallel
from engine.settings.layout import ParallelLayout
from engine.training.witness import end_if_seen, rank_in_words, some_of
from tests.ranks import run_ranks


def said(lines_of: dict[int, list[str]]) -> str:
    parallel = start_parallel(ParallelLayout(), seed=0)
    try:
        end_if_seen(lines_of.get(parallel.rank, []), parallel, "what is seen", "a remedy")
    except UserError as error:
        return str(error)
    return ""


def test_all_ranks_say_what_one_has_seen():
    texts = run_ranks(said, 2, {1: ["one line", "another"]})
    assert texts == ["what is seen\n  one line\n  another\na remedy"] * 2


def test_nothing_seen_ends_nothing():
    assert run_ranks(said, 2, {}) == ["", ""]


def test_an_error_has_a_length():
    text = said({0: [f"line {number}" for number in range(100)]})
    assert "line 7" in text and "line 8" not in text and "and 92 more" in text


@pytest.mark.parametrize(
    ("names", "text"),
    [
        (["a"], "a"),
        (["a", "b", "c"], "a, b, c"),
        (["a", "b", "c", "d", "e"], "a, b, c and 2 others"),
    ],
)
def test_few_of_many_names_are_shown(names: list[str], text: str):
    assert some_of(names) == text


def test_rank_is_told_with_its_node_and_device(monkeypatch: pytest.MonkeyPatch):
    monkeypatch.setattr("socket.gethostname", lambda: "node-17")
    parallel = start_parallel(ParallelLayout(), seed=0)
    assert rank_in_words(parallel) == f"rank 0 (node node-17, device {torch.device('cpu')})"
