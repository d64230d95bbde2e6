"""A signal is noted from a stage's start on, and all ranks leave together at the next boundary."""

import os
import re
import signal
import subprocess
import sys
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
from engine.stop import EXIT_STATUS, SIGNALS, noting_signals
from tests.ranks import run_ranks
from tests.test_slurm import free_ports, wait_until
from tests.tiny import ppo_config, rm_config, sft_config

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
