"""Ranks that see different states of a file system do what the first one sees."""

import contextlib
import os
import shutil
from collections.abc import Iterator
from pathlib import Path

import pytest

from engine.checkpoints.checkpointer import Checkpointer
from engine.checkpoints.found import find_network, size_of
from engine.checkpoints.weights import load_weights
from engine.errors import UserError
from engine.ranks.first_rank import said_by_first_rank
from engine.ranks.start import start_parallel
from engine.run import require_path, start_run
from engine.settings.layout import ParallelLayout
from engine.settings.numerics import Numerics
from engine.settings.saved import save_config
from engine.settings.sft import SFTConfig
from engine.training.network import build_network
from tests.ranks import run_ranks

# Small files by which a run knows what to do.
NAMES = ("latest", "selected", "config.json", "network.json", "progress.json", "tokenizer")


@contextlib.contextmanager
def blind(is_blind: bool) -> Iterator[None]:
    """Run a block in which a rank does not see yet what others have written."""
    exists, lexists, read_text = Path.exists, os.path.lexists, Path.read_text

    def sees(path: Path, **named: object) -> bool:
        return path.name not in NAMES and exists(path, **named)  # type: ignore[arg-type]

    def read(path: Path, *arguments: object, **named: object) -> str:
        if path.name in NAMES:
            raise FileNotFoundError(path)
        return read_text(path, *arguments, **named)  # type: ignore[arg-type]

    with pytest.MonkeyPatch.context() as patch:
        if is_blind:
            patch.setattr(Path, "exists", sees)
            patch.setattr(os.path, "lexists", lambda path: lexists(path) and sees(Path(path)))
            patch.setattr(Path, "read_text", read)
        yield


def resume(files: Path, run_folder: Path, blind_rank: int) -> list[object]:
    """Return what a rank does at a start from files that one of two does not see."""
    said: list[object] = []
    rank = start_run(
        directory=run_folder,
        parallel=start_parallel(ParallelLayout(tp=2), 0),
        tokenizer=files / "tokenizer.json",
    ).parallel.rank
    with blind(rank == blind_rank):
        for step in (
            lambda: find_network(run_folder, "policy"),
            lambda: size_of(run_folder, "policy"),
            lambda: require_path(run_folder / "tokenizer", "tokenizer"),
        ):
            try:
                said.append(step())
            except UserError as error:
                said.append(str(error))
        if blind_rank == 0:
            return said
        run = start_run(
            directory=run_folder,
            parallel=start_parallel(ParallelLayout(tp=2), 0),
            tokenizer=run_folder,
        )
        said.append(run.tokenizer.fingerprint())
        size = size_of(run_folder, "policy")
        network = build_network("language", size, run.parallel, numerics=Numerics())
        load_weights(network, run_folder, role="policy")
        checkpointer = Checkpointer(
            directory=run.checkpoints,
            parallel=run.parallel,
            networks={"policy": network},
            optimizers={},
        )
        said.append(checkpointer.resume())
        with pytest.raises(UserError) as error:
            run.write_settings(SFTConfig(directory=run.directory, batch_size=12_345))
        said.append(str(error.value))
    return said


@pytest.fixture
def run_folder(tiny: Path, tmp_path: Path) -> Path:
    folder = shutil.copytree(tiny / "policy", tmp_path / "run")
    save_config(SFTConfig(directory=folder), folder / "config.json")
    return folder


def test_a_rank_that_sees_less_does_what_the_first_one_does(tiny: Path, run_folder: Path):
    first, second = run_ranks(resume, 2, tiny, run_folder, 1)
    assert first == second
    assert first[0] == find_network(run_folder, "policy")
    assert first[4]["step"] == 0
    assert "batch_size" in first[5]


def test_what_the_first_rank_does_not_see_is_an_error_of_all(tiny: Path, run_folder: Path):
    first, second = run_ranks(resume, 2, tiny, run_folder, 0)
    assert first == second
    assert ["latest is gone; step_00000000 is there" in str(text) for text in first[:2]] == [
        True,
        True,
    ]
    assert "no such file or folder" in str(first[2])


def fail() -> str:
    """Return what a rank raises where the first one has a bug."""
    try:
        said_by_first_rank(lambda: str(1 // 0))
    except (ZeroDivisionError, RuntimeError) as error:
        return repr(error)
    return "nothing"


def test_bug_on_the_first_rank_leaves_no_other_waiting():
    first, second = run_ranks(fail, 2)
    assert "ZeroDivisionError" in first
    assert second.startswith("RuntimeError") and "ZeroDivisionError" in second
