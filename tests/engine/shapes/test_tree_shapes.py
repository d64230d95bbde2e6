import copy

import pytest

from engine.containers.row import BadRecord
from engine.shapes.canonical import LeftOut
from engine.shapes.tree_shapes import oasst_tree, oasst_trees
from tests.engine.shapes.shape_samples import OASST_ROWS, OASST_TREE, SKY, asked


def test_rows_of_messages_make_the_same_trees() -> None:
    (found,) = oasst_trees([(f"f:{n}", row) for n, row in enumerate(OASST_ROWS, 1)])
    where, tree = found
    assert where == "f:1"
    assert isinstance(tree, dict)
    for purpose in ("demonstrations", "comparisons", "prompts"):
        assert oasst_tree(tree, purpose) == oasst_tree(OASST_TREE, purpose)


def test_their_order_in_the_file_decides_nothing() -> None:
    backwards = [(f"f:{n}", row) for n, row in enumerate(OASST_ROWS[::-1], 1)]
    ((where, tree),) = oasst_trees(backwards)
    assert where == "f:6"
    assert isinstance(tree, dict)
    assert oasst_tree(tree, "demonstrations") == oasst_tree(OASST_TREE, "demonstrations")


def test_a_reply_to_what_is_not_there_is_counted() -> None:
    rows = [(f"f:{n}", row) for n, row in enumerate(OASST_ROWS[1:], 2)]
    assert {found for _, found in oasst_trees(rows)} == {
        LeftOut("replies to a message that is not in the file")
    }


def test_a_deleted_root_takes_its_replies_along() -> None:
    tree = copy.deepcopy(OASST_TREE)
    tree["prompt"]["deleted"] = True
    deleted = LeftOut("deleted messages")
    assert oasst_tree(tree, "prompts") == [deleted]
    assert oasst_tree(tree, "demonstrations") == [deleted, LeftOut("trees without an answer")]


def test_what_is_no_tree_is_bad() -> None:
    with pytest.raises(BadRecord, match="\"role\" must be prompter or assistant, not 'judge'"):
        oasst_tree({"prompt": {"role": "judge", "text": "a"}}, "prompts")
    with pytest.raises(BadRecord, match='"replies" must be a list of messages'):
        oasst_tree({"prompt": {"role": "prompter", "text": "a", "replies": [5]}}, "prompts")
    deep = {"role": "prompter", "text": SKY}
    for _ in range(300):
        deep = {"role": "prompter", "text": SKY, "replies": [deep]}
    with pytest.raises(BadRecord, match="is over 200 messages deep"):
        oasst_tree({"prompt": deep}, "prompts")


def test_deleted_is_true_or_false_in_quotes_too() -> None:
    tree = {"prompt": {"text": "q", "role": "prompter", "deleted": "False", "replies": []}}
    answer = {"text": "a", "role": "assistant", "rank": 0}
    tree["prompt"]["replies"] = [{**answer, "deleted": "True"}, {**answer, "deleted": "False"}]
    assert oasst_tree(tree, "demonstrations")[1:] == [{"messages": asked("q", "a")}]
    tree["prompt"]["deleted"] = "perhaps"
    with pytest.raises(BadRecord, match='"deleted" must be true or false'):
        oasst_tree(tree, "demonstrations")
