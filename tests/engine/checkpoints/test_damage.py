"""Every file of a checkpoint, damaged in every way: the one before is taken, and that is said."""

import contextlib
import os
import shutil
from collections.abc import Callable, Iterator
from pathlib import Path

import pytest
import torch

from engine.checkpoints import whole
from engine.checkpoints.retention import step_name
from engine.errors import UserError
from tests.engine.checkpoints.stage_runs import ROLES, Resumer, resumer

STAGES = ["sft", *(pytest.param(stage, marks=pytest.mark.slow) for stage in ("rm", "ppo"))]


@pytest.fixture(scope="module")
def resumers(finished: Path, tiny: Path, tmp_path_factory: pytest.TempPathFactory) -> dict:
    folder = tmp_path_factory.mktemp("damaged")
    return {stage: resumer(stage, finished, tiny, folder) for stage in ROLES}


@pytest.fixture(params=STAGES)
def run(request: pytest.FixtureRequest, resumers: dict) -> Resumer:
    return resumers[request.param]


def flipped(*places: float) -> Callable[[Path, Resumer], None]:
    """A bit at each of some places, from 0 to 1; each bit is another."""

    def damage(path: Path, run: Resumer) -> None:
        content = bytearray(path.read_bytes())
        for number, place in enumerate(places):
            content[int(place * (len(content) - 1))] ^= 1 << (3 + number) % 8
        path.write_bytes(content)

    return damage


def cut(to: Callable[[int], int]) -> Callable[[Path, Resumer], None]:
    def damage(path: Path, run: Resumer) -> None:
        os.truncate(path, to(path.stat().st_size))

    return damage


def grow(path: Path, run: Resumer) -> None:
    with path.open("ab") as stream:
        stream.write(b"\0")


def swap(path: Path, run: Resumer) -> None:
    """With the next file of the checkpoint: of the same name, where another network has one."""
    others = [p for p in run.files() if p != path]
    sibling = next((p for p in others if p.name == path.name), others[0])
    mine, theirs = path.read_bytes(), sibling.read_bytes()
    path.write_bytes(theirs)
    sibling.write_bytes(mine)


def take_older(path: Path, run: Resumer) -> None:
    shutil.copyfile(run.before / path.relative_to(run.newest), path)


def make_folder(path: Path, run: Resumer) -> None:
    path.unlink()
    path.mkdir()


def make_pipe(path: Path, run: Resumer) -> None:
    path.unlink()
    os.mkfifo(path)


def link_elsewhere(path: Path, run: Resumer) -> None:
    """To the very bytes, outside of the checkpoint."""
    other = run.run / "elsewhere"
    path.rename(other)
    path.symlink_to(other)


def link_to(target: str) -> Callable[[Path, Resumer], None]:
    def damage(path: Path, run: Resumer) -> None:
        path.unlink()
        path.symlink_to(target)

    return damage


def clear(path: Path, run: Resumer) -> None:
    path.write_bytes(b"\0" * path.stat().st_size)


DAMAGES: dict[str, Callable[[Path, Resumer], None]] = {
    **{f"a bit at {place}": flipped(place) for place in (0.0, 0.02, 0.3, 0.77, 1.0)},
    "three bits": flipped(0.1, 0.5, 0.9),
    "cut to nothing": cut(lambda size: 0),
    "cut to a byte": cut(lambda size: 1),
    "cut to half": cut(lambda size: size // 2),
    "cut by a byte": cut(lambda size: size - 1),
    "grown": grow,
    "swapped": swap,
    "removed": lambda path, run: path.unlink(),
    "the one before's": take_older,
    "a folder": make_folder,
    "a pipe": make_pipe,
    "a link elsewhere": link_elsewhere,
    "a link to a device": link_to("/dev/zero"),
    "a link to nothing": link_to("nowhere"),
    "a link to itself": lambda path, run: link_to(path.name)(path, run),
    "cleared": clear,
}


@contextlib.contextmanager
def restored(run: Resumer) -> Iterator[None]:
    """Put the run's checkpoints back as they were, and forget what was warned of."""
    kept = run.run / "kept"
    shutil.copytree(run.checkpoints, kept, symlinks=True)
    whole._said.clear()
    try:
        yield
    finally:
        shutil.rmtree(run.checkpoints)
        (run.run / "elsewhere").unlink(missing_ok=True)
        kept.rename(run.checkpoints)


def contents(run: Resumer) -> dict[Path, bytes | None]:
    found = [run.newest / "manifest.json", *run.newest.rglob("*")]
    return {p: p.read_bytes() if p.is_file() and not p.is_symlink() else None for p in found}


@pytest.fixture
def states(run: Resumer) -> dict[int, list[torch.Tensor]]:
    """By step: what a resume from its checkpoint makes."""
    found = {}
    for folder in (run.before, run.newest):
        with restored(run):
            (run.checkpoints / "latest").write_text(folder.name)
            progress = run.resume()
            assert progress is not None
            found[progress["step"]] = [tensor.clone() for tensor in run.tensors()]
    newest, before = (found[run.step - n] for n in (0, 1))
    assert not any(torch.equal(ours, theirs) for ours, theirs in zip(newest, before, strict=True))
    return found


@pytest.mark.parametrize("name", DAMAGES)
def test_damaged_file_has_the_checkpoint_before_taken(
    name: str, run: Resumer, states: dict, capsys: pytest.CaptureFixture[str]
):
    at_first = contents(run)
    for path in run.files():
        with restored(run):
            DAMAGES[name](path, run)
            is_same = contents(run) == at_first  # two networks of one size have one description
            capsys.readouterr()
            progress = run.resume()
            said = capsys.readouterr().err
            step = run.step if is_same else run.step - 1
            assert progress is not None and progress["step"] == step, path
            for ours, theirs in zip(run.tensors(), states[step], strict=True):
                assert torch.equal(ours, theirs), path
            if is_same:
                assert said == ""
                continue
            first, second = said.splitlines()
            assert first.startswith("WARNING: ") and str(run.newest) in first
            if name != "swapped":  # the other one may be named
                assert path.name in first
            assert (
                second == f"WARNING: the run goes on from {run.before}, the newest whole checkpoint"
            )
            with pytest.raises(UserError, match="leave out --strict"):
                run.resume(strict=True)


@pytest.mark.parametrize("name", DAMAGES)
def test_damage_of_all_checkpoints_is_an_error(name: str, run: Resumer):
    for path in run.files():
        with restored(run):
            (run.before / "progress.json").write_bytes(b"")
            before = contents(run)
            DAMAGES[name](path, run)
            if contents(run) != before:
                with pytest.raises(
                    UserError, match="none other is whole, or begin in a new"
                ) as error:
                    run.resume()
                assert len(str(error.value).splitlines()) <= 2


@pytest.mark.parametrize("name", DAMAGES)
def test_damaged_weights_have_those_before_loaded(
    name: str, run: Resumer, capsys: pytest.CaptureFixture[str]
):
    at_first = contents(run)
    for role in ROLES[run.stage]:
        newest, before = (run.load(role, folder) for folder in (run.newest, run.before))
        assert not torch.equal(newest, before)
        for path in run.files():
            with restored(run):
                DAMAGES[name](path, run)
                now = contents(run)
                changed = [p for p in {*now, *at_first} if now.get(p) != at_first.get(p)]
                is_needed = any(
                    p.name == "manifest.json"
                    or (p.parent.name == role and not p.name.startswith("optimizer-"))
                    for p in changed
                )
                capsys.readouterr()
                found = run.load(role)
                said = capsys.readouterr().err
                assert torch.equal(found, before if is_needed else newest), (path, role)
                if not is_needed:
                    assert said == ""
                    continue
                assert f"WARNING: {run.before}, the newest whole checkpoint, is taken" in said
                for source, strict in (
                    (run.run, True),
                    (run.newest, False),
                    (run.newest / role, False),
                ):
                    if source.exists():
                        with pytest.raises(UserError) as error:
                            run.load(role, source, strict=strict)
                        assert len(str(error.value)) < 1_000


FOLDERS: dict[str, Callable[[Path, Resumer], None]] = {
    "removed": lambda path, run: shutil.rmtree(path),
    "empty": lambda path, run: (shutil.rmtree(path), path.mkdir())[1],
    "the one before's": lambda path, run: (
        shutil.rmtree(path),
        shutil.copytree(run.before / path.relative_to(run.newest), path),
    )[0],
    "a file": lambda path, run: (shutil.rmtree(path), path.write_text("x"))[0],
    "a pipe": lambda path, run: (shutil.rmtree(path), os.mkfifo(path))[0],
    "a link to nothing": lambda path, run: (shutil.rmtree(path), path.symlink_to("nowhere"))[0],
    "a link to itself": lambda path, run: (shutil.rmtree(path), path.symlink_to(path.name))[0],
    "a link to a device": lambda path, run: (shutil.rmtree(path), path.symlink_to("/dev"))[0],
}


@pytest.mark.parametrize("name", FOLDERS)
def test_damaged_folder_has_the_checkpoint_before_taken(
    name: str, run: Resumer, states: dict, capsys: pytest.CaptureFixture[str]
):
    roles = ROLES[run.stage]
    for path in (run.newest, *(run.newest / role for role in roles)):
        befores = {role: run.load(role, run.before) for role in roles}
        with restored(run):
            FOLDERS[name](path, run)
            capsys.readouterr()
            progress = run.resume()
            assert "WARNING: " in capsys.readouterr().err
            assert progress is not None and progress["step"] == run.step - 1
            for ours, theirs in zip(run.tensors(), states[progress["step"]], strict=True):
                assert torch.equal(ours, theirs), path
            for role in roles if path == run.newest else [path.name]:
                assert torch.equal(run.load(role), befores[role])
                with pytest.raises(UserError):
                    run.load(role, strict=True)


GARBLED = {
    **{
        f"content {content[:20]!r}": lambda path, content=content: path.write_bytes(content)
        for content in (
            b"",
            b"\0" * 13,
            b"\xff\xfe\xfa",
            b"../../elsewhere",
            b"../checkpoints/step_00000001",
            b"/etc",
            b"step_00000099",
            b"step_00000003/policy",
            b"epoch_0009",
            b"x" * 10**6,
        )
    },
    "a pipe": lambda path: (path.unlink(), os.mkfifo(path)),
    "a device": lambda path: (path.unlink(), path.symlink_to("/dev/zero")),
    "nowhere": lambda path: (path.unlink(), path.symlink_to("nowhere")),
    "itself": lambda path: (path.unlink(), path.symlink_to(path.name)),
}


@pytest.mark.parametrize("name", GARBLED)
def test_garbled_latest_has_the_newest_whole_checkpoint_taken(
    name: str, run: Resumer, states: dict, capsys: pytest.CaptureFixture[str]
):
    role = ROLES[run.stage][0]
    newest = run.load(role, run.newest)
    with restored(run):
        GARBLED[name](run.checkpoints / "latest")
        progress = run.resume()
        said = capsys.readouterr().err
        assert f"WARNING: {run.checkpoints / 'latest'}" in said
        assert f"WARNING: the run goes on from {run.newest}" in said
        assert progress is not None and progress["step"] == run.step
        assert torch.equal(run.tensors()[-1], states[progress["step"]][-1])
        assert torch.equal(run.load(role), newest)
        for folder in (run.newest, run.before):
            (folder / "manifest.json").unlink()
        for attempt in (run.resume, lambda: run.load(role)):
            with pytest.raises(UserError, match="latest"):
                attempt()
        for folder in (run.newest, run.before):
            shutil.rmtree(folder)
        for attempt in (run.resume, lambda: run.load(role)):
            with pytest.raises(UserError, match="latest"):
                attempt()


def test_latest_that_leads_through_a_link_is_read(run: Resumer):
    with restored(run):
        (run.checkpoints / "latest").rename(run.checkpoints / "pointer")
        (run.checkpoints / "latest").symlink_to("pointer")
        progress = run.resume()
        assert progress is not None and progress["step"] == run.step


def test_latest_that_is_gone_is_an_error_that_names_the_checkpoints(run: Resumer):
    with restored(run):
        (run.checkpoints / "latest").unlink()
        both = f"{run.newest.name}, {run.before.name}"
        for attempt in (run.resume, lambda: run.load(ROLES[run.stage][0])):
            with pytest.raises(UserError, match=f"gone.* {both} are there: write the name"):
                attempt()


def test_latest_that_is_a_folder_is_an_error_before_the_first_step(run: Resumer):
    with restored(run):
        (run.checkpoints / "latest").unlink()
        (run.checkpoints / "latest").mkdir()
        with pytest.raises(
            UserError, match=f"is a folder.* {run.newest.name}, .* are there: write"
        ):
            run.resume()


def test_latest_written_by_hand_may_have_fewer_digits(run: Resumer):
    with restored(run):
        (run.checkpoints / "latest").write_text(f"step_{int(run.before.name[5:])}\n")
        progress = run.resume()
        assert progress is not None and step_name(progress["step"]) == run.before.name


def test_latest_that_names_weights_alone_is_passed_over(resumers: dict, capsys):
    run = resumers["sft"]
    assert (run.checkpoints / "epoch_0001").is_dir()
    with restored(run):
        (run.checkpoints / "latest").write_text("epoch_0001")
        assert run.resume()["step"] == run.step
        assert "names epoch_0001, which holds weights alone" in capsys.readouterr().err


@pytest.mark.parametrize("name", GARBLED)
def test_garbled_selection_is_an_error(name: str, resumers: dict):
    run = resumers["sft"]
    with restored(run):
        (run.checkpoints / "selected").touch()
        GARBLED[name](run.checkpoints / "selected")
        with pytest.raises(UserError, match="selected"):
            run.load("policy")
        assert run.resume()["step"] == run.step  # which is another matter


@pytest.mark.parametrize("name", DAMAGES)
def test_damaged_selection_is_an_error(name: str, resumers: dict):
    """Nobody asked for another one."""
    run = resumers["sft"]
    selected = run.checkpoints / "epoch_0001"
    with restored(run):
        shutil.rmtree(run.newest)
        (run.checkpoints / "latest").write_text(run.before.name)
        selected.rename(run.newest)  # where the damages look
        files = [path.relative_to(run.newest) for path in run.files()]
        run.newest.rename(selected)
        (run.checkpoints / "selected").write_text("epoch_0001")
        run.load("policy")
        for file in files:
            path = selected / file
            if name in ("swapped", "the one before's"):
                shutil.copyfile(selected / files[files.index(file) - 1], path)
            else:
                kept = path.read_bytes()
                DAMAGES[name](path, run)
            with pytest.raises(UserError, match="epoch_0001"):
                run.load("policy")
            shutil.rmtree(selected)
            shutil.copytree(run.run / "kept" / "epoch_0001", selected)
            (run.run / "elsewhere").unlink(missing_ok=True)
            assert name in ("swapped", "the one before's") or path.read_bytes() == kept
