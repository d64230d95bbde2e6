"""What is written while training goes on, and what becomes of it when something fails."""

import errno
import json
import os
import threading
import time
from collections.abc import Iterator
from pathlib import Path

import pytest
import torch

from engine.checkpoints import saving
from engine.checkpoints.checkpointer import Checkpointer
from engine.checkpoints.manifest import check_files, read_manifest
from engine.checkpoints.saving import clear_leftovers, remove
from engine.errors import UserError
from engine.ranks.parallel import Parallel
from engine.ranks.start import start_parallel
from engine.settings.layout import ParallelLayout
from engine.settings.saving import SaveConfig
from engine.training.optimizer import Optimizer
from tests.engine.checkpoints.small_runs import Training, training
from tests.ranks import run_ranks
from tests.tiny import ADAM, random_network


def background_training(directory: Path, parallel: Parallel, *, seed: int = 0) -> Training:
    run = training(directory, parallel, seed=seed)
    run.checkpointer = Checkpointer(
        directory=directory,
        parallel=parallel,
        saving=SaveConfig(),
        networks=run.checkpointer.networks,
        optimizers=run.checkpointer.optimizers,
        ema=run.ema,
    )
    return run


class Gate:
    """Holds writers before a file's first byte, until it is opened."""

    def __init__(self, patch: pytest.MonkeyPatch) -> None:
        self._opened, self.num_waiting = threading.Event(), 0
        write = saving.write_tensors

        def wait_and_write(*arguments):  # type: ignore[no-untyped-def]
            self.num_waiting += 1
            assert self._opened.wait(100)
            return write(*arguments)

        patch.setattr(saving, "write_tensors", wait_and_write)

    def open(self) -> None:
        self._opened.set()


@pytest.fixture
def gate(monkeypatch: pytest.MonkeyPatch) -> Iterator[Gate]:
    found = Gate(monkeypatch)
    yield found
    found.open()


def whole(folder: Path) -> bool:
    manifest = read_manifest(folder)
    return not check_files(folder, manifest, manifest.files)


def test_training_goes_on_while_a_checkpoint_of_before_is_written(
    gate: Gate, parallel: Parallel, tmp_path: Path
):
    run = background_training(tmp_path, parallel)
    run.step(0)
    at_save = run.tensors()
    folder = run.checkpointer.save(1, {"kl_coef": 0.5})
    results = [run.step(1), run.step(2)]  # all while the writer waits
    assert not folder.exists() and not (tmp_path / "latest").exists()
    assert not run.checkpointer._saver.finish(0.0)
    gate.open()
    run.checkpointer.finish()
    assert (tmp_path / "latest").read_text() == folder.name and whole(folder)

    other = background_training(tmp_path, parallel, seed=9)
    assert other.checkpointer.resume() == {"step": 1, "kl_coef": 0.5}
    for ours, theirs in zip(other.tensors(), at_save, strict=True):
        assert torch.equal(ours, theirs)
    assert repr([other.step(1), other.step(2)]) == repr(results)


def test_next_save_waits_for_the_one_before(gate: Gate, parallel: Parallel, tmp_path: Path):
    run = background_training(tmp_path, parallel)
    run.checkpointer.save(1, {})
    events: list[str] = []

    def save_next() -> None:
        run.checkpointer.save(2, {})
        events.append("second begun")

    while gate.num_waiting < 1:
        time.sleep(0.001)
    thread = threading.Thread(target=save_next)
    thread.start()
    time.sleep(0.2)
    assert events == []
    gate.open()
    thread.join()
    run.checkpointer.finish()
    assert whole(tmp_path / "step_00000001") and whole(tmp_path / "step_00000002")
    both = f"{tmp_path / 'step_00000002'} (older ones beside it: step_00000001)"
    assert run.checkpointer.newest() == both


def test_exception_in_training_is_not_hidden_and_the_save_becomes_whole(
    gate: Gate, parallel: Parallel, tmp_path: Path
):
    run = background_training(tmp_path, parallel)
    opener = threading.Timer(0.2, gate.open)
    with pytest.raises(ZeroDivisionError), run.checkpointer:
        folder = run.checkpointer.save(1, {})
        opener.start()
        raise ZeroDivisionError
    assert whole(folder) and (tmp_path / "latest").read_text() == folder.name


def test_failed_save_does_not_hide_an_exception_in_training(
    parallel: Parallel, tmp_path: Path, monkeypatch: pytest.MonkeyPatch, capsys
):
    run = background_training(tmp_path, parallel)
    monkeypatch.setattr(saving, "write_tensors", failing(errno.ENOSPC))
    with pytest.raises(ZeroDivisionError), run.checkpointer:
        run.checkpointer.save(1, {})
        raise ZeroDivisionError
    said = capsys.readouterr().err
    assert "WARNING: the last checkpoint was not written" in said and "No space left" in said


def test_leaving_the_block_waits_for_the_last_save(gate: Gate, parallel: Parallel, tmp_path: Path):
    run = background_training(tmp_path, parallel)
    threading.Timer(0.2, gate.open).start()
    with run.checkpointer:
        folder = run.checkpointer.save(1, {})
    assert whole(folder)


def failing(number: int):  # type: ignore[no-untyped-def]
    def fail(path: Path, *arguments: object) -> None:
        path.write_bytes(b"a beginning")
        raise OSError(number, os.strerror(number), str(path))

    return fail


FAILURES = {
    "ENOSPC": "No space left",
    "EACCES": "Permission denied",
    "EMFILE": "Too many open files",
}


@pytest.mark.parametrize("name", FAILURES)
def test_failure_is_raised_at_the_next_boundary_and_the_last_checkpoint_stays(
    name: str, parallel: Parallel, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
):
    run = background_training(tmp_path, parallel)
    run.checkpointer.save(1, {})
    run.checkpointer.finish()
    with monkeypatch.context() as patch:
        patch.setattr(saving, "write_tensors", failing(getattr(errno, name)))
        run.checkpointer.save(2, {})
        while not run.checkpointer._saver.has_failed:
            time.sleep(0.001)
        said = rf"weights-00000\.safetensors: cannot be written: {FAILURES[name]}"
        with pytest.raises(UserError, match=said) as error:
            run.checkpointer.boundary(2, is_last=False)
    assert len(str(error.value).splitlines()) == 1
    run.checkpointer.finish()  # it was said once
    assert sorted(p.name for p in tmp_path.iterdir()) == ["latest", "step_00000001"]
    assert whole(tmp_path / "step_00000001")
    assert background_training(tmp_path, parallel).checkpointer.resume() == {"step": 1}


@pytest.mark.parametrize("name", FAILURES)
def test_failure_of_the_last_save_is_raised_by_finish(
    name: str, parallel: Parallel, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
):
    run = background_training(tmp_path, parallel)
    monkeypatch.setattr(saving, "write_tensors", failing(getattr(errno, name)))
    with pytest.raises(UserError, match=FAILURES[name]), run.checkpointer:
        run.checkpointer.save(1, {})
    assert list(tmp_path.iterdir()) == []


@pytest.mark.parametrize("what", ["write_manifest", "sync_folder", "_move_in"])
def test_failure_of_what_the_first_rank_writes_is_raised_too(
    what: str, parallel: Parallel, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
):
    def fail(*arguments: object) -> None:
        raise OSError(errno.ENOSPC, "No space left on device")

    run = background_training(tmp_path, parallel)
    with monkeypatch.context() as patch, pytest.raises(UserError, match="cannot be written: No sp"):
        patch.setattr(saving, what, fail)
        run.checkpointer.save(1, {})
        run.checkpointer.finish()
    assert list(tmp_path.iterdir()) == []
    run.checkpointer.save(1, {})
    run.checkpointer.finish()
    assert whole(tmp_path / "step_00000001")


def test_folder_that_cannot_be_made_is_an_error_at_once(parallel: Parallel, tmp_path: Path):
    run = background_training(tmp_path / "file" / "checkpoints", parallel)
    (tmp_path / "file").touch()
    with pytest.raises(UserError, match="cannot be written: Not a directory"):
        run.checkpointer.save(1, {})


def failure_of_one(folder: Path, failing_rank: int) -> dict[str, str]:
    """Return what a rank hears at a boundary and at the end, where one cannot write."""
    parallel = start_parallel(ParallelLayout(), seed=1)
    network = random_network("language", parallel)
    checkpointer = Checkpointer(
        directory=folder,
        parallel=parallel,
        networks={"policy": network},
        optimizers={"policy": Optimizer(network, ADAM, total_steps=9)},
    )
    heard = {}
    with pytest.MonkeyPatch.context() as patch:
        if parallel.rank == failing_rank:
            patch.setattr(saving, "write_tensors", failing(errno.ENOSPC))
        checkpointer.save(1, {})
        step = 1
        try:
            while True:  # every rank trains on until all have heard
                step += 1
                checkpointer.boundary(step, is_last=False)
        except UserError as error:
            heard["boundary"] = f"{step}: {error}"
        checkpointer.save(step, {})
        try:
            checkpointer.finish()
        except UserError as error:
            heard["finish"] = str(error)
    checkpointer.save(step, {})
    checkpointer.finish()
    heard["newest"] = checkpointer.newest()
    return heard


@pytest.mark.parametrize("failing_rank", [0, 1])
def test_failure_on_one_rank_is_raised_at_the_same_boundary_on_all(
    failing_rank: int, tmp_path: Path
):
    first, second = run_ranks(failure_of_one, 2, tmp_path, failing_rank)
    assert first == second
    assert f"{failing_rank:05d}.safetensors: cannot be written: No space left" in first["boundary"]
    assert "No space left" in first["finish"]
    assert whole(Path(first["newest"]))
    assert len(list(tmp_path.iterdir())) == 2


def test_saving_a_step_again_replaces_it_only_when_the_new_one_is_whole(
    gate: Gate, parallel: Parallel, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
):
    run = background_training(tmp_path, parallel)
    gate.open()
    run.checkpointer.save(3, {"kl_coef": 1.0})
    run.checkpointer.finish()
    with monkeypatch.context() as patch, pytest.raises(UserError):
        patch.setattr(saving, "write_tensors", failing(errno.ENOSPC))
        run.checkpointer.save(3, {"kl_coef": 2.0})
        run.checkpointer.finish()
    assert json.loads((tmp_path / "step_00000003/progress.json").read_text())["kl_coef"] == 1.0
    run.checkpointer.save(3, {"kl_coef": 3.0})
    run.checkpointer.finish()
    assert json.loads((tmp_path / "step_00000003/progress.json").read_text())["kl_coef"] == 3.0
    assert sorted(p.name for p in tmp_path.iterdir()) == ["latest", "step_00000003"]


def test_rank_that_owns_nothing_writes_nothing(parallel: Parallel, tmp_path: Path):
    checkpointer = Checkpointer(
        directory=tmp_path, parallel=parallel, networks={}, optimizers={}, saving=SaveConfig()
    )
    checkpointer.save(3, {"kl_coef": 0.5})
    checkpointer.finish()
    assert checkpointer.resume() == {"step": 3, "kl_coef": 0.5}


def test_leftovers_of_killed_runs_are_cleared_and_what_was_to_be_replaced_comes_back(
    tmp_path: Path,
):
    (tmp_path / "step_00000002.partial" / "policy").mkdir(parents=True)
    (tmp_path / "step_00000003.partial").touch()  # a file
    (tmp_path / "elsewhere").mkdir()
    (tmp_path / "elsewhere" / "kept").touch()
    (tmp_path / "step_00000004.partial").symlink_to("elsewhere")
    (tmp_path / ".latest.0123.partial").touch()
    for name in ("step_00000005.replaced", "step_00000006.replaced", "step_00000006"):
        (tmp_path / name).mkdir()
        (tmp_path / name / name).touch()
    clear_leftovers(tmp_path)
    found = sorted(str(p.relative_to(tmp_path)) for p in tmp_path.rglob("*"))
    assert found == [
        "elsewhere",
        "elsewhere/kept",
        "step_00000005",
        "step_00000005/step_00000005.replaced",
        "step_00000006",
        "step_00000006/step_00000006",
    ]
    clear_leftovers(tmp_path / "nowhere")


def test_run_killed_while_it_replaced_a_checkpoint_resumes_from_the_old_one(
    parallel: Parallel, tmp_path: Path
):
    run = training(tmp_path, parallel)
    folder = run.checkpointer.save(3, {})
    folder.rename(tmp_path / "step_00000003.replaced")
    (tmp_path / "step_00000003.partial").mkdir()
    assert training(tmp_path, parallel).checkpointer.resume() == {"step": 3}
    assert sorted(p.name for p in tmp_path.iterdir()) == ["latest", "step_00000003"]


def test_leftovers_that_cannot_be_cleared_are_one_line(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch
):
    def refuse(path: Path) -> None:
        raise PermissionError(errno.EACCES, "Permission denied", str(path))

    (tmp_path / "a.partial").mkdir()
    monkeypatch.setattr(saving, "remove", refuse)
    with pytest.raises(UserError, match=r"a\.partial: cannot be written: Permission denied"):
        clear_leftovers(tmp_path)


def test_removing_a_link_leaves_what_it_leads_to(tmp_path: Path):
    (tmp_path / "folder").mkdir()
    (tmp_path / "folder" / "kept").touch()
    (tmp_path / "link").symlink_to("folder")
    remove(tmp_path / "link")
    remove(tmp_path / "nowhere")
    assert (tmp_path / "folder" / "kept").exists()
    remove(tmp_path / "folder")
    assert list(tmp_path.iterdir()) == []


def test_everything_is_synced_before_latest_names_it(
    parallel: Parallel, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
):
    """At the moment `latest` changes, every file and folder of the checkpoint has been synced."""
    synced: set[int] = set()
    sync, replace = os.fsync, Path.replace

    def note(number: int) -> None:
        synced.add(os.fstat(number).st_ino)
        sync(number)

    def look(new: Path, old: Path) -> None:
        if old.name == "latest":
            folder = old.with_name(new.read_text())
            paths = [folder, *folder.rglob("*"), old.parent, new]
            assert len(paths) == 14  # seven files of two networks, two more, and folders
            assert [p for p in paths if p.stat().st_ino not in synced] == []
            seen.append(folder.name)
        replace(new, old)

    seen: list[str] = []
    run = training(tmp_path, parallel)
    monkeypatch.setattr(os, "fsync", note)
    monkeypatch.setattr(Path, "replace", look)
    run.checkpointer.save(1, {})
    assert seen == ["step_00000001"]
