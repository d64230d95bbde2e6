from pathlib import Path

import pytest

from benchmarks.checkpoints import BLOCKS, Training, measure_saves, measure_steps
from benchmarks.records import Record
from engine.ranks.start import start_parallel
from engine.settings.adam import AdamConfig
from engine.settings.layout import ParallelLayout
from engine.training.optimizer import Optimizer
from tests.tiny import SIZE, random_network


@pytest.fixture
def training(tmp_path: Path) -> Training:
    network = random_network("language", start_parallel(ParallelLayout(), seed=0))
    optimizer = Optimizer(network, AdamConfig(), total_steps=99)
    return Training(network=network, optimizer=optimizer, folder=tmp_path, num_tokens=64)


def test_every_way_to_save_is_timed_and_leaves_nothing(training: Training, tmp_path: Path):
    records: list[Record] = list(measure_saves(training, num_samples=2))
    providers = [record["provider"] for record in records]
    assert providers[:2] == ["trident", "trident, without checksums"]
    assert "torch.distributed.checkpoint, async_save" in providers
    for record in records:
        # Weights, which are their own masters in fp32, and two moments; masters are counted anew.
        assert record["num_bytes"] > 16 * SIZE.num_parameters
        assert 0 < record["waited_s"] <= record["on_disk_s"]
    assert not list(tmp_path.iterdir())


def test_blocks_of_steps_are_held_against_those_without_a_save(training: Training, tmp_path: Path):
    records = list(measure_steps(training, num_steps=2, num_samples=2))
    assert [record["provider"] for record in records] == [f"steps, {name}" for name in BLOCKS]
    assert records[0]["added"] == 0.0
    assert all(record["block_s"] > 0 for record in records)
    assert not list(tmp_path.iterdir())
