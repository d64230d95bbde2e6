import re
import shlex
from pathlib import Path

import pytest

from engine.prepare.ending import next_commands, remarks, wrapped
from engine.settings.command_line import parse_config
from engine.settings.prepare import LogFields, PrepareConfig
from recipes import ppo_tiny, rm_tiny, sft_tiny


def report(**changes) -> dict:
    fields = {"lines": 4, "with_field": {"user": 4}, "not_read": {}, "read_as": {}}
    return {
        "fields": fields | changes.pop("fields", {}),
        "split": {"by": "user", "moved": []},
        "sets": {"sft": {"read": 4, "kept": {"train": 2, "valid": 1, "test": 1}}},
        "largest_duplicates": [],
        "reserved_emails": 0,
        **changes,
    }


def said(found: dict, **options) -> str:
    return "\n".join(remarks(found, PrepareConfig(**options)))


def test_of_what_is_as_it_should_be_nothing_is_said():
    assert said(report()) == ""


@pytest.mark.parametrize(
    "changes, words",
    [
        ({"fields": {"with_field": {}}}, "WARNING: no line says who sent it, so .* by prompt"),
        ({"split": {"by": "prompt", "moved": []}}, "WARNING: all lines are of one user"),
        ({"fields": {"with_field": {"user": 3}}}, "lines without a user: 1; each"),
        (
            {"split": {"by": "user", "moved": [{"set": "sft", "split": "valid", "of": 3}]}},
            r"sft: by the hashes of 3 user\(s\) none was for valid, so one was moved there",
        ),
        ({"fields": {"not_read": {"rating": 2}}}, r"fields that were not read .*: rating \(2\)"),
        ({"fields": {"read_as": {"alpaca": 3}}}, "read as alpaca: 3 of 4 lines"),
        ({"reserved_emails": 2}, r"2 addresses at domains .*example.com"),
        (
            {"sets": {"sft": {"read": 1, "kept": {"train": 1, "valid": 0, "test": 0}}}},
            "WARNING: sft has nothing for valid and test",
        ),
        (
            {"sets": {"sft": {"read": 1, "kept": {"train": 1, "valid": 1, "test": 0}}}},
            "^sft has no test file",
        ),
        (
            {"sets": {"sft": {"read": 1, "kept": {"train": 0, "valid": 0, "test": 0}}}},
            "WARNING: nothing of sft was kept",
        ),
        (
            {"sets": {"sft": {"read": 1, "kept": {"train": 1, "valid": 8, "test": 1}}}},
            "WARNING: 90% of sft are held out",
        ),
    ],
)
def test_what_is_odd_is_said(changes, words):
    assert re.search(words, said(report(**changes)))


def test_how_many_lines_lack_a_named_field_is_said():
    found = report(fields={"with_field": {"user": 4, "kind": 1}})
    assert said(found, fields=LogFields(kind="use")) == "--fields.kind use: 3 of 4 lines have none"


def test_the_next_commands_are_ready_to_paste_and_name_files_that_are_there(tmp_path):
    folder = tmp_path / "my data"
    folder.mkdir()
    assert next_commands(folder) == []
    for name in ("sft.train", "sft.valid", "comparisons.train", "prompts.train", "prompts.test"):
        (folder / f"{name}.jsonl").touch()
    head, *lines = next_commands(folder)
    commands = "\n".join(lines).replace(" \\\n", " ").splitlines()
    words = [shlex.split(command) for command in commands]
    assert [each[1] for each in words] == [
        f"recipes/{name}.py" for name in ("tokenizer", "sft_tiny", "rm_tiny", "ppo_tiny")
    ]
    for (_, _, *options), recipe in zip(words[1:], (sft_tiny, rm_tiny, ppo_tiny), strict=True):
        config = parse_config(recipe.config, options)
        assert config.data.valid is None or config.data.valid.is_file()
    assert all(Path(word).is_file() for each in words for word in each if str(folder) in word)
    (folder / "comparisons.train.jsonl").unlink()
    assert "ppo_tiny" not in "\n".join(next_commands(folder))


def test_no_word_is_broken_at_the_end_of_a_line():
    text = "a remark about /a/" + "b" * 100 + "-c and more words than a line of a terminal holds"
    lines = wrapped(text).splitlines()
    assert " ".join(line.strip() for line in lines) == text
