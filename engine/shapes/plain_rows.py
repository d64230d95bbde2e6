"""Rows in the project's own fields, which are Hugging Face TRL's too: they go on as they are."""

from collections.abc import Sequence
from typing import Any

from engine.containers.row import BadRecord, json_type
from engine.errors import quoted
from engine.shapes.canonical import (
    UNFIT,
    LeftOut,
    Purpose,
    Row,
    check_no_tools,
    is_labelled_false,
    messages_in,
    number_in,
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
_OPEN_TURN = "\n\nAssistant:"
_MESSAGES = ("messages", "prompt", "response", "chosen", "rejected")


def claimed_by_plain(row: Row) -> set[str]:
    """Return the fields of a row that are ours, none where it is no row of ours."""
    if isinstance(row.get("prompt"), dict):  # a tree's
        return set()
    found = set().union(*(form for form in FORMS if form <= row.keys()))
    return found | {"label"} if "response" in found and is_labelled_false(row) else found


def plain(row: Row, purpose: Purpose) -> Sequence[Row | LeftOut]:
    """Return a row as as_ours() does, but where its `label` says that it is not to be imitated."""
    if purpose == "demonstrations" and is_labelled_false(row):
        return [LeftOut(UNFIT)]
    if (prompt := _prompt_of_empty(row)) and purpose != "demonstrations":
        is_asked = purpose == "prompts"
        return [{"prompt": prompt} if is_asked else LeftOut("comparisons with an empty answer")]
    return [as_ours(row, purpose)]


def _prompt_of_empty(row: Row) -> str:
    """Return what two dialogues of HH-RLHF's share where one ends in an empty reply; "" for any
    other row."""
    chosen, rejected = row.get("chosen"), row.get("rejected")
    has_prompt = "prompt" in row or "messages" in row
    if has_prompt or not isinstance(chosen, str) or not isinstance(rejected, str):
        return ""
    (before, turn, first), (other, _, second) = (
        each.rpartition(_OPEN_TURN) for each in (chosen, rejected)
    )
    is_shared = bool(turn) and before == other
    return before + turn if is_shared and not (first.strip() and second.strip()) else ""


def as_ours(row: Row, purpose: Purpose) -> Row:
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
        return _with_ranks(row)
    return row


def _with_ranks(row: Row) -> Row:
    """Return a comparison with ranks for its scores: the highest is the best, equal ones tie."""
    pairs, rankings = row.keys() & {"chosen", "rejected"}, row.keys() & {"ranks", "scores"}
    if pairs and rankings:
        names = ", ".join(sorted(pairs) + ["completions", *sorted(rankings)])
        raise BadRecord(
            f"has a pair and a ranking ({names}): drop one of them, or name the other's fields by "
            "--data.fields chosen=chosen,rejected=rejected or completions=completions",
            says_remedy=True,
        )
    row = {**row}
    if isinstance(row.get("ranks"), list):
        row["ranks"] = [_unquoted(rank) for rank in row["ranks"]]
    if "scores" not in row:
        return row
    scores = row.pop("scores")
    if not isinstance(scores, list):
        raise BadRecord(f"must be a list, not {json_type(scores)}", field="scores")
    scores = [number_in({f"scores[{n}]": each}, f"scores[{n}]") for n, each in enumerate(scores)]
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


def _unquoted(value: Any) -> Any:
    """Return the number that a text is, as tables have it; anything else as it is."""
    try:
        return float(value) if isinstance(value, str) else value
    except ValueError:
        return value


def _agree(said: Any, ranks: list[int]) -> bool:
    """Return whether ranks that a row has are those of its scores."""
    if not isinstance(said, list) or len(said) != len(ranks):
        return False
    is_number = all(isinstance(rank, int | float) and rank == rank for rank in said)
    return is_number and ranks_of(said) == ranks
