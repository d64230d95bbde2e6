import dataclasses
import shlex
import subprocess

import pytest
from hypothesis import given
from hypothesis import strategies as st

from engine.settings.command_line import as_options, parse_config
from engine.settings.sft import SFTConfig
from engine.settings.typed_text import as_typed, read_typed


@pytest.mark.parametrize(
    ("typed", "meant"),
    [
        (r"\n\n", "\n\n"),
        (r"a\tb", "a\tb"),
        (r"\\n", r"\n"),
        (r"\d \ x", r"\d \ x"),
        ("\n", "\n"),
        ("", ""),
    ],
)
def test_escapes_are_read_as_people_type_them(typed: str, meant: str):
    assert read_typed(typed) == meant
    config = parse_config(SFTConfig(), ["--data.prompt-suffix", typed])
    assert config.data.prompt_suffix == meant


@given(st.text("\\nrt\n\t\r' a\x07", max_size=12))
def test_any_text_can_be_typed(text: str):
    assert read_typed(as_typed(text)) == text


@pytest.mark.parametrize("text", ["\n\n", r"\n\n", "it's\n", "\\", "\x1b[1m\n", "", "a b"])
def test_the_option_that_a_message_names_gives_the_text(text: str):
    data = dataclasses.replace(SFTConfig().data, prompt_suffix=text)
    config = dataclasses.replace(SFTConfig(), data=data)
    option = as_options(config, {"data.prompt_suffix": text})
    shell = ["bash", "-c", f"printf '%s\\0' {option}"]
    words = subprocess.run(shell, check=True, capture_output=True, text=True).stdout
    assert parse_config(SFTConfig(), words.split("\0")[:-1]).data.prompt_suffix == text
    assert text.isprintable() is False or len(shlex.split(option)) == 2


def test_a_default_is_shown_as_it_is_typed(capsys: pytest.CaptureFixture[str]):
    data = dataclasses.replace(SFTConfig().data, prompt_suffix="\n=>")
    with pytest.raises(SystemExit):
        parse_config(dataclasses.replace(SFTConfig(), data=data), ["--help"])
    said = " ".join(capsys.readouterr().out.split())
    assert r"(default: '\n=>')" in said
    assert r"\n is a line break" in said
