"""Rows in the project's own fields, which are Hugging Face TRL's too: they go on as they are."""

import math
from collections.abc import Sequence
from typing import Any

from engine.containers.row import BadRecord, json_type
from engine.errors import quoted
from engine.shapes.canonical import (
    LeftOut,
    Purpose,
    Row,
    check_no_tools,
    messages_in,
    ranks_of,
)

FORMS = (
    {"prompt", "response"},
    {"messages"},
    {"prompt", "completions", "ranks"},
    {"prompt", "completions", "scores"},
    {"chosen", "rejected"},
    {"prompt"},
)
"""Fields that a row of ours has."""
_MESSAGES = ("messages", "prompt", "response", "chosen", "rejected")


def claimed_by_plain(row: Row) -> set[str]:
    """Return the fields of a row that are ours, none where it is no row of ours."""
    if isinstance(row.get("prompt"), dict):  # a tree's
        return set()
    return set().union(*(form for form in FORMS if form <= row.keys()))


def plain(row: Row, purpose: Purpose) -> Sequence[Row | LeftOut]:
    """Return a row with its messages as all stages read them, and ranks for scores; what is asked
    in it engine/data/pairs.py says."""
    check_no_tools(row)
    row = {
        key: messages_in(value, key) if key in _MESSAGES else value for key, value in row.items()
    }
    if isinstance(row.get("completions"), list):
        row["completions"] = [
            messages_in(each, f"completions[{index}]") if not isinstance(each, str) else each
            for index, each in enumerate(row["completions"])
        ]
    if purpose == "comparisons" and "completions" in row:
        return [_with_ranks(row)]
    return [row]


def _with_ranks(row: Row) -> Row:
    """Return a comparison with ranks for its scores: the highest is the best, equal ones tie."""
    if "scores" not in row:
        return row
    row, scores = {**row}, row["scores"]
    del row["scores"]
    if not isinstance(scores, list):
        raise BadRecord(f"must be a list, not {json_type(scores)}", field="scores")
    for index, score in enumerate(scores):
        is_number = isinstance(score, int | float) and not isinstance(score, bool)
        if not is_number or not abs(score) < math.inf:  # NaN is not either
            raise BadRecord(f"must be a number, not {quoted(score)}", field=f"scores[{index}]")
    num_completions = len(row["completions"]) if isinstance(row["completions"], list) else 0
    if len(scores) != num_completions:
        raise BadRecord(
            f"has {len(scores)} scores for {num_completions} completions", field="scores"
        )
    if len(set(scores)) == 1:
        raise BadRecord(
            f"is {quoted(scores[0])} for all {num_completions}: all ties say nothing",
            field="scores",
        )
    ranks = ranks_of([-score for score in scores])
    if "ranks" in row and not _agree(row["ranks"], ranks):
        raise BadRecord("says another order than ranks do", field="scores")
    return {**row, "ranks": ranks}


def _agree(said: Any, ranks: list[int]) -> bool:
    """Return whether ranks that a row has are those of its scores."""
    if not isinstance(said, list) or len(said) != len(ranks):
        return False
    is_number = all(isinstance(rank, int | float) and rank == rank for rank in said)
    return is_number and ranks_of(said) == ranks
