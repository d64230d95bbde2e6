import math

import pytest

from engine.containers.row import BadRecord
from engine.data.comparisons import read_comparisons
from engine.data.demonstrations import read_demonstrations
from engine.data.prompts import read_prompts
from engine.prepare.logs import parse_log, read_logs
from engine.settings.prepare import LogFields, PrepareConfig
from tests.tiny import write_lines

FIELDS = LogFields()
USER = {"role": "user", "content": "Hi"}
ASSISTANT = {"role": "assistant", "content": "Hello"}


def test_labels_say_for_which_data_sets_a_record_is():
    ranking = {"completions": ["a", "b", "c"], "ranks": [2, 5, 2]}
    assert parse_log({"prompt": "p"}, FIELDS).sets() == ["prompts"]
    assert parse_log({"prompt": "p", "response": "r"}, FIELDS).sets() == ["sft"]
    assert parse_log({"prompt": "p", "demonstration": "r"}, FIELDS).response == "r"
    both = parse_log({"prompt": "p", "response": "r", **ranking}, FIELDS)
    assert both.sets() == ["sft", "comparisons"]
    assert both.ranks == [1, 2, 1]
    pair = parse_log({"prompt": "p", "chosen": "a", "rejected": "b"}, FIELDS)
    assert (pair.completions, pair.ranks) == (["a", "b"], [1, 2])


def test_a_dialogue_that_ends_with_the_assistant_is_a_demonstration():
    record = parse_log({"messages": [USER, ASSISTANT]}, FIELDS)
    assert (record.prompt, record.response, record.sets()) == ([USER], "Hello", ["sft"])
    assert parse_log({"messages": [USER]}, FIELDS).sets() == ["prompts"]


def test_fields_have_the_names_that_are_given():
    fields = LogFields(prompt="question", user="customer", response="answer", time="when")
    row = {"question": "p", "customer": 7, "answer": "r", "when": "1970-01-01T00:01:00"}
    record = parse_log(row, fields)
    assert (record.prompt, record.user, record.response, record.time) == ("p", "7", "r", 60.0)
    assert parse_log({"prompt": "p"}, FIELDS).time == math.inf


@pytest.mark.parametrize(
    "row, problem",
    [
        ({"text": "p"}, 'field "prompt" is missing; there is text'),
        ({"prompt": " "}, 'field "prompt" is empty'),
        ({"prompt": 3}, 'field "prompt" must be a text or a list of messages, not a number'),
        ({"prompt": "p", "user": 1.5}, 'field "user" must be a text or a whole number'),
        ({"prompt": "p", "time": "noon"}, 'field "time" must be a number, or a time'),
        ({"prompt": "p", "ranks": [1, 2]}, 'field "ranks" is there without "completions"'),
        ({"prompt": "p", "completions": ["a", "b"]}, 'field "ranks" is missing'),
        ({"prompt": "p", "completions": ["a"], "ranks": [1]}, "needs at least 2 to compare, not 1"),
        ({"prompt": "p", "completions": ["a", "b"], "ranks": [1]}, "has 1 ranks for 2 completions"),
        ({"prompt": "p", "completions": ["a", "b"], "ranks": [1, 1]}, "is 1 for all 2: all ties"),
        ({"prompt": "p", "completions": ["a", "a"], "ranks": [1, 2]}, "the same text each time"),
        ({"prompt": "p", "completions": ["a", "b"], "ranks": [1, -2]}, "whole number from 0"),
        ({"messages": [ASSISTANT]}, "needs a user message"),
        ({"messages": [USER, ASSISTANT], "response": "r"}, "ends with the assistant"),
    ],
)
def test_what_cannot_be_read_is_said_with_its_field(row, problem):
    with pytest.raises(BadRecord, match=problem):
        parse_log(row, FIELDS)


def test_case_whitespace_and_a_system_message_make_no_difference():
    system = {"role": "system", "content": "You are the assistant of a bank."}
    texts = [
        parse_log({"prompt": [system, USER]}, FIELDS).compared_text(),
        parse_log({"prompt": [{"role": "user", "content": " hI\n"}]}, FIELDS).compared_text(),
    ]
    assert texts == ["user: hi", "user: hi"]
    assert parse_log({"prompt": "A  b\n C"}, FIELDS).compared_text() == "a b c"


def test_every_text_is_read_and_changed():
    row = {"prompt": [USER], "response": "r", "completions": ["a", "b"], "ranks": [1, 2]}
    record = parse_log(row, FIELDS)
    assert record.texts() == ["Hi", "r", "a", "b"]
    changed = record.changed(str.upper)
    assert changed.texts() == ["HI", "R", "A", "B"]
    assert record.texts() == ["Hi", "r", "a", "b"]
    assert changed.ranks == [1, 2]


def test_rows_are_what_the_stages_read(tmp_path):
    row = {"prompt": [USER], "response": "r", "completions": ["a", "b"], "ranks": [3, 1], "user": 1}
    record = parse_log(row | {"kind": "chat"}, FIELDS)
    rows = {name: record.row(name, "log:1") for name in ("sft", "comparisons", "prompts")}
    assert rows["prompts"] == {"prompt": [USER], "id": "log:1", "kind": "chat"}
    paths = {name: write_lines(tmp_path / name, [row]) for name, row in rows.items()}
    assert read_demonstrations(paths["sft"])[0][0].response.text == " r"
    assert read_comparisons(paths["comparisons"])[0][0].ranks == [2, 1]
    assert len(read_prompts(paths["prompts"])[0]) == 1


def test_records_come_with_their_file_and_line(tmp_path):
    (tmp_path / "a.jsonl").write_text('{"prompt": "p"}\n\n{"prompt": 1}\n{"prompt": "q"}\n')
    write_lines(tmp_path / "b.jsonl", [{"prompt": "r"}])
    config = PrepareConfig(
        logs=(tmp_path / "a.jsonl", tmp_path / "b.jsonl"), out=tmp_path, skip_bad_lines=True
    )
    readers, bad = [], []
    found = list(read_logs(config, readers.append, lambda *line: bad.append(line)))
    a, b = config.logs
    assert [(where, record.prompt) for where, record in found] == [
        (f"{a}:1", "p"),
        (f"{a}:4", "q"),
        (f"{b}:1", "r"),
    ]
    why = 'field "prompt" must be a text or a list of messages, not a number'
    assert bad == [(f"{a}:3", why)]
    assert [reader.report().num_read for reader in readers] == [2, 1]
