import dataclasses
import json
import os
from pathlib import Path

import pytest
import torch
import xxhash
from safetensors.torch import load_file, save_file

from engine import stop
from engine.checkpoints import checkpointer, manifest, whole
from engine.checkpoints.checkpointer import Checkpointer
from engine.checkpoints.found import find_network
from engine.checkpoints.pointers import steps_in
from engine.checkpoints.weights import load_weights
from engine.errors import UserError
from engine.ranks.parallel import Parallel
from engine.ranks.start import start_parallel
from engine.settings.layout import ParallelLayout
from engine.settings.numerics import Numerics
from engine.settings.saving import SaveConfig
from engine.training.network import build_network
from models.sizes import size_as_json
from tests.engine.checkpoints.resigned import change, resign
from tests.engine.checkpoints.small_runs import checkpointer_of, saved, training
from tests.ranks import run_ranks
from tests.tiny import SIZE, random_network


@pytest.mark.parametrize("dtype", ["fp32", "bf16", "fp16"])
def test_resumed_training_goes_on_to_the_last_bit(dtype: str, parallel: Parallel, tmp_path: Path):
    first = training(tmp_path, parallel, dtype=dtype)
    # Overflows under fp16, the first of which the scaler forgives: its state counts as well.
    results = [first.step(0), first.step(1, scale=1e38 if dtype == "fp16" else 1.0)]
    assert [result.was_skipped for result in results] == [False, dtype == "fp16"]
    first.checkpointer.save(2, {"kl_coef": 0.25})
    at_save = first.tensors()
    expected = [first.step(2, scale=1e38 if dtype == "fp16" else 1.0), first.step(3)]

    second = training(tmp_path, parallel, dtype=dtype, seed=9)
    assert second.checkpointer.resume() == {"step": 2, "kl_coef": 0.25}
    for ours, theirs in zip(second.tensors(), at_save, strict=True):
        assert ours.dtype is theirs.dtype
        assert torch.equal(ours, theirs)
    found = [second.step(2, scale=1e38 if dtype == "fp16" else 1.0), second.step(3)]
    assert repr(found) == repr(expected)  # nan, the norm of an overflow, does not equal itself
    for ours, theirs in zip(second.tensors(), first.tensors(), strict=True):
        assert torch.equal(ours, theirs)
    if dtype == "fp16":
        scales = [t.optimizer.megatron.get_loss_scale().item() for t in (first, second)]
        assert scales == [2.0**15] * 2


def test_state_behind_a_padded_bucket_is_saved_in_its_place(
    tmp_path: Path,
):
    layout = ParallelLayout(overlap_grad_reduce=True, bucket_elements=5_000)
    parallel = start_parallel(layout, seed=1)
    first = training(tmp_path, parallel)
    (buffer,) = first.optimizer.network.chunks[0].buffers
    ends = [max(buffer.param_index_map[p][1] for p in bucket.params) for bucket in buffer.buckets]
    assert any(end % 128 for end in ends[:-1])  # so that padding follows
    first.step(0)
    first.checkpointer.save(1, {})
    second = training(tmp_path, parallel, seed=9)
    second.checkpointer.resume()
    for ours, theirs in zip(second.tensors(), first.tensors(), strict=True):
        assert torch.equal(ours, theirs)
    assert repr(second.step(1)) == repr(first.step(1))


def test_checkpoint_before_the_first_step_resumes(parallel: Parallel, tmp_path: Path):
    first = training(tmp_path, parallel)
    first.checkpointer.save(0, {})
    second = training(tmp_path, parallel, seed=9)
    second.checkpointer.resume()
    assert repr(second.step(0)) == repr(first.step(0))


def test_nothing_saved_is_nothing_to_resume(parallel: Parallel, tmp_path: Path):
    assert training(tmp_path, parallel).checkpointer.resume() is None


def test_last_checkpoints_are_kept(parallel: Parallel, tmp_path: Path):
    run = checkpointer_of(random_network("language", parallel), tmp_path)
    for step in (8, 9, 10, 11):
        run.save(step, {})
        assert (tmp_path / "latest").read_text() == f"step_{step:08d}"
    names = sorted(path.name for path in tmp_path.iterdir())
    assert names == ["latest", "step_00000010", "step_00000011"]


def test_saving_a_step_again_replaces_it(parallel: Parallel, tmp_path: Path):
    run = checkpointer_of(random_network("language", parallel), tmp_path)
    run.save(3, {"x": 1})
    (tmp_path / "step_00000003" / "left_over").touch()
    run.save(3, {"x": 2})
    assert run.resume() == {"step": 3, "x": 2}
    assert not (tmp_path / "step_00000003" / "left_over").exists()


def test_latest_is_the_old_name_until_it_is_the_new_one(
    parallel: Parallel, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
):
    run = checkpointer_of(random_network("language", parallel), tmp_path)
    run.save(1, {})
    seen = []
    replace = Path.replace

    def look_and_fail(new: Path, old: Path) -> None:
        if old.name != "latest":
            replace(new, old)
            return
        assert (new.read_text(), old) == ("step_00000002", tmp_path / "latest")
        assert (tmp_path / "step_00000002" / "policy" / "network.json").exists()
        seen.append(old.read_text())
        raise OSError("the machine is gone")

    with monkeypatch.context() as patch, pytest.raises(UserError, match="machine is gone"):
        patch.setattr(Path, "replace", look_and_fail)
        run.save(2, {})
    assert set(seen) == {"step_00000001"}
    assert run.resume() == {"step": 1}


def test_run_that_was_killed_before_its_first_latest_goes_on(parallel: Parallel, tmp_path: Path):
    run = checkpointer_of(random_network("language", parallel), tmp_path)
    run.save(1, {})
    (tmp_path / "latest").unlink()
    assert run.resume() == {"step": 1}
    assert (tmp_path / "latest").read_text() == "step_00000001"  # or a second kill could leave two
    run.save(2, {})
    (tmp_path / "latest").unlink()
    with pytest.raises(UserError, match="step_00000002, step_00000001 are there: write the name"):
        run.resume()


def test_what_a_kill_left_of_the_last_save_goes_when_the_run_is_resumed(
    parallel: Parallel, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
):
    run = checkpointer_of(random_network("language", parallel), tmp_path)
    for step in (1, 2):
        run.save(step, {})

    def fail(path: Path) -> None:
        assert path.name == "step_00000001.partial"  # no checkpoint any more, as it is removed
        raise KeyboardInterrupt

    with monkeypatch.context() as patch, pytest.raises(KeyboardInterrupt):
        patch.setattr("engine.checkpoints.saving.remove", fail)
        patch.setattr("engine.checkpoints.saving._move_in", lambda old, new: old.rename(new))
        run.save(3, {})
    assert (tmp_path / "latest").read_text() == "step_00000003"
    (tmp_path / "step_00000000").mkdir()  # superseded, and not yet removed
    assert run.resume() == {"step": 3}
    names = sorted(path.name for path in tmp_path.iterdir())
    assert names == ["latest", "step_00000002", "step_00000003"]


def test_resume_removes_nothing_where_the_newest_is_damaged(parallel: Parallel, tmp_path: Path):
    run = checkpointer_of(random_network("language", parallel), tmp_path)
    for step in (1, 2):
        run.save(step, {})
    (tmp_path / "step_00000002" / "progress.json").write_text("{}")
    (tmp_path / "step_00000000").mkdir()
    assert run.resume() == {"step": 1}
    names = sorted(path.name for path in tmp_path.iterdir())
    assert names == ["latest", "step_00000000", "step_00000001", "step_00000002"]


def test_partial_checkpoint_is_not_resumed_and_makes_way(parallel: Parallel, tmp_path: Path):
    run = checkpointer_of(random_network("language", parallel), tmp_path)
    run.save(1, {})
    partial = tmp_path / "step_00000002.partial" / "policy"
    partial.mkdir(parents=True)
    (partial / "__0_0.distcp").write_bytes(b"cut short")
    assert run.resume() == {"step": 1}
    run.save(2, {})
    assert not partial.parent.exists()
    assert run.resume() == {"step": 2}


def test_partial_checkpoint_does_not_count_among_those_kept(parallel: Parallel, tmp_path: Path):
    run = checkpointer_of(random_network("language", parallel), tmp_path)
    (tmp_path / "step_00000099.partial").mkdir()
    for step in (1, 2):
        run.save(step, {})
    assert (tmp_path / "step_00000001").exists()


def test_average_is_saved_in_fp32_and_loads_as_a_network(parallel: Parallel, tmp_path: Path):
    run = training(tmp_path, parallel, dtype="bf16")
    run.step(0)
    run.step(1)
    run.checkpointer.save(2, {})
    averages = {parameter: shadow for parameter, _, shadow in run.ema.owned_shadows()}
    for dtype in ("fp32", "bf16"):
        network = build_network("language", SIZE, parallel, numerics=Numerics(dtype=dtype))
        load_weights(network, tmp_path, role="ema")
        for ours, trained in zip(
            network.modules[0].parameters(),
            run.optimizer.network.modules[0].parameters(),
            strict=True,
        ):
            assert torch.equal(ours.flatten(), averages[trained].to(network.dtype))


def test_run_of_another_tokenizer_is_not_resumed(parallel: Parallel, tmp_path: Path):
    first = training(tmp_path, parallel)
    first.checkpointer.save(1, {})
    second = training(tmp_path, parallel)
    second.checkpointer.tokenizer_fingerprint = "another"
    with pytest.raises(UserError, match="trained with another tokenizer"):
        second.checkpointer.resume()


def test_description_says_kind_size_and_tokenizer(parallel: Parallel, tmp_path: Path):
    run = saved(random_network("scalar", parallel), tmp_path, "reward_model", fingerprint="one")
    text = (find_network(run, "reward_model") / "network.json").read_text()
    assert json.loads(text) == {
        "kind": "scalar",
        "size": size_as_json(SIZE),
        "tokenizer": "one",
    }


def test_average_of_another_tokenizer_or_that_is_not_finite_is_not_resumed(
    parallel: Parallel, tmp_path: Path
):
    run = training(tmp_path, parallel)
    run.checkpointer.save(1, {})
    path = tmp_path / "step_00000001" / "ema" / "network.json"
    change(path, "tokenizer", to="another")
    resign(path.parents[1])
    with pytest.raises(UserError, match="ema: trained with another tokenizer"):
        training(tmp_path, parallel).checkpointer.resume()
    change(path, "tokenizer", to="a tokenizer")
    weights = path.with_name("weights-00000.safetensors")
    tensors = load_file(weights)
    tensors["decoder.final_layernorm.weight@0"][0] = float("nan")
    weights.unlink()
    save_file(tensors, weights)
    resign(path.parents[1])
    with pytest.raises(UserError, match="ema: weights that are not finite"):
        training(tmp_path, parallel).checkpointer.resume()


def test_checkpoints_are_kept_by_rule(parallel: Parallel, tmp_path: Path, capsys, monkeypatch):
    monkeypatch.setattr(whole, "_said", set())  # said once a process, which other tests share
    run = checkpointer_of(random_network("language", parallel), tmp_path)
    run = dataclasses.replace(
        run,
        saving=SaveConfig(keep=1, keep_every=4, keep_lowest="valid/loss", save_in_background=False),
    )
    for step, loss in ((2, 3.0), (3, 1.0), (4, 2.0), (5, 4.0), (6, 5.0)):
        run.save(step, {"metrics": {"valid/loss": loss}})
    assert (tmp_path / "step_00000005").is_dir()  # no step has shown yet that the last is good
    run.boundary(7, is_last=False)
    assert sorted(p.name for p in steps_in(tmp_path)) == [
        "step_00000003",
        "step_00000004",
        "step_00000006",
    ]
    assert capsys.readouterr().err == ""
    run.save(7, {"metrics": {"train/loss": 1.0}})
    run.save(8, {"metrics": {"train/loss": 1.0, "train/lr": 1.0}})  # said once
    run.boundary(9, is_last=False)
    (said,) = capsys.readouterr().err.splitlines()
    assert "kept by valid/loss, a metric which not every step that is saved has" in said
    assert {p.name for p in steps_in(tmp_path)} == {
        "step_00000003",
        "step_00000004",
        "step_00000008",
    }


def test_metrics_that_no_step_has_are_said_at_the_first_save(
    parallel: Parallel, tmp_path: Path, capsys, monkeypatch
):
    monkeypatch.setattr(whole, "_said", set())  # said once a process, which other tests share
    run = checkpointer_of(random_network("language", parallel), tmp_path)
    saving = SaveConfig(keep_lowest="valid/los", keep_highest="train/tokns")
    run = dataclasses.replace(run, saving=saving)
    metrics = {"train/loss": 1.0, "train/tokens": 9, "valid/loss": 2.0}
    with run:
        run.save(1, {"metrics": metrics})
    train, valid = sorted(capsys.readouterr().err.splitlines())
    assert "kept by train/tokns, " in train
    assert "this one has train/tokens, train/loss, valid/loss: name one of these" in train
    assert "kept by valid/los, " in valid
    assert "this one has valid/loss, train/loss, train/tokens: name one of these" in valid
    with run:
        run.save(2, {"metrics": metrics})
    assert capsys.readouterr().err == ""


def test_damaged_checkpoint_that_was_passed_over_makes_room(parallel: Parallel, tmp_path: Path):
    first = training(tmp_path, parallel)
    for step in (1, 2):
        first.checkpointer.save(step, {})
    (tmp_path / "step_00000002" / "progress.json").write_text("{}")
    second = training(tmp_path, parallel)
    assert second.checkpointer.resume() == {"step": 1}
    second.checkpointer.save(3, {})
    assert [p.name for p in steps_in(tmp_path)] == ["step_00000003", "step_00000001"]


def boundaries(folder: Path) -> list[tuple[int, bool, bool]]:
    """Return (step, saves, leaves) of a rank's boundaries, minutes apart by the first's clock."""
    parallel = start_parallel(ParallelLayout(), seed=1)
    clock = {"now": 1000.0}
    found = []
    with pytest.MonkeyPatch.context() as patch:
        patch.setattr(checkpointer.time, "monotonic", lambda: clock["now"])
        run = Checkpointer(
            directory=folder,
            parallel=parallel,
            networks={"policy": random_network("language", parallel)},
            optimizers={},
            saving=SaveConfig(save_every_minutes=10.0, save_every=7),
        )
        for step in range(1, 9):
            # The other rank's clock stands still, then leaps: nobody asks it.
            clock["now"] += 240.0 if parallel.rank == 0 else 0.0 if step < 5 else 10**6
            if step == 4 and parallel.rank == 1:
                patch.setattr(stop, "is_noted", lambda: True)
            boundary = run.boundary(step, is_last=step == 8)
            found.append((step, boundary.saves, boundary.leaves))
            if step == 4:
                patch.setattr(stop, "is_noted", lambda: False)
            if boundary.saves:
                run.save(step, {})
                run.finish()
    return found


def test_checkpoints_are_due_by_the_first_ranks_clock_by_steps_and_for_a_signal(tmp_path: Path):
    first, second = run_ranks(boundaries, 2, tmp_path)
    assert first == second
    assert first == [
        (1, False, False),  # after 4 minutes
        (2, False, False),
        (3, True, False),  # 12
        (4, True, True),  # a signal to the other rank; from here on anew
        (5, False, False),
        (6, False, False),
        (7, True, False),  # 12 minutes, and a multiple of 7
        (8, True, False),  # the last
    ]


def three_saves(folder: Path, parallel: Parallel) -> Checkpointer:
    run = checkpointer_of(random_network("language", parallel), folder)
    run.saving = dataclasses.replace(run.saving, keep=3)
    run = dataclasses.replace(run)
    for step in (1, 2, 3):
        run.save(step, {})
    return run


def test_a_run_that_was_set_back_does_not_go_forward_past_damage(
    parallel: Parallel, tmp_path: Path
):
    run = three_saves(tmp_path, parallel)
    (tmp_path / "latest").write_text("step_00000002")
    (tmp_path / "step_00000002" / "progress.json").write_text("{}")
    assert run.resume() == {"step": 1}
    (tmp_path / "step_00000001" / "progress.json").write_text("{}")
    with pytest.raises(UserError, match="step_00000002/progress.json: damaged"):
        run.resume()


def test_a_checkpoint_of_a_later_version_is_not_passed_over(parallel: Parallel, tmp_path: Path):
    run = three_saves(tmp_path, parallel)
    path = tmp_path / "step_00000003" / "manifest.json"
    content = json.loads(path.read_text())["manifest"] | {"format": 2}
    digest = xxhash.xxh3_128_hexdigest(json.dumps(content, sort_keys=True).encode())
    path.write_text(json.dumps({"manifest": content, "xxh3_128": digest}))
    for look in (run.resume, lambda: find_network(tmp_path, "policy")):
        with pytest.raises(UserError, match="format 2, .* take the version that wrote it"):
            look()


def test_a_network_of_another_kind_is_not_resumed(parallel: Parallel, tmp_path: Path):
    run = three_saves(tmp_path, parallel)
    path = tmp_path / "step_00000003" / "policy" / "network.json"
    path.write_text(json.dumps(json.loads(path.read_text()) | {"kind": "scalar"}))
    resign(tmp_path / "step_00000003")
    with pytest.raises(UserError, match="a scalar network, where a language one was saved"):
        run.resume()


def test_a_file_that_has_grown_is_not_read(
    parallel: Parallel, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
):
    run = three_saves(tmp_path, parallel)
    os.truncate(tmp_path / "step_00000003" / "policy" / "weights-00000.safetensors", 1 << 42)
    read = []
    digest = manifest.digest_of_file
    monkeypatch.setattr(manifest, "digest_of_file", lambda path: read.append(path) or digest(path))
    assert run.resume() == {"step": 2}
    assert "step_00000003" not in {path.parts[-3] for path in read if "weights" in path.name}
