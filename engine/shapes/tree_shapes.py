"""Trees of messages, each an answer to the one above: OpenAssistant's, whole or a message a row.

A message: {"message_id", "text", "role": "prompter" or "assistant", "rank", "deleted", "replies"}.
"""

from collections.abc import Iterator, Sequence

from engine.containers.row import BadRecord, required
from engine.errors import quoted
from engine.shapes.canonical import (
    LeftOut,
    Purpose,
    Row,
    is_true,
    message,
    number_in,
    ranked,
    text_in,
)

_ROLES = {"prompter": "user", "assistant": "assistant"}
_MAX_DEPTH = 200  # of replies to replies; our choice, several times OpenAssistant's deepest


def oasst_tree(row: Row, purpose: Purpose) -> Sequence[Row | LeftOut]:
    """Return what {"prompt": {MESSAGE, "replies": [...]}} gives: the dialogue of its best-ranked
    replies as demonstration, all answers to each prompt as comparisons, and each prompt.

    A prompt comes with the dialogue before it. Deleted messages go, and the replies to them.
    """
    root = row["prompt"]
    found: list[Row | LeftOut] = [LeftOut("deleted messages")] * _num_deleted(root)
    if purpose == "demonstrations":
        path = _best_path(root)
        return [*found, {"messages": path} if path else LeftOut("trees without an answer")]
    for dialogue, answers in _asked(root, []):
        if purpose == "prompts":
            found.append({"prompt": dialogue})
            continue
        known = [each for each in answers if each.get("rank") is not None]
        texts = [text_in(each, "text") for each in known]
        ranks = [number_in(each, "rank") for each in known]
        if answers:
            found.append(ranked(dialogue, texts, ranks=ranks))
    return found


def _num_deleted(node: Row) -> int:
    """Return the deleted messages of a tree; of their replies nothing is said."""
    if _is_deleted(node):
        return 1
    return sum(_num_deleted(each) for each in node.get("replies") or [] if isinstance(each, dict))


def _is_deleted(node: Row) -> bool:
    return "deleted" in node and node["deleted"] is not None and is_true(node, "deleted")


def _best_path(root: Row) -> list[dict[str, str]]:
    """Return the dialogue that follows the best-ranked reply each time, to the last assistant's."""
    path: list[dict[str, str]] = []
    node: Row | None = None if _is_deleted(root) else root
    while node is not None and len(path) < _MAX_DEPTH:
        path.append(_message(node))
        replies = _replies(node)
        # Where none has a rank the first one is taken: there is one alone, or nobody ranked them.
        node = min(replies, key=lambda each: _rank(each)) if replies else None
    if path and path[-1]["role"] == "user":
        path.pop()
    return path


def _asked(
    node: Row, before: list[dict[str, str]]
) -> Iterator[tuple[list[dict[str, str]], list[Row]]]:
    """Yield (dialogue, answers) of every message of a prompter's in a tree."""
    if len(before) >= _MAX_DEPTH:
        raise BadRecord(f"is over {_MAX_DEPTH} messages deep", field="prompt")
    if _is_deleted(node):
        return
    dialogue = [*before, _message(node)]
    replies = _replies(node)
    if dialogue[-1]["role"] == "user":
        yield dialogue, replies
    for reply in replies:
        yield from _asked(reply, dialogue)


def _replies(node: Row) -> list[Row]:
    found = node.get("replies") or []
    if not isinstance(found, list) or not all(isinstance(each, dict) for each in found):
        raise BadRecord("must be a list of messages", field="replies")
    return [each for each in found if not _is_deleted(each)]


def _rank(node: Row) -> float:
    return number_in(node, "rank") if node.get("rank") is not None else float("inf")


def _message(node: Row) -> dict[str, str]:
    role = required(node, "role")
    known = _ROLES.get(role) if isinstance(role, str) else None
    if known is None:
        raise BadRecord(f"must be prompter or assistant, not {quoted(role)}", field="role")
    return message(known, text_in(node, "text"))


def oasst_trees(rows: Sequence[tuple[str, Row]]) -> list[tuple[str, Row | LeftOut]]:
    """Return the trees of rows that are a message each, {"message_id", "parent_id"}, where their
    roots were."""
    nodes = {str(row.get("message_id")): {**row, "replies": []} for _, row in rows}
    roots: list[tuple[str, Row | LeftOut]] = []
    for where, row in rows:
        node = nodes[str(row.get("message_id"))]
        parent = row.get("parent_id")
        if parent is None:
            roots.append((where, {"prompt": node}))
        elif str(parent) in nodes:
            nodes[str(parent)]["replies"].append(node)
        else:
            roots.append((where, LeftOut("replies to a message that is not in the file")))
    return roots
