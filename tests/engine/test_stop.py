"""A signal is noted from a stage's start on, and all ranks leave together at the next boundary."""

import contextlib
import fcntl
import os
import pty
import re
import signal
import subprocess
import sys
import termios
import time
from collections.abc import Callable, Iterator
from pathlib import Path
from typing import Any

import pytest

from engine import ppo, rm, sft, stop
from engine.ranks.start import start_parallel
from engine.recipe import run_stage
from engine.run import Run, start_run
from engine.settings.layout import ParallelLayout
from engine.settings.sft import SFTConfig
from engine.stop import EXIT_STATUS, SIGNALS, interruptible, leaving_at_signals, noting_signals
from tests.ranks import run_ranks
from tests.recipe_runs import TORCHRUN, saved_step, sft_command, start, steps_logged, until
from tests.test_slurm import free_ports, wait_until
from tests.tiny import ppo_config, rm_config, sft_config, weights_of

ROOT = Path(__file__).parents[2]


class Died(Exception):
    """What a signal does to a process that does not note it."""


def die(number: int, frame: object) -> None:
    raise Died(signal.Signals(number).name)


@pytest.fixture(autouse=True)
def others() -> Iterator[list[Any]]:
    """Handlers that are there before a stage notes signals, and have to be there after it."""
    before = [signal.signal(number, die) for number in SIGNALS]
    yield [die] * len(SIGNALS)
    for number, handler in zip(SIGNALS, before, strict=True):
        signal.signal(number, handler)


def handlers() -> list[Any]:
    return [signal.getsignal(number) for number in SIGNALS]


@pytest.mark.parametrize("number", SIGNALS)
def test_signal_is_noted_instead_of_ending_the_process(number: signal.Signals, others: list[Any]):
    with noting_signals():
        assert not stop.is_noted()
        os.kill(os.getpid(), number)
        assert stop.is_noted()
        with noting_signals():  # a stage within a recipe
            assert stop.is_noted()
        assert stop.is_noted()
    assert handlers() == others
    assert not stop.is_noted()  # the next stage has not been asked


def test_stopped_run_leaves_with_the_status_that_asks_for_another_try(
    tiny: Path, tmp_path: Path, capsys: pytest.CaptureFixture[str]
):
    run = Run(
        directory=tmp_path,
        parallel=start_parallel(ParallelLayout(), seed=0),
        tokenizer=None,  # type: ignore[arg-type]
    )
    with pytest.raises(SystemExit) as stopped:
        run.leave(7)
    assert stopped.value.code == EXIT_STATUS == 75
    assert "at step 7" in capsys.readouterr().out


def answers(files: Path) -> list[object]:
    """What a rank hears before and after a signal that reaches rank 1 only."""
    with noting_signals():
        run = start_run(
            directory=files / "none",
            parallel=start_parallel(ParallelLayout(), 0),
            tokenizer=files / "tokenizer.json",
        )
        before = run.is_asked_to_stop()
        if run.parallel.rank == 1:
            os.kill(os.getpid(), signal.SIGUSR1)
        with pytest.raises(SystemExit) as stopped:
            run.leave_if_asked()
        return [before, run.is_asked_to_stop(), stopped.value.code]


def test_ranks_agree_on_a_signal_that_reached_one_of_them(tiny: Path):
    assert run_ranks(answers, 2, tiny) == [[False, True, EXIT_STATUS]] * 2


CONFIGS: dict[Any, Callable[..., Any]] = {sft: sft_config, rm: rm_config, ppo: ppo_config}


@pytest.mark.parametrize("stage", CONFIGS, ids=["sft", "rm", "ppo"])
@pytest.mark.parametrize("moment", ["start_parallel", "load_weights"])
def test_signal_while_a_stage_starts_leaves_before_its_first_step(
    stage: Any,
    moment: str,
    tiny: Path,
    tmp_path: Path,
    monkeypatch: pytest.MonkeyPatch,
    capsys: pytest.CaptureFixture[str],
):
    module = "engine.run" if moment == "start_parallel" else "engine.identity.inputs"
    whole = getattr(sys.modules[module], moment)

    def signalled(*args: Any, **named: Any) -> Any:
        os.kill(os.getpid(), signal.SIGUSR1)
        return whole(*args, **named)

    if moment == "start_parallel":  # then nothing is loaded
        monkeypatch.setattr("engine.identity.inputs.load_weights", pytest.fail)
    monkeypatch.setattr(f"{module}.{moment}", signalled)
    with pytest.raises(SystemExit) as stopped:
        stage.train(CONFIGS[stage](tiny, tmp_path / "run"))
    assert stopped.value.code == EXIT_STATUS
    said = capsys.readouterr().out
    assert re.search("stopped by a signal (before its first step|while .* was read)", said)
    for name in ("checkpoints", "metrics.jsonl"):
        assert not (tmp_path / "run" / name).exists()  # there was nothing to save
    assert not stop.is_noted()


def test_signal_while_a_stage_is_imported_is_noted(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch, others: list[Any]
):
    (tmp_path / "signalled_stage.py").write_text(
        "import os, signal\n"
        "from engine import stop\n"
        "os.kill(os.getpid(), signal.SIGTERM)\n"
        "def train(config):\n"
        "    assert stop.is_noted()\n"
        "    stop.leave('here')\n"
    )
    monkeypatch.syspath_prepend(tmp_path)
    with pytest.raises(SystemExit) as stopped:
        run_stage("signalled_stage.train", SFTConfig(), [])
    assert stopped.value.code == EXIT_STATUS
    assert handlers() == others


def has_handler(process: subprocess.Popen, number: int) -> bool:
    """Whether a process catches a signal now."""
    status = Path(f"/proc/{process.pid}/status").read_text()
    caught = next(line for line in status.splitlines() if line.startswith("SigCgt"))
    return bool(int(caught.split()[1], 16) >> (number - 1) & 1)


@pytest.mark.slow
@pytest.mark.skipif(not Path("/proc/self/status").exists(), reason="needs Linux")
def test_signals_while_ranks_wait_for_one_another_hang_none(tiny: Path, tmp_path: Path):
    port = str(free_ports()[0])

    def start(rank: int) -> subprocess.Popen:
        place = {"RANK": str(rank), "LOCAL_RANK": str(rank), "WORLD_SIZE": "2"}
        where = {"MASTER_ADDR": "127.0.0.1", "MASTER_PORT": port, "OMP_NUM_THREADS": "1"}
        options = ("--init-from", tiny / "policy", "--directory", tmp_path / "run")
        data = ("--data.train", tiny / "demonstrations.jsonl", "--data.max-prompt-tokens", "32")
        command = [sys.executable, "recipes/sft_tiny.py", *options, *data]
        return subprocess.Popen([*map(str, command)], cwd=ROOT, env=os.environ | place | where)

    late, early = None, start(1)
    try:
        wait_until(lambda: has_handler(early, signal.SIGUSR1), seconds=60)
        end = time.monotonic() + 20.0
        while time.monotonic() < end:  # while it imports torch, and then waits for rank 0
            early.send_signal(signal.SIGUSR1)
            time.sleep(0.1)
        assert early.poll() is None
        late = start(0)
        assert [late.wait(120), early.wait(120)] == [EXIT_STATUS] * 2
    finally:
        for process in filter(None, (late, early)):
            process.kill()


@pytest.mark.parametrize("number", [signal.SIGHUP, signal.SIGINT])
def test_signal_that_is_ignored_in_the_background_stays_ignored(number: signal.Signals):
    signal.signal(number, signal.SIG_IGN)
    with noting_signals():
        os.kill(os.getpid(), number)
        assert not stop.is_noted()
    assert signal.getsignal(number) is signal.SIG_IGN


def test_a_block_that_leaves_at_signals_tells_the_others_first():
    told: list[tuple[str, int, bool]] = []
    with (
        pytest.raises(SystemExit) as stopped,
        leaving_at_signals(lambda line, status: told.append((line, status, stop.is_noted()))),
    ):
        os.kill(os.getpid(), signal.SIGHUP)
        time.sleep(1.0)
        pytest.fail("it went on")
    assert stopped.value.code == EXIT_STATUS
    assert told == [("stopped by a signal; the same command continues", EXIT_STATUS, True)]


def test_what_an_inner_block_noted_too_late_is_acted_on_at_its_end():
    with pytest.raises(SystemExit) as stopped, leaving_at_signals(lambda line, status: None):
        with noting_signals():
            os.kill(os.getpid(), signal.SIGINT)
            assert stop.is_noted()
        pytest.fail("the next stage began")
    assert stopped.value.code == EXIT_STATUS


def test_only_the_writer_says_that_a_run_leaves(capsys: pytest.CaptureFixture[str]):
    for is_writer in (False, True):
        with pytest.raises(SystemExit):
            stop.leave("here", is_writer=is_writer)
    assert capsys.readouterr().out == "stopped by a signal here; the same command continues\n"


def test_who_else_hears_of_signals_hears_of_them_again_after_a_block():
    reader, writer = os.pipe()
    os.set_blocking(writer, False)
    before = signal.set_wakeup_fd(writer)
    try:
        with noting_signals():
            assert signal.set_wakeup_fd(-1) != writer
        assert signal.set_wakeup_fd(before) == writer
    finally:
        signal.set_wakeup_fd(before)
        os.close(reader)
        os.close(writer)


@pytest.mark.parametrize(
    ("numbers", "moments", "num_ends"),
    [
        ([signal.SIGINT], [10.0], 0),
        ([signal.SIGINT] * 2, [10.0, 10.1], 0),  # as `timeout` sends it, once more to the group
        ([signal.SIGINT] * 2, [10.0, 10.3], 1),
        ([signal.SIGINT] * 3, [10.0, 10.1, 10.3], 1),
        ([signal.SIGTERM, signal.SIGINT, signal.SIGHUP, signal.SIGTERM], [10.0], 0),
    ],
)
def test_only_a_second_interrupt_and_a_later_one_ends_at_once(
    numbers: list[int], moments: list[float], num_ends: int, monkeypatch: pytest.MonkeyPatch
):
    ends: list[None] = []
    monkeypatch.setattr(stop, "end_interrupted", lambda: ends.append(None))
    monkeypatch.setattr(stop.time, "monotonic", iter(moments).__next__)
    reader, writer = os.pipe()
    os.write(writer, bytes([*numbers, 0]))
    stop._count_interrupts(reader)
    os.close(reader)
    os.close(writer)
    assert len(ends) == num_ends


AT_TERMINAL = """
import sys, time
from engine import stop
with stop.{block}:
    print("ready", flush=True)
    time.sleep(60)
    time.sleep(60)
"""
PROMISE = "stopping at the end of this step; Ctrl-C again ends at once"


@pytest.mark.parametrize(
    ("block", "is_told", "num_presses", "status"),
    [
        ("noting_signals()", True, 2, stop.INTERRUPTED),
        ("leaving_at_signals(lambda line, status: None)", False, 1, EXIT_STATUS),
    ],
)
def test_who_presses_ctrl_c_at_a_terminal_is_told_what_it_does(
    block: str, is_told: bool, num_presses: int, status: int
):
    mine, its = pty.openpty()
    process = subprocess.Popen(
        [sys.executable, "-c", AT_TERMINAL.format(block=block)],
        env=os.environ | {"PYTHONPATH": str(ROOT)},
        stdin=its,
        stdout=its,
        stderr=its,
        start_new_session=True,
        preexec_fn=lambda: fcntl.ioctl(0, termios.TIOCSCTTY, 0),
    )
    os.close(its)
    said = b""
    try:
        while b"ready" not in said:
            said += os.read(mine, 1000)
        for number in range(num_presses):
            os.write(mine, b"\x03")
            while number < num_presses - 1 and PROMISE.encode() not in said:
                said += os.read(mine, 1000)
            time.sleep(0.3)
        assert process.wait(30) == status
        with contextlib.suppress(OSError):  # at the end of what a terminal says
            while more := os.read(mine, 1000):
                said += more
    finally:
        process.kill()
        process.wait()
        os.close(mine)
    assert (PROMISE.encode() in said) == is_told
    assert (b"stopped by a signal" in said) == (not is_told)
    assert said.endswith(b"\x1b[?25h\r\n") == is_told  # the cursor, which a bar had hidden


OUT_OF_TIME = """
import resource
from engine import stop
hard = resource.getrlimit(resource.RLIMIT_CPU)[1]
with stop.noting_signals():
    resource.setrlimit(resource.RLIMIT_CPU, (1, hard))
    while not stop.is_noted():
        pass
    assert resource.getrlimit(resource.RLIMIT_CPU) == (hard, hard)  # or it came every second
    print("noted")
"""


def test_the_end_of_the_computing_time_is_noted_once():
    answer = subprocess.run(
        [sys.executable, "-c", OUT_OF_TIME],
        env=os.environ | {"PYTHONPATH": str(ROOT)},
        capture_output=True,
        text=True,
        timeout=120,
    )
    assert (answer.returncode, answer.stdout, answer.stderr) == (0, "noted\n", "")


def test_an_interruptible_block_is_interrupted_as_often_as_one_likes():
    with leaving_at_signals(lambda line, status: pytest.fail("it left")), interruptible():
        for _ in range(3):
            with pytest.raises(KeyboardInterrupt):
                os.kill(os.getpid(), signal.SIGINT)
                time.sleep(1.0)
            time.sleep(0.3)


def test_after_an_interruptible_block_interrupts_are_noted_and_counted_again():
    with noting_signals():
        with interruptible():
            pass
        os.kill(os.getpid(), signal.SIGINT)
        assert stop.is_noted()
        assert stop._ends_at_second


STUCK = """
import ctypes, sys
from engine import stop
with stop.noting_signals():
    print("noting", flush=True)
    ctypes.CDLL(None).sleep(60)  # no handler of Python's runs in there
    while True:
        pass
"""


def test_a_second_interrupt_ends_at_once_wherever_the_main_thread_is():
    process = subprocess.Popen(
        [sys.executable, "-c", STUCK],
        env=os.environ | {"PYTHONPATH": str(ROOT)},
        stdout=subprocess.PIPE,
        stderr=subprocess.PIPE,
        text=True,
    )
    assert process.stdout is not None
    try:
        process.stdout.readline()
        process.send_signal(signal.SIGINT)
        process.send_signal(signal.SIGINT)  # as `timeout` does, to the process and to its group
        time.sleep(1.0)
        assert process.poll() is None
        process.send_signal(signal.SIGINT)
        assert process.wait(10) == stop.INTERRUPTED
        assert process.communicate()[1] == ""
    finally:
        process.kill()  # it would compute for ever


@pytest.mark.parametrize("seconds", [0.1, 0.4])
def test_an_interrupt_while_a_recipe_is_imported_has_no_traceback(seconds: float):
    process = subprocess.Popen(
        [sys.executable, "-c", "import engine.recipe, time; time.sleep(30)"],
        env=os.environ | {"PYTHONPATH": str(ROOT)},
        stderr=subprocess.PIPE,
        text=True,
    )
    until(lambda: "stop" in maps(process) or process.poll() is not None)
    time.sleep(seconds)

    def ends_of_another() -> bool:
        """Again, for a library's `except:` may take one while it is imported."""
        process.send_signal(signal.SIGINT)
        time.sleep(0.5)
        return process.poll() is not None

    until(ends_of_another)
    assert process.wait(0) in (-signal.SIGINT, stop.INTERRUPTED)
    assert process.communicate()[1] == ""


def maps(process: subprocess.Popen) -> str:
    """Which of our files a process has come to: it has loaded an extension of what they import."""
    loaded = Path(f"/proc/{process.pid}/maps").read_text()
    return "stop" if "fcntl" in loaded or "_ctypes" in loaded or "resource" in loaded else ""


@pytest.mark.slow
@pytest.mark.parametrize("number", [signal.SIGINT, signal.SIGHUP, signal.SIGXCPU])
def test_signalled_recipe_saves_and_the_same_command_ends_it(
    number: signal.Signals, tiny: Path, tmp_path: Path
):
    command = sft_command(tiny, tmp_path / "run", "--epochs", 12, "--save-every", 0)
    run = start(command, tmp_path)
    try:
        until(lambda: steps_logged(tmp_path / "run") > 2)
        run.process.send_signal(number)
        assert run.wait(100) == EXIT_STATUS
        assert "stopped by a signal at step" in run.said()
        assert "Traceback" not in run.said()
        assert saved_step(tmp_path / "run") >= 3
    finally:
        run.end()


@pytest.mark.slow
@pytest.mark.parametrize(
    ("number", "options"),
    [
        (signal.SIGINT, []),
        (signal.SIGUSR1, ["--signals-to-handle", "SIGTERM,SIGINT,SIGHUP,SIGUSR1"]),
    ],
)
def test_signalled_torchrun_leaves_a_checkpoint_of_all_ranks(
    number: int, options: list[str], tiny: Path, tmp_path: Path
):
    """As the README has it, torchrun's own status included. That the run saves at each step shows
    nothing of the signal, so it saves at none."""
    command = sft_command(tiny, tmp_path / "run", "--epochs", 900, "--layout.tp", 2)
    launcher = [*TORCHRUN, "--standalone", "--nproc-per-node=2", *options]
    run = start([*command, "--save-every", "100000"], tmp_path, launcher=launcher)
    try:
        until(lambda: steps_logged(tmp_path / "run") > 2)
        run.process.send_signal(number)
        assert run.wait(100) == 1
        assert run.said().count("stopped by a signal at step") == 1
        assert saved_step(tmp_path / "run") == steps_logged(tmp_path / "run")
    finally:
        run.end()


@pytest.mark.slow
@pytest.mark.parametrize("number", [signal.SIGKILL, signal.SIGUSR1])
@pytest.mark.parametrize("num_ranks", [1, 2])
def test_ranks_that_torchrun_starts_anew_resume_and_end_as_if_nothing_had_been(
    num_ranks: int, number: int, tiny: Path, tmp_path: Path
):
    launcher = [*TORCHRUN, "--standalone", f"--nproc-per-node={num_ranks}", "--max-restarts=2"]

    def command(name: str) -> list[str]:
        return sft_command(tiny, tmp_path / name, "--epochs", 12, "--layout.tp", num_ranks)

    whole = start(command("whole"), tmp_path / "1", launcher=launcher)
    assert whole.wait(200) == 0, whole.said()
    run = start(command("run"), tmp_path / "2", launcher=launcher)
    try:
        until(lambda: steps_logged(tmp_path / "run") > 3)
        os.kill(run.ranks()[-1].pid, number)
        assert run.wait(300) == 0, run.said()
    finally:
        run.end()
    assert steps_logged(tmp_path / "run") == steps_logged(tmp_path / "whole")
    expected, found = (weights_of(tmp_path / name, "policy") for name in ("whole", "run"))
    assert all(expected[name].equal(found[name]) for name in expected)


@pytest.mark.slow
@pytest.mark.parametrize("number", [signal.SIGINT, signal.SIGHUP, signal.SIGTERM])
def test_answers_to_a_file_are_kept_where_a_signal_ends_them(
    number: signal.Signals, tiny: Path, tmp_path: Path
):
    out = tmp_path / "out.jsonl"
    words = ["recipes/generate.py", "--source", tiny / "policy", "--out", out]
    words += ["--prompts", tiny / "prompts.jsonl", "--num-samples", 400]
    run = start([str(word) for word in words], tmp_path)
    try:
        until(lambda: any(p.stat().st_size for p in tmp_path.glob("out.jsonl.partial/*.jsonl")))
        run.process.send_signal(number)
        assert run.wait(60) == EXIT_STATUS
        assert run.said() == "stopped by a signal; the same command continues\n"
        assert not out.exists()
    finally:
        run.end()


@pytest.mark.slow
def test_interrupt_ends_a_dialogue_politely(tiny: Path, tmp_path: Path):
    words = ["recipes/generate.py", "--source", str(tiny / "policy")]
    run = start(words, tmp_path, stdin=subprocess.PIPE)
    try:
        until(lambda: "Ctrl-D ends the dialogue" in run.said())
        time.sleep(0.5)
        run.process.send_signal(signal.SIGINT)
        assert run.wait(60) == 0
        assert "Traceback" not in run.said()
    finally:
        run.end()
