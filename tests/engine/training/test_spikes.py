"""What a spike is: far above the median of the steps before it that were taken."""

import dataclasses
import json
import math
from pathlib import Path

import pytest

from engine import sft
from engine.settings.saving import SaveConfig
from engine.settings.sft import SFTConfig, SFTData
from engine.settings.spikes import SpikeConfig
from engine.training.optimizer import Optimizer
from engine.training.spikes import Spike, SpikeWatch, losses_of
from tests.engine.planted_spikes import alarms_of
from tests.tiny import ADAM, rows_of, train, write_lines

CONFIG = SpikeConfig(policy="skip", norm_factor=10.0, window=4, warmup=3, max_in_a_row=2)


def seen(watch: SpikeWatch, norms: list[float]) -> list[bool]:
    return [watch.sees_spike(norm, {}) for norm in norms]


def test_nothing_is_a_spike_before_the_warm_up_has_passed():
    assert seen(SpikeWatch(CONFIG), [1.0, 1e9, 1.0, 1.0]) == [False] * 4


def test_spike_is_above_so_many_times_the_median_of_the_window():
    watch = SpikeWatch(CONFIG)
    seen(watch, [1e9, 1.0, 2.0, 3.0, 3.0])  # the first has left the window: 1, 2, 3, 3
    assert seen(watch, [25.0]) == [False]  # 2.5 is between the two in the middle
    assert seen(watch, [30.0, 33.0]) == [False, False]  # of 2, 3, 3, 25; then of 3, 3, 25, 30
    assert seen(watch, [276.0]) == [True]
    assert watch.take() == [Spike("gradient norm", 276.0, 27.5)]
    assert watch.take() == []


def test_median_forgets_no_step_for_a_spike():
    watch = SpikeWatch(CONFIG)
    seen(watch, [1.0, 1.0, 1.0, 50.0, 50.0, 50.0])
    assert seen(watch, [9.0, 11.0]) == [False, True]
    assert watch.spiked.total == 4 and watch.spiked.in_a_row == 1
    assert not watch.spiked.is_stuck
    seen(watch, [11.0])
    assert watch.spiked.is_stuck and watch.has_to_stop


def test_each_loss_has_a_median_of_its_own_and_is_looked_at_by_option_only():
    losses = {"loss": 2.0, "pretrain_loss": 20.0}
    watch = SpikeWatch(dataclasses.replace(CONFIG, loss_factor=3.0))
    assert watch.reads_losses and not SpikeWatch(CONFIG).reads_losses
    for _ in range(3):
        assert not watch.sees_spike(1.0, losses)
    assert not watch.sees_spike(1.0, {"loss": 5.9, "pretrain_loss": 59.0})
    assert watch.sees_spike(1.0, {"loss": 7.0, "pretrain_loss": 20.0})
    assert watch.take() == [Spike("loss", 7.0, 2.0)]


def test_losses_that_can_be_judged_are_those_that_are_positive():
    metrics = {"policy_loss": -0.1, "value_loss": 1.0, "ptx_loss": 2.0, "ratio_max": 3.0}
    assert losses_of(metrics) == {"value_loss": 1.0, "ptx_loss": 2.0}


def test_numbers_that_are_mostly_zero_or_not_finite_are_no_measure():
    watch = SpikeWatch(dataclasses.replace(CONFIG, loss_factor=2.0))
    for _ in range(5):
        assert not watch.sees_spike(0.0, {"loss": math.nan})
    assert not watch.sees_spike(3.0, {"loss": 5.0})


def test_without_a_policy_nothing_is_remembered():
    watch = SpikeWatch(SpikeConfig())
    assert seen(watch, [1.0] * 200 + [1e9]) == [False] * 201
    assert watch.state_dict()["recent"] == {}


def test_resumed_watch_sees_what_one_that_went_on_does():
    norms = [0.1 + 0.2, 1 / 3, 0.7, 1e-5, 2.0, 90.0, 0.5, 0.25]
    whole, first = SpikeWatch(CONFIG), SpikeWatch(CONFIG)
    expected = seen(whole, norms)
    assert True in expected
    for cut in range(len(norms)):
        first = SpikeWatch(CONFIG)
        begun = seen(first, norms[:cut])
        state = json.loads(json.dumps(first.state_dict()))
        first.sees_spike(0.3, {})  # what was taken does not move with the watch
        resumed = SpikeWatch(CONFIG)
        resumed.load_state_dict(state)
        assert begun + seen(resumed, norms[cut:]) == expected
        assert resumed.state_dict() == whole.state_dict()


def test_checkpoint_of_a_run_that_watched_for_none_is_taken():
    watch = SpikeWatch(CONFIG)
    seen(watch, [1.0, 2.0, 3.0])
    watch.load_state_dict({})
    assert watch.state_dict() == {"recent": {}, "spiked": {**watch.spiked.state_dict()}}
    assert watch.spiked.total == 0


OUTLIER = 19  # the step that has it; all before it learn one and the same text


def spoiled_file(tiny: Path, folder: Path, batch_size: int) -> SFTConfig:
    """Return 24 steps on one demonstration again and again, and once on another."""
    config = SFTConfig(
        directory=folder / "run",
        init_from=tiny / "policy",
        data=SFTData(train=folder / "demonstrations.jsonl", valid_fraction=0.0),
        epochs=1.0,
        batch_size=batch_size,
        micro_batch_tokens=96,
        adam=dataclasses.replace(ADAM, lr=3e-3),
        dropout=0.0,
        saving=SaveConfig(save_every=8),
    )
    records = [{"prompt": "the mill", "response": "is cheap near the river"}] * 24
    order = sft.EpochOrder(24, batch_size, config.seed)
    for index in order.indices(OUTLIER):
        records[index] = {"prompt": "fish", "response": "pub a and serves fish and and a"}
    write_lines(folder / "demonstrations.jsonl", records)
    return config


@pytest.mark.parametrize("policy", ["skip", "rewind"])
def test_batch_of_a_huge_loss_is_left_out_before_it_is_applied(
    policy: str, tiny: Path, tmp_path: Path
):
    config = spoiled_file(tiny, tmp_path, 1)
    spikes = SpikeConfig(
        policy=policy,  # type: ignore[arg-type]
        warmup=4,
        window=8,
        loss_factor=3.0,
        norm_factor=1e6,
    )
    train(dataclasses.replace(config, directory=tmp_path / "all"))
    assert (
        rows_of(tmp_path / "all")[OUTLIER]["train/loss"]
        > 10 * (rows_of(tmp_path / "all")[OUTLIER - 1]["train/loss"])
    )
    train(dataclasses.replace(config, spikes=spikes))
    said, *more = alarms_of(config.directory)
    assert f"step {OUTLIER}: the loss of the policy is" in said["message"]
    assert len(more) == (policy == "rewind")  # the second epoch begins earlier, and has it too
    rows = rows_of(config.directory)
    assert len(rows) == 24
    if policy == "skip":
        assert [row["train/spiked_steps"] for row in rows] == [0.0] * OUTLIER + [1.0] * 5
    else:
        assert said["step"] == 16 and max(row["train/loss"] for row in rows[8:]) < 1.0


def test_no_loss_is_waited_for_where_none_is_judged(
    tiny: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
):
    def refuse(*arguments: object) -> None:
        raise AssertionError("a loss was reduced before the step")

    monkeypatch.setattr("engine.training.optimizer.reduce_metrics", refuse)
    config = dataclasses.replace(spoiled_file(tiny, tmp_path, 4), epochs=0.1)
    train(dataclasses.replace(config, spikes=SpikeConfig(policy="skip")))
    with pytest.raises(AssertionError, match="before the step"):
        spikes = SpikeConfig(policy="skip", loss_factor=2.0)
        train(dataclasses.replace(config, directory=tmp_path / "other", spikes=spikes))


def test_numbers_of_a_watch_are_in_the_checkpoint(tiny: Path, tmp_path: Path):
    config = dataclasses.replace(
        spoiled_file(tiny, tmp_path, 1),
        spikes=dataclasses.replace(CONFIG, window=6, norm_factor=3.0, max_in_a_row=9),
    )
    train(config)
    counts: dict = {}
    load = Optimizer.load_counts

    def noting(self: Optimizer, found: dict) -> None:
        counts.update(found)
        load(self, found)

    with pytest.MonkeyPatch.context() as patch:
        patch.setattr(Optimizer, "load_counts", noting)
        train(dataclasses.replace(config, epochs=1.1))
    rows = rows_of(config.directory)[:24]
    totals = [0.0, *(row["train/spiked_steps"] for row in rows)]
    taken = [
        row["train/grad_norm"]
        for row, before in zip(rows, totals, strict=False)
        if row["train/spiked_steps"] == before
    ]
    assert counts["spikes"]["recent"] == {"gradient norm": taken[-6:]}
    assert counts["spikes"]["spiked"]["total"] == totals[-1] > 0
