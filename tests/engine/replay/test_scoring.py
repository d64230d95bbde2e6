"""A rollout that no step was taken on is scored again: network, module and samples are named."""

import dataclasses
import math
import os
import shutil
from pathlib import Path
from typing import Any

import numpy as np
import pytest
import torch

from engine.advantage import Advantages, unsound_samples
from engine.checkpoints.manifest import digest_of_bytes, read_manifest, write_manifest
from engine.data.examples import Example
from engine.data.unit_file import read_units, units_as_bytes
from engine.errors import UserError
from engine.evidence.case import BATCH, CASE, read_case
from engine.feed import pack_for
from engine.ranks.start import start_parallel
from engine.replay.replay import replay
from engine.rollout import Rollout
from engine.score import Scored
from engine.settings.layout import ParallelLayout
from engine.settings.numerics import Numerics
from engine.settings.replay import ReplayConfig
from tests.engine.replay.planted import HUGE, PLACE, STUCK, plant
from tests.engine.test_planted_numbers import spoil_scores
from tests.ranks import run_ranks
from tests.tiny import ppo_config, train

POSITIONS = "embedding.position_embeddings"
LAYOUTS = {
    "tp2": {"layout": ParallelLayout(tp=2)},
    "dp2": {"layout": ParallelLayout()},
    "pp2": {"layout": ParallelLayout(pp=2)},
    "apart": {"layout": ParallelLayout(pp=2), "critic_layout": ParallelLayout(tp=2)},
}


def stuck_iterations(files: Path, run: Path, **changes: Any) -> str:
    """Run PPO until it ends, as no iteration has anything to learn from; return the words."""
    adams = {"adam": STUCK, "critic_adam": STUCK}
    with pytest.raises(UserError) as error:
        train(ppo_config(files, run, iterations=4, **adams, **changes))
    return str(error.value)


def said_of(folder: Path) -> str:
    said: list[str] = []
    with pytest.MonkeyPatch.context() as patch:
        patch.setattr("engine.replay.replay.say", said.append)
        replay(ReplayConfig(step=folder))
    return "\n".join(said)


def kept_in(run: Path) -> Path:
    (kept,) = (run / "skipped").iterdir()
    return kept


@pytest.mark.parametrize("dtype", ["fp32", "bf16", "fp16"])
def test_planted_place_is_named_in_its_network_alone(dtype: str, tiny: Path, tmp_path: Path):
    planted = plant(tiny, tmp_path / "planted", "policy", HUGE[dtype])
    numerics = Numerics(dtype=dtype)
    said = stuck_iterations(tiny, tmp_path / "run", reference=planted, numerics=numerics)
    assert "2 iterations in a row" in said and "step or iteration of a row" in said
    shutil.rmtree(planted)  # the run has its own copy
    kept = kept_in(tmp_path / "run")
    assert kept.name == "step_00000000_rollout"
    lines = said_of(kept).splitlines()
    assert "(ppo) was not learned from: the reference's log-probs are not finite in 8" in lines[0]
    assert lines[1].startswith("batch: episodes 8 seq") and lines[1].endswith(": ref_logprobs")
    assert lines[-1] == "reproduced"
    for sound in ("policy", "critic", "reward_model"):
        assert f"{sound}: forward: finite" in lines
    (weights,) = (line for line in lines if line.startswith("reference: weights finite"))
    assert weights.endswith(f"{PLACE}.weight")
    (found,) = (line for line in lines if line.startswith("reference: forward"))
    assert found.startswith(
        f"reference: forward, first not finite on rank 0: {PLACE} (ColumnParallelLinear), for samp"
    )
    assert "the policy's log-probs: finite" in lines and "the critic's values: finite" in lines
    for broken in ("the reference's log-probs", "the KL estimates", "the rewards"):
        assert f"{broken}: not finite in 8 of 8 responses: samples 0, 1, 2, 3, 4, 5, 6, 7" in lines


@pytest.mark.parametrize("budget", [512, 64])
def test_samples_are_named_and_no_others_of_their_micro_batch(
    budget: int, tiny: Path, tmp_path: Path
):
    # A position that only the longer responses reach.
    planted = plant(tiny, tmp_path / "planted", "policy", HUGE["fp32"], POSITIONS, row=31)
    stuck_iterations(tiny, tmp_path / "run", reference=planted, micro_batch_tokens=budget)
    kept = kept_in(tmp_path / "run")
    episodes = read_units(kept / BATCH)["episodes"]
    batches = pack_for(episodes, start_parallel(ParallelLayout(), seed=0), budget)
    read = [[index for index in b.sequence_ids.tolist() if index >= 0] for b in batches]
    reached = [[index for index in ids if len(episodes[index].tokens) > 31] for ids in read]
    first = next(number for number, ids in enumerate(reached) if ids)
    assert len(reached[first]) < len(read[first]) and (budget == 512 or len(batches) > first + 1)
    named = f"sample{'s' if len(reached[first]) > 1 else ''}"
    assert f"for {named} {', '.join(map(str, sorted(reached[first])))}: " in said_of(kept)


def test_what_was_spoiled_from_outside_is_not_reproduced_and_the_rest_to_the_last_bit(
    tiny: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture
):
    with monkeypatch.context() as patch:
        spoil_scores(patch, "values", [1], math.nan)
        config = ppo_config(tiny, tmp_path, policy_logprobs="scored")
        warm = dataclasses.replace(config.sampling, temperature=0.7)
        train(dataclasses.replace(config, sampling=warm))
    kept, taken = kept_in(tmp_path), []

    def noting(rollout: Rollout, scored: Scored, advantages: Advantages) -> dict[str, list[int]]:
        taken.append((rollout, scored, advantages))
        return unsound_samples(rollout, scored, advantages)

    monkeypatch.setattr("engine.replay.scoring.unsound_samples", noting)
    with pytest.raises(SystemExit) as leaving:
        replay(ReplayConfig(step=kept))
    assert leaving.value.code == 1
    lines = capsys.readouterr().out.partition("the rollout of step 2 ")[2].splitlines()
    assert lines[-1].startswith("NOT reproduced") and lines[1].endswith("not finite: values")
    ((rollout, scored, advantages),) = taken
    episodes = read_units(kept / "batch.safetensors")["episodes"]
    for name, column in {
        "sampled_logprobs": rollout.sampled_logprobs,
        "logprobs": scored.logprobs,
        "ref_logprobs": scored.ref_logprobs,
        "values": scored.values,
    }.items():
        was = torch.from_numpy(np.concatenate([e.fields[name] for e in episodes]))
        same = (column == was) | was.isnan()
        assert bool(same.all()) and float(was.nan_to_num().abs().sum()) > 0, name
    assert scored.raw_scores.tolist() == [e.fields["raw_score"] for e in episodes]
    assert rollout.has_eos.tolist() == [e.fields["has_eos"] for e in episodes]
    assert advantages.kl_coef == read_case(kept).numbers["kl_coef"]


def rewrite(folder: Path, name: str, content: bytes) -> None:
    """Write a file of a folder anew, and its manifest so that it agrees."""
    (folder / name).write_bytes(content)
    manifest = read_manifest(folder)
    files = {**manifest.files, name: digest_of_bytes(content)}
    write_manifest(folder, dataclasses.replace(manifest, files=files))


def test_what_is_no_rollout_of_ppo_is_an_error_in_words(
    tiny: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
):
    spoil_scores(monkeypatch, "values", [0], math.nan)
    train(ppo_config(tiny, tmp_path))
    kept = kept_in(tmp_path)
    os.rename(tmp_path / "sources", tmp_path / "elsewhere")
    with pytest.raises(UserError, match=f"{tmp_path}/sources/reference/policy: no checkpoint"):
        said_of(kept)
    case = read_case(kept)
    rewrite(kept, CASE, dataclasses.replace(case, numbers={}).as_text().encode())
    with pytest.raises(UserError, match="a rollout without its kl_coef"):
        said_of(kept)
    rewrite(kept, CASE, case.as_text().encode())
    prompt = Example(tokens=np.arange(3), prompt_length=3, fields={"has_eos": True})
    rewrite(kept, BATCH, units_as_bytes({"episodes": [prompt]}))
    with pytest.raises(UserError, match="sequences that are no responses of a rollout"):
        said_of(kept)


def test_other_sources_than_read_the_rollout_are_an_error_and_unknown_ones_are_told_of(
    tiny: Path, tmp_path: Path
):
    planted = plant(tiny, tmp_path / "planted", "policy", HUGE["fp32"])
    run = tmp_path / "run"
    stuck_iterations(tiny, run, reference=planted)
    kept, moved = kept_in(run), run / "moved"
    os.rename(kept, moved)  # as a start that is killed before its first checkpoint leaves it
    scalar = plant(tiny, tmp_path / "scalar", "reward_model", HUGE["fp32"])
    stuck_iterations(tiny, run, reward_model=scalar)
    shutil.rmtree(kept)
    os.rename(moved, kept)
    case = read_case(kept)
    with pytest.raises(UserError, match="sources/reference: not the reference that read this"):
        said_of(kept)
    rewrite(kept, CASE, dataclasses.replace(case, sources={}).as_text().encode())
    said = said_of(kept)
    for name in ("reference", "reward_model"):
        assert f"{name}: nobody knows whether {run / 'sources' / name} is the one that" in said
    found = {"reward_model": case.sources["reward_model"]}
    rewrite(kept, CASE, dataclasses.replace(case, sources=found).as_text().encode())
    with pytest.raises(UserError, match="reward_model: not the reward_model that read this"):
        said_of(kept)
    stuck_iterations(tiny, run, reference=planted)
    assert "nobody knows" not in said_of(kept)


@pytest.mark.slow
@pytest.mark.parametrize("layout", LAYOUTS)
def test_replay_on_the_ranks_of_the_run_and_on_one_process(layout: str, tiny: Path, tmp_path: Path):
    planted = plant(tiny, tmp_path / "planted", "policy", HUGE["fp32"])
    run = tmp_path / "run"
    told = run_ranks(ended_and_replayed, 2, tiny, run, planted, layout)
    assert len({message for message, _ in told}) == 1
    said, silent = (out for _, out in told)
    assert silent == "" and said.endswith("reproduced")
    alone = said_of(kept_in(run))
    for lines in (said.splitlines(), alone.splitlines()):
        assert any(
            line.startswith("reference: forward, first not finite on rank ")
            and f": {PLACE} (ColumnParallelLinear), for sample" in line
            for line in lines
        )
        for sound in ("policy", "critic", "reward_model"):
            assert f"{sound}: forward: finite" in lines
        assert any(line.startswith("the rewards: not finite in 8 of 8") for line in lines)


def ended_and_replayed(files: Path, run: Path, planted: Path, layout: str) -> tuple[str, str]:
    message = stuck_iterations(files, run, reference=planted, **LAYOUTS[layout])
    return message, said_of(kept_in(run))
