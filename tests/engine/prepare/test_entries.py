import numpy as np

from engine.prepare.entries import EntryList
from engine.prepare.logs import SETS, parse_log
from engine.settings.prepare import LogFields


def entries(*rows: dict, prefix_characters: int = 10, seed: int = 0):
    found = EntryList(prefix_characters=prefix_characters, seed=seed)
    for line, row in enumerate(rows, start=1):
        found.add(f"log:{line}", parse_log({"prompt": "p", **row}, LogFields()))
    return found.entries()


def test_a_record_is_an_entry_in_each_of_its_data_sets():
    labels = {"response": "r", "completions": ["a", "b"], "ranks": [1, 2]}
    found = entries({"prompt": "a"}, {"prompt": "b", **labels, "time": 5})
    assert [SETS[name] for name in found.dataset] == ["prompts", "sft", "comparisons"]
    assert found.line.tolist() == [1, 2, 2]
    assert found.time.tolist() == [np.inf, 5, 5]
    assert found.prompt[1] == found.prompt[2] != found.prompt[0]


def test_prompts_are_equal_where_they_share_the_prefix_or_are_equal_and_shorter():
    texts = ("0123456789 and", "0123456789 but", "012345678", "012345678x", "012345678")
    found = entries(*({"prompt": text} for text in texts)).prompt.tolist()
    assert found[0] == found[1]
    assert found[2] == found[4]
    assert len(set(found)) == 3


def test_users_are_told_apart_by_a_seeded_hash_and_a_prompt_without_one_is_its_own():
    rows = ({"user": "a"}, {"user": 1}, {"user": "1"}, {"prompt": "x"}, {"prompt": "X "}, {})
    found = entries(*rows).user.tolist()
    assert found[1] == found[2]
    assert found[3] == found[4]
    assert len(set(found)) == 4
    assert entries(*rows, seed=1).user.tolist() != found
    assert entries(*rows).user.tolist() == found


def test_no_records_are_no_entries():
    assert [len(column) for column in entries() if not isinstance(column, bool)] == [0] * 8


def test_an_entry_is_where_its_record_stood():
    found = EntryList(prefix_characters=9, seed=0)
    for where in ("a2.jsonl:17", "b: row 3", "a2.jsonl:4", "c.json: record 2 (line 6)"):
        found.add(where, parse_log({"prompt": where}, LogFields()))
    expected = ["a2.jsonl:17", "b: row 3", "a2.jsonl:4", "c.json: record 2"]
    assert [found.entries().where(i) for i in range(4)] == expected
