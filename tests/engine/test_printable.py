"""Nothing hidden and no command to a terminal is left in what is printable; ordinary text is."""

import io
import re
import sys
import unicodedata

import pytest
from hypothesis import given
from hypothesis import strategies as st

from engine.printable import (
    TERMINAL_COLUMNS,
    accept_any_text,
    command_lines,
    open_console,
    printable,
    say,
    short_number,
)
from tests.fuzzing import fuzzed
from tests.hostile import COMMANDS, dangers

ORDINARY = (
    "The quick brown fox: {braces}, [brackets], $maths$, back\\slash, <tags> & `ticks`.",
    "naïve façade — “quotes” … 5\u00a0€, ½, x²",
    "Οὐχὶ ταὐτὰ παρίσταταί μοι, Съешь ещё этих мягких булок",
    "שלום עולם, مرحبا بالعالم، می\u200cخواهم",
    "नमस्ते दुनिया, क\u094d\u200dष, বাংলা, தமிழ், ไทย, ភាសាខ្មែរ",
    "日本語、中文、한국어\u3000葛\U000e0100飾区",
    "ᠮᠣᠩᠭᠣᠯ ᠪᠠᠶᠢᠨ\u180eᠠ",
    "👍🏽 👩‍💻 👨‍👩‍👧‍👦 ❤️‍🔥 🏳️‍🌈 1️⃣ 🇩🇪",
    "\ufffd e\u0301 \u06dd",
)


@pytest.mark.parametrize(
    ("value", "shown"),
    [
        (0.00012345678, "0.0001235"),
        (9999.4, "9999"),
        (10350.2, "10,350"),
        (-1234567.0, "-1,234,567"),
        (2e12, "2e+12"),
        (float("nan"), "nan"),
        (float("inf"), "inf"),
    ],
)
def test_a_number_is_short_and_a_count_has_no_exponent(value: float, shown: str):
    assert short_number(value) == shown


@pytest.mark.parametrize("text", ORDINARY)
def test_ordinary_text_of_many_scripts_stays_itself(text):
    assert printable(text) == text


@pytest.mark.parametrize("text", COMMANDS)
def test_a_command_to_a_terminal_becomes_visible(text):
    shown = printable(f"before{text}after")
    assert not dangers(shown)
    assert shown.startswith("before\\")
    assert shown.endswith("after")


@pytest.mark.parametrize(
    ("text", "shown"),
    [
        ("\x1b[2J", "\\x1b[2J"),
        ("\u202etxt.exe", "\\u202etxt.exe"),
        ("\udc9b", "\\udc9b"),
        ("\U000e0041", "\\U000e0041"),
        ("mod\u200del \u200b\ufeff", "mod\\u200del \\u200b\\ufeff"),
        ("x\ufe0f \u65e5\ufe00\ufe01", "x\\ufe0f \u65e5\ufe00\\ufe01"),
        ("\u3164\ue000\u0378\uffff", "\\u3164\\ue000\\u0378\\uffff"),
        ("\u65e5\u200d", "\u65e5\\u200d"),
    ],
)
def test_what_is_hidden_is_written_as_python_writes_it(text, shown):
    assert printable(text) == shown


def test_lines_stay_lines_unless_one_is_asked_for():
    assert printable("a\n\tb\r\n") == "a\n\tb\\r\n"
    assert printable("a\n\tb\r\n", one_line=True) == "a\\n\\tb\\r\\n"


def test_what_is_too_long_loses_its_middle_and_says_how_much():
    shown = printable("a" * 900 + "\x1b" * 100, limit=100)
    assert len(shown) <= 100
    head, number, tail = re.fullmatch(r"(a+) \[\.\.\. (\d+) \w+ \.\.\.\] (.+)", shown).groups()
    assert tail == "\\x1b" * (len(tail) // 4)
    assert int(number) == 1000 - len(head) - len(tail) // 4
    assert printable("a" * 100, limit=100) == "a" * 100
    assert len(printable("\x1b" * 99, limit=100)) <= 100


def test_a_joiner_at_the_cut_is_not_left_alone():
    for limit in range(40, 60):
        shown = printable("👩\u200d" * 200, limit=limit)
        assert printable(shown, limit=limit) == shown
        assert len(shown) <= limit


@pytest.mark.fuzz
@fuzzed
@given(
    text=st.text(st.characters(), max_size=80)
    | st.text(st.sampled_from("a1\u65e5\u200d\ufe0f\U000e0100👩\x1b\n\\"), max_size=80),
    limit=st.none() | st.integers(0, 100),
    one_line=st.booleans(),
)
def test_any_text_comes_out_harmless_and_comes_out_the_same_again(text, limit, one_line):
    shown = printable(text, limit=limit, one_line=one_line)
    assert not dangers(shown)
    assert not (one_line and ("\n" in shown or "\t" in shown))
    assert limit is None or len(shown) <= limit
    assert printable(shown, limit=limit, one_line=one_line) == shown
    shown.encode()
    if limit is None:
        plain = [c for c in text if " " <= c <= "~"]
        kept = iter(shown)  # in order: what is printable ASCII stays itself
        assert all(any(c == k for k in kept) for c in plain)
    if all(unicodedata.category(c)[0] in "LNPS" for c in text) and limit is None:
        assert shown == text or set(text) & set("\u115f\u1160\u3164\uffa0")


@pytest.mark.parametrize("encoding", ["ascii", "latin-1", "cp1252", "utf-8", "utf-16"])
@pytest.mark.parametrize("errors", ["strict", "surrogateescape"])
def test_every_encoding_takes_every_text(encoding, errors, monkeypatch):
    for write in (say, lambda text: open_console(width=200).print(printable(text))):
        raw = io.BytesIO()
        stream = io.TextIOWrapper(raw, encoding=encoding, errors=errors)
        monkeypatch.setattr(sys, "stdout", stream)
        write("é 日本 \udc9b\x9b [red] :smile: {x}")
        stream.flush()
        written = raw.getvalue().decode(encoding)
        assert written.rstrip("\n").endswith("\\udc9b\\x9b [red] :smile: {x}")
        assert ("日本" in written) == encoding.startswith("utf")


def test_a_stream_that_was_told_what_to_do_is_left_alone():
    stream = io.TextIOWrapper(io.BytesIO(), encoding="ascii", errors="replace")
    accept_any_text(stream)
    assert stream.errors == "replace"
    accept_any_text(io.StringIO())


def test_what_is_said_is_cut_and_escaped(capsys):
    say("x\x1b" * 100, limit=60, end="|", stream=sys.stderr)
    printed = capsys.readouterr()
    assert not printed.out
    assert "\x1b" not in printed.err
    assert len(printed.err) <= 61


def test_a_command_is_broken_between_options_and_read_as_one():
    options = [f"--option-{n} {'x' * 20}" for n in range(5)]
    lines = command_lines("next: python recipes/sft_tiny.py", *options)
    assert len(lines) > 1
    assert max(map(len, lines)) <= TERMINAL_COLUMNS
    command = "\n".join(lines).replace("\\\n", "")
    assert command.split() == " ".join(["next: python recipes/sft_tiny.py", *options]).split()
