"""A run that was stopped and started again continues bit for bit, whatever stopped it."""

import dataclasses
import errno
import json
import os
import shutil
import signal
from collections.abc import Callable, Mapping
from pathlib import Path
from typing import Any

import pytest
import torch

from engine.checkpoints import saving
from engine.errors import UserError
from engine.generation.scheduler import Scheduler
from engine.metrics import Metrics
from engine.run import has_begun
from engine.settings.layout import ParallelLayout
from engine.settings.saving import SaveConfig
from engine.stop import EXIT_STATUS
from tests.ranks import START_METHOD, run_ranks
from tests.tiny import (
    EVERY_STEP,
    NUMERICS,
    ppo_config,
    rm_config,
    rows_of,
    sft_config,
    train,
    train_until,
    weights_of,
    without_measured,
)

EVERY_OTHER = SaveConfig(save_every=2)
STAGES: dict[str, tuple[Callable, dict, tuple[str, ...]]] = {
    "sft": (
        sft_config,
        {"dropout": 0.2, "epochs": 0.8, "saving": EVERY_OTHER},
        ("policy",),
    ),
    "rm": (rm_config, {"saving": EVERY_OTHER}, ("reward_model",)),
    "ppo": (
        ppo_config,
        {"iterations": 3, "saving": EVERY_STEP, "num_shown": 8, "show_every": 1},
        ("policy", "critic", "ema"),
    ),
}
LAYOUTS = {
    "tp2_sequence": ParallelLayout(tp=2, sequence_parallel=True),
    "pp2": ParallelLayout(pp=2),
    "dp2": ParallelLayout(),
}


def assert_same_run(run: Path, other: Path, roles: tuple[str, ...]) -> None:
    """Compare metrics, weights and the numbers beside them, to the last bit."""
    assert rows_of(run) == rows_of(other)
    for role in roles:
        ours, theirs = weights_of(run, role), weights_of(other, role)
        assert all(torch.equal(ours[name], theirs[name]) for name in theirs), role
    latest = (other / "checkpoints" / "latest").read_text()
    assert (run / "checkpoints" / "latest").read_text() == latest
    ours, theirs = (
        json.loads((path / "checkpoints" / latest / "progress.json").read_text())
        for path in (run, other)
    )
    for progress in (ours, theirs):
        progress["metrics"] = without_measured(progress["metrics"])
    assert ours == theirs


@pytest.fixture(scope="module")
def whole(tiny: Path, tmp_path_factory: pytest.TempPathFactory) -> Path:
    """Runs that nothing stopped: whole/STAGE."""
    folder = tmp_path_factory.mktemp("whole")
    for stage, (config, changes, _) in STAGES.items():
        train(config(tiny, folder / stage, **changes))
    return folder


@pytest.mark.parametrize("stage", STAGES)
def test_stopped_run_continues_bit_for_bit(stage: str, tiny: Path, whole: Path, tmp_path: Path):
    make_config, changes, roles = STAGES[stage]
    config = make_config(tiny, tmp_path, **changes)
    train_until(config, 2)  # the third step is logged, and lost: only two were saved
    assert len(rows_of(tmp_path)) == 3
    train(config)
    assert_same_run(tmp_path, whole / stage, roles)


def test_the_runs_move_what_a_resume_must_restore(whole: Path):
    rows = rows_of(whole / "ppo")
    assert len({row["kl/coef"] for row in rows}) == len(rows) == 3  # the adaptive controller
    assert len({row["update/ptx_loss"] for row in rows}) == 3
    policy, average = (weights_of(whole / "ppo", role) for role in ("policy", "ema"))
    assert not any(torch.equal(policy[name], average[name]) for name in policy)


def test_dropout_depends_on_the_seed_of_the_step(tiny: Path, whole: Path, tmp_path: Path):
    make_config, changes, _ = STAGES["sft"]
    train(make_config(tiny, tmp_path, **{**changes, "dropout": 0.0, "epochs": 0.2}))
    assert rows_of(tmp_path)[0]["train/loss"] != rows_of(whole / "sft")[0]["train/loss"]


def test_bf16_run_continues_bit_for_bit(tiny: Path, tmp_path: Path):
    config = ppo_config(
        tiny,
        tmp_path / "whole",
        numerics=dataclasses.replace(NUMERICS, dtype="bf16"),
        saving=EVERY_STEP,
        ema_decay=0.5,
    )
    train(config)
    stopped = dataclasses.replace(config, directory=tmp_path / "stopped")
    train_until(stopped, 1)
    train(stopped)
    assert_same_run(tmp_path / "stopped", tmp_path / "whole", ("policy", "critic", "ema"))
    # The average is fp32 in the file: bf16 would have dropped its last 16 bits.
    average = torch.cat([w.flatten() for w in weights_of(tmp_path / "whole", "ema").values()])
    assert (average != average.bfloat16().float()).float().mean() > 0.5


def test_run_whose_disk_was_full_continues_from_the_checkpoint_before(
    tiny: Path, whole: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
):
    make_config, changes, roles = STAGES["ppo"]
    config = make_config(tiny, tmp_path, **changes)
    write = saving.write_tensors
    files = []

    def write_while_there_is_room(path: Path, *content: object) -> object:
        files.append(path)
        if len(files) == 9:  # the first has five; of the second, the critic's state
            path.write_bytes(b"the beginning of a sh")
            raise OSError(errno.ENOSPC, "No space left on device", str(path))
        return write(path, *content)

    full = r"00002\.partial/critic/optimizer-00000\.safetensors: cannot be written: No space left"
    with monkeypatch.context() as patch, pytest.raises(UserError, match=full):
        patch.setattr(saving, "write_tensors", write_while_there_is_room)
        train(config)
    checkpoints = tmp_path / "checkpoints"
    assert {path.name for path in checkpoints.iterdir()} == {"latest", "step_00000001"}
    assert (checkpoints / "latest").read_text() == "step_00000001"

    train(config)
    assert_same_run(tmp_path, whole / "ppo", roles)
    names = {path.name for path in checkpoints.iterdir()}
    assert names == {"latest", "step_00000002", "step_00000003"}  # the last two are kept


@pytest.mark.parametrize("stage", STAGES)
def test_run_stopped_by_a_signal_saves_at_the_step_boundary_and_continues(
    stage: str, tiny: Path, whole: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
):
    make_config, changes, roles = STAGES[stage]
    config = make_config(tiny, tmp_path, **{**changes, "saving": SaveConfig(save_every=0)})
    log = Metrics.log

    def log_and_signal(self: Metrics, step: int, values: Mapping[str, float]) -> None:
        log(self, step, values)
        os.kill(os.getpid(), signal.SIGUSR1)

    with monkeypatch.context() as patch, pytest.raises(SystemExit) as stopped:
        patch.setattr(Metrics, "log", log_and_signal)
        train(config)
    assert stopped.value.code == EXIT_STATUS
    assert (tmp_path / "checkpoints" / "latest").read_text() == "step_00000001"
    train(config)
    assert_same_run(tmp_path, whole / stage, roles)


def test_signal_in_the_last_step_leaves_a_finished_run(
    tiny: Path, whole: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
):
    make_config, changes, roles = STAGES["rm"]
    log = Metrics.log

    def log_and_signal(self: Metrics, step: int, values: Mapping[str, float]) -> None:
        log(self, step, values)
        if "train/bias_shift" in values:
            os.kill(os.getpid(), signal.SIGTERM)

    with monkeypatch.context() as patch:
        patch.setattr(Metrics, "log", log_and_signal)
        train(make_config(tiny, tmp_path, **changes))
    assert_same_run(tmp_path, whole / "rm", roles)


def die_while_generating(files: Path, folder: Path, num_rounds: int) -> None:
    """Run PPO in a process that SIGKILL ends in its second rollout, after a few rounds of it."""
    finish_step = Scheduler.finish_step
    finished: list[int] = []

    def finish_and_die(self: Scheduler, group: int, step: Any, sampled: Any) -> Any:
        if (folder / "checkpoints" / "latest").exists():
            finished.append(group)
        if len(finished) == num_rounds:
            os.kill(os.getpid(), signal.SIGKILL)
        return finish_step(self, group, step, sampled)

    with pytest.MonkeyPatch.context() as patch:
        patch.setattr(Scheduler, "finish_step", finish_and_die)
        train(ppo_config(files, folder, **STAGES["ppo"][1]))


def test_run_killed_in_the_middle_of_a_rollout_draws_the_same_responses(
    tiny: Path, whole: Path, tmp_path: Path
):
    make_config, changes, roles = STAGES["ppo"]
    process = torch.multiprocessing.get_context(START_METHOD).Process(
        target=die_while_generating, args=(tiny, tmp_path, 10)
    )
    process.start()
    process.join(120)
    assert process.exitcode == -signal.SIGKILL
    assert (tmp_path / "checkpoints" / "latest").read_text() == "step_00000001"
    train(make_config(tiny, tmp_path, **changes))
    responses = (tmp_path / "samples.jsonl").read_text()
    assert responses == (whole / "ppo" / "samples.jsonl").read_text()
    assert len(responses.splitlines()) == 3 * 8  # every response of every iteration
    assert_same_run(tmp_path, whole / "ppo", roles)


def test_finished_run_has_nothing_left_to_do(tiny: Path, whole: Path):
    make_config, changes, _ = STAGES["sft"]
    rows = rows_of(whole / "sft")
    train(make_config(tiny, whole / "sft", **changes))
    assert rows_of(whole / "sft") == rows


def test_other_model_in_the_run_folder_is_an_error(tiny: Path, whole: Path):
    make_config, changes, _ = STAGES["rm"]
    with pytest.raises(UserError, match="/sft is a run of sft, and not of rm; give another"):
        train(make_config(tiny, whole / "sft", **changes))


def stop_and_resume(files: Path, folder: Path) -> None:
    """Under each layout, a PPO run that is stopped and one that is not: folder/LAYOUT/{...}."""
    for name, layout in LAYOUTS.items():
        whole = ppo_config(files, folder / name / "whole", layout=layout, saving=EVERY_STEP)
        train(whole)
        stopped = dataclasses.replace(whole, directory=folder / name / "stopped")
        train_until(stopped, 1)
        train(stopped)


@pytest.mark.slow
def test_two_ranks_continue_bit_for_bit(tiny: Path, tmp_path: Path):
    run_ranks(stop_and_resume, 2, tiny, tmp_path)
    for name in LAYOUTS:
        roles = ("policy", "critic", "ema")
        assert_same_run(tmp_path / name / "stopped", tmp_path / name / "whole", roles)


@pytest.mark.parametrize("lose", ["remove", "empty", "link to another disk"])
def test_run_whose_checkpoints_are_lost_does_not_begin_anew(lose: str, tiny: Path, tmp_path: Path):
    run = tmp_path / "run"
    config = sft_config(tiny, run, epochs=0.4, saving=EVERY_STEP)
    train(config)
    rows = (run / "metrics.jsonl").read_bytes()
    shutil.rmtree(run / "checkpoints")
    if lose == "empty":
        (run / "checkpoints").mkdir()
    elif lose == "link to another disk":
        (tmp_path / "other").mkdir()
        (run / "checkpoints").symlink_to(tmp_path / "other")
    for _ in range(2):
        with pytest.raises(UserError, match=f"checkpoints has no checkpoint, and {run}/newest_"):
            train(config)
    assert (run / "metrics.jsonl").read_bytes() == rows
    (run / "newest_checkpoint").unlink()  # the remedy that is named
    train(config)
    assert has_begun(run)
