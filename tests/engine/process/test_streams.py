"""A run goes on whatever becomes of its stdout and stderr."""

import os
import subprocess
import sys
from collections.abc import Callable
from pathlib import Path
from typing import Any

import pytest

from engine.process.streams import _Lasting, make_streams_last

ROOT = Path(__file__).parents[3]
PROGRAM = """
import sys, time
from engine.printable import open_console, say
from engine.recipe import run_stage
from tests.engine.settings.small_stage import StageConfig
def train(config):
    console = open_console()
    for number in range(30):
        say(f"line {number} \\u65e5")
        console.print(f"also {number} \\u65e5")
        say("a warning", stream=sys.stderr)
        print(f"a library's {number} \\u65e5")
        sys.stdout.writelines([f"lines {number}\\n"])
        time.sleep(0.005)
    open(OUT, "w").write("done")
run_stage(train, StageConfig(), [], has_dry_run=False)
"""


def run(tmp_path: Path, redirection: str, **environment: str) -> tuple[int, bool, str]:
    """Return the exit status of the program, whether it came to its end, and its stderr."""
    out, script = tmp_path / "out", tmp_path / "program.py"
    script.write_text(PROGRAM.replace("OUT", repr(str(out))))
    command = f"{sys.executable} -W ignore {script} {redirection}"
    answer = subprocess.run(
        ["bash", "-c", f"set -o pipefail; {command}"],
        env=os.environ | {"PYTHONPATH": str(ROOT)} | environment,
        capture_output=True,
        timeout=120,
    )
    return answer.returncode, out.exists(), answer.stderr.decode()


@pytest.mark.parametrize("redirection", ["| head -1", ">&-", ">/dev/full", ">&- 2>&-", "2>&-"])
def test_a_run_comes_to_its_end_though_nobody_reads_it(redirection: str, tmp_path: Path):
    status, is_done, error = run(tmp_path, redirection)
    assert (status, is_done) == (0, True)
    assert error.replace("a warning\n", "") == ""


@pytest.mark.parametrize("encoding", ["ascii", "latin-1"])
def test_a_run_comes_to_its_end_in_any_encoding(encoding: str, tmp_path: Path):
    status, is_done, error = run(
        tmp_path, "| grep -q 'library.s 29 .u65e5'", PYTHONIOENCODING=encoding
    )
    assert (status, is_done, error.replace("a warning\n", "")) == (0, True, "")


def test_help_may_be_read_in_part(tmp_path: Path):
    answer = subprocess.run(
        ["bash", "-c", f"set -o pipefail; {sys.executable} recipes/sft_tiny.py --help | head -1"],
        cwd=ROOT,
        env=os.environ | {"PYTHONPATH": str(ROOT)},
        capture_output=True,
        text=True,
    )
    assert (answer.returncode, answer.stderr) == (0, "")
    assert answer.stdout.startswith("usage: ")


@pytest.mark.parametrize("closed", [">&- 2>&-", "<&- >&- 2>&-"])
def test_files_that_are_opened_later_do_not_take_the_number_of_a_closed_stdout(
    closed: str, tmp_path: Path
):
    program = (
        "import os\nfrom engine.process.streams import make_streams_last\nmake_streams_last()\n"
        f"number = os.open({str(tmp_path / 'file')!r}, os.O_WRONLY | os.O_CREAT)\n"
        "assert number not in (1, 2), number\n"
        "assert os.system('echo noise && echo noise >/proc/self/fd/2') == 0\n"
    )
    command = f"{sys.executable} -c {chr(39)}{program.replace(chr(39), chr(34))}{chr(39)} {closed}"
    environment = os.environ | {"PYTHONPATH": str(ROOT)}
    assert subprocess.run(["bash", "-c", command], env=environment).returncode == 0
    assert (tmp_path / "file").read_bytes() == b""


WAYS: dict[str, Callable[[Any], object]] = {
    "write": lambda stream: stream.write("x" * 100_000),
    "writelines": lambda stream: stream.writelines(["x" * 100_000]),
    "flush": lambda stream: (stream.write("x"), stream.flush()),
}


@pytest.mark.parametrize("way", WAYS)
def test_a_stream_that_nobody_reads_leads_nowhere_from_then_on(way: str):
    reader, writer = os.pipe()
    os.close(reader)
    stream = os.fdopen(writer, "w")
    lasting, num_open = _Lasting(stream), len(os.listdir("/proc/self/fd"))
    WAYS[way](lasting)
    assert os.write(writer, b"a library's") == 11  # or Python's own, as it ends
    assert len(os.listdir("/proc/self/fd")) == num_open
    assert stream.flush() is None
    stream.close()
    WAYS[way](lasting)


def test_streams_take_any_text_and_last_once(monkeypatch: pytest.MonkeyPatch, tmp_path: Path):
    with (tmp_path / "out").open("w", encoding="ascii") as out:
        monkeypatch.setattr(sys, "stdout", out)
        monkeypatch.setattr(sys, "stderr", out)
        make_streams_last()
        first = sys.stdout
        make_streams_last()
        assert sys.stdout is first
        assert first is not out
        print("\u65e5")
    assert (tmp_path / "out").read_text() == "\\u65e5\n"


def test_a_log_has_no_colours_and_no_bars(tmp_path: Path):
    program = (
        "from rich.progress import Progress; from engine.printable import open_console\n"
        "console = open_console(); console.print('x', style='bold red')\n"
        "assert not console.is_terminal\n"
    )
    answer = subprocess.run(
        [sys.executable, "-c", program],
        env=os.environ | {"PYTHONPATH": str(ROOT), "FORCE_COLOR": "1"},
        capture_output=True,
    )
    assert (answer.returncode, answer.stdout) == (0, b"x\n"), answer.stderr
