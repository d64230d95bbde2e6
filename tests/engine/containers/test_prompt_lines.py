from pathlib import Path

import pytest

from engine.containers.rows import read_rows
from engine.data.demonstrations import read_demonstrations
from engine.data.prompts import read_prompts
from engine.errors import UserError
from tests.engine.containers.test_rows import read


def test_a_line_is_a_prompt(tmp_path: Path):
    path = tmp_path / "a.txt"
    path.write_bytes(b"\xef\xbb\xbfWhat is a?\r\n\n \n  Is [b]? \n\xe9\nc, d")
    places, rows = read(path)
    assert places == [":1", ":4", ":5", ":6"]
    assert rows[:2] == [{"prompt": "What is a?"}, {"prompt": "  Is [b]? "}]
    assert rows[2].startswith("not UTF-8: byte 1 of the line")
    assert rows[3] == {"prompt": "c, d"}
    seen: list[bytes] = []
    list(read_rows(path, seen=seen.append))
    assert b"".join(seen) == path.read_bytes()


def test_they_are_prompts_and_nothing_else(tmp_path: Path):
    path = tmp_path / "a.txt"
    path.write_text("What is a?\nWhat is b?\n")
    prompts, _ = read_prompts(path)
    assert [prompt.text for prompt in prompts] == ["What is a?", "What is b?"]
    with pytest.raises(UserError, match="prompts, which recipes/ppo_"):
        read_demonstrations(path)
    (tmp_path / "a.md").write_text("# A title\n")
    with pytest.raises(UserError, match=r"a\.md is plain text, which is read as pretraining text"):
        read_prompts(tmp_path / "a.md")
