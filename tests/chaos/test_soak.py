"""Long runs take no more at their end than near their beginning: memory, descriptors, threads and
disk. Each is a process of its own, which looks at itself as it trains."""

import contextlib
import dataclasses
import json
import os
import time
from collections.abc import Mapping, Sequence
from pathlib import Path

import numpy as np
import psutil
import pytest
import torch

from benchmarks.records import append_line
from benchmarks.timing import machine
from engine import ppo, rm, sft
from engine.checkpoints.pointers import steps_in
from engine.metrics import Metrics, read_metrics
from engine.settings.alarms import AlarmConfig
from engine.settings.ppo import PPOConfig
from engine.settings.rm import RMConfig
from engine.settings.saving import SaveConfig
from engine.settings.sft import SFTConfig
from tests.chaos.killed_runs import rows, temporary_files
from tests.ranks import START_METHOD
from tests.tiny import ADAM, ppo_config, rm_config, sft_config

Config = SFTConfig | RMConfig | PPOConfig
LOOKS = 200  # at a run, evenly over its steps
SAVING = {"save_every": 5, "keep": 2, "keep_lowest": "train/loss"}
# Slow enough to learn little: what grows shall be the process, not its responses.
SLOW = dataclasses.replace(ADAM, lr=1e-6, schedule="constant")

# How much resident memory may grow over the last three quarters, by a line through the looks: 4 KiB
# a step, 8 MB in 2,000; in a short run 3 MiB, for the heap still settles.
KIB_A_STEP = 4.0
SETTLING_MIB = 3.0
LOG_KIB_A_STEP = 8.0  # of metrics, samples and TensorBoard, which keep every step
SAVING_NOW = 4  # threads, and descriptors, that a look may find more of while a save is under way


def config_of(stage: str, files: Path, directory: Path, num_steps: int) -> Config:
    """Return a run of so many steps, with all that a long one has: saves in the background, of
    which some are kept, evaluation, sample texts, TensorBoard."""
    saving = SaveConfig(**SAVING, keep_every=kept_every(num_steps))  # type: ignore[arg-type]
    if stage == "sft":
        epochs = num_steps * 8 / 30
        config: Config = sft_config(files, directory, epochs=epochs, eval_every=5)
    elif stage == "rm":
        epochs = num_steps * 6 / 18
        config = rm_config(files, directory, epochs=epochs, eval_every=5)
    else:
        saving = dataclasses.replace(saving, keep_lowest="score/kl")
        config = ppo_config(
            files,
            directory,
            iterations=num_steps,
            show_every=5,
            critic_adam=SLOW,
            # The texts of these networks are noise, and seldom end by themselves.
            alarms=AlarmConfig(min_eos_rate=0.0),
        )
    return dataclasses.replace(config, saving=saving, adam=SLOW)


def kept_every(num_steps: int) -> int:
    return max(5, num_steps // 4 // 5 * 5)


def looks_of(run: Path, step: int) -> dict[str, int]:
    """Look at this process and at its run's folder, after so many steps."""
    process = psutil.Process()
    logs = [*run.glob("*.jsonl"), *run.glob("tensorboard/*")]
    checkpoints = run / "checkpoints"
    return {
        "step": step,
        "rss_bytes": process.memory_info().rss,
        "num_descriptors": process.num_fds(),
        "num_threads": process.num_threads(),
        "log_bytes": sum(path.stat().st_size for path in logs),
        "other_bytes": bytes_beneath(run, {*logs, checkpoints}),
        "num_checkpoints": len(steps_in(checkpoints)),
    }


def bytes_beneath(folder: Path, without: set[Path]) -> int:
    """Return the bytes of the files in a folder, what is in `without` left out."""
    total = 0
    for path in folder.iterdir():
        if path not in without:
            with contextlib.suppress(FileNotFoundError):  # it was written, and has its name now
                total += bytes_beneath(path, without) if path.is_dir() else path.stat().st_size
    return total


def live(config: Config, looks: Path) -> None:
    """Train in this process, which writes down what it sees of itself."""
    torch.set_num_threads(1)
    output = os.open(looks.with_suffix(".txt"), os.O_WRONLY | os.O_CREAT)
    os.dup2(output, 1)
    os.dup2(output, 2)
    log, every = Metrics.log, 1

    def log_and_look(self: Metrics, step: int, values: Mapping[str, float]) -> None:
        nonlocal every
        log(self, step, values)
        every = max(1, self._num_steps // LOOKS)
        if (step + 1) % every == 0:
            append_line(looks, json.dumps(looks_of(config.directory, step + 1)))

    Metrics.log = log_and_look  # type: ignore[method-assign]
    {SFTConfig: sft.train, RMConfig: rm.train, PPOConfig: ppo.train}[type(config)](config)  # type: ignore[operator]


def slope(looks: Sequence[Mapping[str, int]], name: str) -> float:
    """Return what a number grows a step, by the line of least squares through the looks."""
    return float(np.polyfit([look["step"] for look in looks], [look[name] for look in looks], 1)[0])


@pytest.mark.chaos
@pytest.mark.parametrize("stage", ["sft", "rm", "ppo"])
def test_a_long_run_takes_no_more_at_its_end(
    stage: str, tiny: Path, tmp_path: Path, pytestconfig: pytest.Config
):
    num_steps = pytestconfig.getoption("--soak")
    run, path = tmp_path / stage, tmp_path / "looks.jsonl"
    config = config_of(stage, tiny, run, num_steps)
    context = torch.multiprocessing.get_context(START_METHOD)
    process = context.Process(target=live, args=(config, path))
    start = time.monotonic()
    process.start()
    process.join()
    assert process.exitcode == 0, path.with_suffix(".txt").read_text()[-2000:]
    looks = [json.loads(line) for line in path.read_text().splitlines()]
    last = looks[-1]["step"]
    later = [look for look in looks if look["step"] > last / 4]
    grown = {name: slope(later, name) for name in ("rss_bytes", "log_bytes", "other_bytes")}
    alarms = rows(run / "alarms.jsonl")
    record = {
        "soak": stage,
        "num_steps": last,
        "seconds": round(time.monotonic() - start, 1),
        "kib_a_step": {
            name.removesuffix("_bytes"): round(n / 1024, 3) for name, n in grown.items()
        },
        "num_alarms": len(alarms),
        "looks": looks[:: max(1, len(looks) // 20)] + looks[-1:],
        **machine(torch.device("cpu")),
    }
    if pytestconfig.getoption("--record"):
        append_line(Path(pytestconfig.getoption("--record")), json.dumps(record))
    print(json.dumps(record))  # what a long run is read for (pytest -s)

    num_rows = len(read_metrics(run))
    assert num_rows >= num_steps and 0 <= num_rows - last < max(1, num_rows // LOOKS)
    # There are so few records, and it looks at them so often.
    of_few_records = {"small_data", "repeated", "few_held_out", "evaluation"}
    assert {alarm["name"] for alarm in alarms} <= of_few_records
    bound = max(SETTLING_MIB * 1024, KIB_A_STEP * (last - later[0]["step"]))
    assert grown["rss_bytes"] / 1024 * (last - later[0]["step"]) < bound
    assert abs(grown["other_bytes"]) < 1.0
    assert grown["log_bytes"] < LOG_KIB_A_STEP * 1024
    middle = len(later) // 2
    for name in ("num_descriptors", "num_threads"):
        values = [look[name] for look in later]
        # One more where more of the looks fell into a save; what leaks leaks many times.
        assert np.median(values[middle:]) <= np.median(values[:middle]) + 1
        assert max(values) <= min(values) + SAVING_NOW
    # Two that are the last, one that was the best, and those of every quarter.
    assert (
        max(look["num_checkpoints"] for look in looks) <= 2 + 1 + last // kept_every(num_steps) + 1
    )
    assert temporary_files(run) == []
