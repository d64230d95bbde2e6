"""A run goes on whatever becomes of its stdout and stderr."""

import os
import subprocess
import sys
from pathlib import Path

import pytest

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
    status, is_done, error = run(tmp_path, "| grep -q u65e5", PYTHONIOENCODING=encoding)
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


def test_files_that_are_opened_later_do_not_take_the_number_of_a_closed_stdout(tmp_path: Path):
    program = (
        "import os\nfrom engine.process.streams import make_streams_last\nmake_streams_last()\n"
        f"number = os.open({str(tmp_path / 'file')!r}, os.O_WRONLY | os.O_CREAT)\n"
        "assert number > 2, number\nos.system('echo noise')\n"
    )
    command = f"{sys.executable} -c {chr(39)}{program.replace(chr(39), chr(34))}{chr(39)} >&- 2>&-"
    environment = os.environ | {"PYTHONPATH": str(ROOT)}
    assert subprocess.run(["bash", "-c", command], env=environment).returncode == 0
    assert (tmp_path / "file").read_bytes() == b""


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
