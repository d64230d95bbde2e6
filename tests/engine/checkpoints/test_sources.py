import errno
import os
import shutil
from pathlib import Path

import pytest
import torch

from engine.checkpoints import sources
from engine.checkpoints.manifest import check_files, read_manifest
from engine.checkpoints.sources import (
    Source,
    digest_of_network,
    in_words_of_source,
    naming_source,
    newest_source,
    take_source,
)
from engine.checkpoints.weights import load_weights
from engine.errors import UserError
from engine.ranks.parallel import Parallel
from engine.ranks.start import start_parallel
from engine.settings.layout import ParallelLayout
from tests.engine.checkpoints.small_runs import training, weights
from tests.ranks import run_ranks
from tests.tiny import random_network


@pytest.fixture
def parallel() -> Parallel:
    return start_parallel(ParallelLayout(), 0)


@pytest.fixture
def run(parallel: Parallel, tmp_path: Path) -> Path:
    """A run of two checkpoints, step 1 and step 2, with optimizer state and an average."""
    made = training(tmp_path / "run" / "checkpoints", parallel)
    for step in (1, 2):
        made.step(step)
        made.checkpointer.save(step, {})
    return tmp_path / "run"


def newest(run: Path) -> Path:
    return run / "checkpoints" / (run / "checkpoints" / "latest").read_text()


def loaded(path: Path, parallel: Parallel, role: str = "policy") -> dict[str, torch.Tensor]:
    network = random_network("language", parallel, seed=9)
    load_weights(network, path, role=role, strict=True)
    return weights(network)


def assert_equal(ours: dict[str, torch.Tensor], theirs: dict[str, torch.Tensor]) -> None:
    assert ours.keys() == theirs.keys()
    assert all(torch.equal(ours[name], theirs[name]) for name in theirs)


def test_copy_is_a_whole_checkpoint_of_the_networks_weights_alone(
    run: Path, parallel: Parallel, tmp_path: Path
):
    copy = tmp_path / "copy"
    source = take_source(run, "policy", copy, strict=True)
    assert (source.step, source.network, source.is_linked) == (2, "policy", True)
    assert source.checkpoint == str(newest(run))
    assert set(source.roles) == {"policy", "ema"}
    manifest = read_manifest(copy)
    assert sorted(manifest.files) == [
        "policy/network.json",
        "policy/tensors.json",
        "policy/weights-00000.safetensors",
    ]
    assert manifest.step is None
    assert check_files(copy, manifest, manifest.files) == ""
    assert_equal(loaded(copy, parallel), loaded(run, parallel))
    ours, theirs = (f / "policy" / "weights-00000.safetensors" for f in (copy, newest(run)))
    assert ours.samefile(theirs)
    shutil.rmtree(run)
    assert len(loaded(copy, parallel)) > 10


@pytest.mark.parametrize("cause", [errno.EXDEV, errno.EPERM, errno.EMLINK, errno.EOPNOTSUPP])
def test_what_cannot_be_linked_is_copied(
    cause: int, run: Path, parallel: Parallel, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
):
    def refuse(*paths: object) -> None:
        raise OSError(cause, os.strerror(cause))

    monkeypatch.setattr(os, "link", refuse)
    source = take_source(run, "policy", tmp_path / "copy", strict=True)
    assert not source.is_linked
    assert_equal(loaded(tmp_path / "copy", parallel), loaded(run, parallel))
    ours = tmp_path / "copy" / "policy" / "weights-00000.safetensors"
    assert ours.stat().st_nlink == 1
    assert not list(tmp_path.rglob("*.partial"))


def test_another_file_system_has_a_copy(run: Path, parallel: Parallel, tmp_path: Path):
    memory = Path("/dev/shm")
    if not memory.is_dir() or memory.stat().st_dev == tmp_path.stat().st_dev:
        pytest.skip("no second file system here")
    copy = memory / f"trident-test-{os.getpid()}"
    try:
        assert not take_source(run, "policy", copy, strict=True).is_linked
        assert_equal(loaded(copy, parallel), loaded(run, parallel))
    finally:
        shutil.rmtree(copy, ignore_errors=True)


def test_folder_of_a_network_is_taken_under_the_role_that_it_is_to_have(
    run: Path, parallel: Parallel, tmp_path: Path
):
    source = take_source(newest(run) / "ema", "policy", tmp_path / "copy", strict=True)
    assert source.network == "ema"
    assert_equal(loaded(tmp_path / "copy", parallel), loaded(newest(run) / "ema", parallel))


def test_digest_is_the_same_of_a_copy_and_another_after_training(run: Path, tmp_path: Path):
    source = take_source(run, "policy", tmp_path / "copy", strict=True)
    assert newest_source(run, "policy") == (2, source.xxh3_128)
    assert digest_of_network(read_manifest(tmp_path / "copy"), "policy") == source.xxh3_128
    (run / "checkpoints" / "latest").write_text("step_00000001")
    step, digest = newest_source(run, "policy")
    assert step == 1
    assert digest != source.xxh3_128


def damage_newest(run: Path) -> Path:
    path = newest(run) / "policy" / "weights-00000.safetensors"
    content = bytearray(path.read_bytes())
    content[-1] ^= 1
    path.write_bytes(bytes(content))
    return path


def test_damaged_newest_is_passed_over_with_a_warning_or_refused(
    run: Path, tmp_path: Path, capsys: pytest.CaptureFixture[str]
):
    path = damage_newest(run)
    with pytest.raises(UserError, match="step_00000001 is whole: name that") as refused:
        take_source(run, "policy", tmp_path / "a", strict=True)
    assert str(refused.value).startswith(f"{path}: damaged")
    source = take_source(run, "policy", tmp_path / "b", strict=False)
    assert source.step == 1
    assert f"{path}: damaged" in capsys.readouterr().err
    with pytest.raises(UserError, match="damaged"):
        take_source(newest(run), "policy", tmp_path / "c", strict=False)


def test_file_that_is_gone_or_leads_elsewhere_is_refused(run: Path, tmp_path: Path):
    path = newest(run) / "policy" / "weights-00000.safetensors"
    path.rename(tmp_path / "elsewhere")
    with pytest.raises(UserError, match=f"{path}: no such file"):
        take_source(newest(run), "policy", tmp_path / "copy", strict=True)
    path.symlink_to(tmp_path / "elsewhere")
    with pytest.raises(UserError, match=f"{path}: a link that leads out"):
        take_source(newest(run), "policy", tmp_path / "copy", strict=True)


def test_run_that_still_trains_gives_its_next_checkpoint(
    run: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
):
    """Its newest is removed in the middle of being taken, as a newer one has come."""
    link, (latest, folder) = sources._link, (run / "checkpoints" / "latest", newest(run))
    taken = []

    def prune_and_link(path: Path, copy: Path, num_bytes: int) -> bool:
        taken.append(path)
        if len(taken) == 2:
            latest.write_text("step_00000001")
            shutil.rmtree(folder)
        return link(path, copy, num_bytes)

    monkeypatch.setattr(sources, "_link", prune_and_link)
    source = take_source(run, "policy", tmp_path / "copy", strict=True)
    assert source.step == 1
    manifest = read_manifest(tmp_path / "copy")
    assert check_files(tmp_path / "copy", manifest, manifest.files) == ""


def test_pointer_that_moves_while_it_is_read_is_read_again(
    run: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
):
    look, looks = sources.candidates_at, []

    def look_late(path: Path, role: str) -> dict:
        looks.append(path)
        if len(looks) == 1:
            raise UserError("latest: names step_00000000, which is not there")
        return look(path, role)

    monkeypatch.setattr(sources, "candidates_at", look_late)
    assert take_source(run, "policy", tmp_path / "copy", strict=True).step == 2


def test_checkpoints_that_come_and_go_for_ever_are_an_error(
    run: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
):
    def vanish(*arguments: object) -> Source:
        raise sources._Gone

    monkeypatch.setattr(sources, "_copied", vanish)
    with pytest.raises(UserError, match="come and go; name one of them that is kept"):
        take_source(run, "policy", tmp_path / "copy", strict=True)


def test_errors_about_a_copy_name_what_it_is_a_copy_of(run: Path, tmp_path: Path):
    copy = tmp_path / "copy"
    source = take_source(newest(run) / "ema", "policy", copy, strict=True)
    said = in_words_of_source(f"{copy}/policy/x and {copy}/manifest.json", source, copy, "policy")
    assert said == f"{newest(run)}/ema/x and {newest(run)}/manifest.json"
    with (
        pytest.raises(UserError, match=f"^{newest(run)}: bad$"),
        naming_source(source, copy, "policy"),
    ):
        raise UserError(f"{copy}: bad")


def take_on_ranks(run: Path, copy: Path) -> tuple[Source, str]:
    """Return what a rank learns of a copy, and what it hears of a missing one."""
    start_parallel(ParallelLayout(), 0)
    source = take_source(run, "policy", copy, strict=True)
    with pytest.raises(UserError) as refused:
        take_source(run / "nothing", "policy", copy.with_name("none"), strict=True)
    return source, str(refused.value)


def test_ranks_take_a_copy_together(run: Path, tmp_path: Path):
    first, second = run_ranks(take_on_ranks, 2, run, tmp_path / "copy")
    assert first == second
    assert first[0].step == 2
    assert "no checkpoint of a policy here" in first[1]
