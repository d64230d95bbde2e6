"""Padding moves no loss, however a batch is cut."""

import pytest
import torch

from benchmarks.real_job import RealJob, make_batches, num_tokens
from engine.settings.numerics import Numerics
from kernels.ranking_loss import ranking_loss_reference
from tests.tiny import SIZE

pytest.importorskip("transformers")
from benchmarks import padded_steps
from benchmarks.padded_steps import IGNORED, collate, cut, load_model, pairwise_loss, share_of_loss

CPU = torch.device("cpu")
ROWS = {
    "sft": [[3, 2], [5, 9], [1, 1], [2, 6]],
    "rm": [[3, 2, 4, 1, 9], [5, 1, 1, 2, 3, 4], [2, 7, 3, 5, 1], [1, 1, 2, 3, 4]],
}


def job_of(task: str) -> RealJob:
    batches = make_batches(task, SIZE, ROWS[task], num_batches=1)
    return RealJob(
        task=task, size=SIZE, numerics=Numerics(), batches=batches, num_rounds=1, passes=(2,)
    )


def test_demonstrations_are_padded_on_the_right():
    (units,) = make_batches("sft", SIZE, [[2, 1], [1, 4]], num_batches=1)
    batch = collate(units)
    short, long = (unit.tokens.tolist() for unit in units)
    assert batch["input_ids"].tolist() == [[*short, 0, 0], long]
    assert batch["attention_mask"].tolist() == [[1, 1, 1, 0, 0], [1] * 5]
    assert batch["labels"].tolist() == [
        [IGNORED, IGNORED, short[2], IGNORED, IGNORED],
        [IGNORED, *long[1:]],
    ]


def test_a_batch_is_cut_in_its_order():
    assert [list(part) for part in cut(range(5), 2)] == [[0, 1, 2], [3, 4]]


@pytest.mark.parametrize("task", ["sft", "rm"])
def test_shares_of_padded_micro_batches_add_up_to_the_loss_of_single_sequences(task, tmp_path):
    job = job_of(task)
    wanted = padded_steps.write_weights(job, CPU, tmp_path)
    model = load_model(job, tmp_path, CPU)
    units = job.units(0)
    for passes in (1, 2, 4):
        parts = [collate(part) for part in cut(units, passes)]
        found = sum(float(share_of_loss(job, model, part, units).detach()) for part in parts)
        assert found == pytest.approx(wanted, abs=1e-5)
        assert sum(int(part["attention_mask"].sum()) for part in parts) == num_tokens(units)


def test_pairwise_loss_is_the_paper_s():
    scores, ranks = torch.tensor([0.3, -1.0, 2.0, 0.1]), torch.tensor([2, 4, 1, 3])
    wanted = ranking_loss_reference(scores, ranks, torch.tensor([0, 4], dtype=torch.int32))
    assert float(pairwise_loss(scores, ranks)) == pytest.approx(float(wanted.losses), abs=1e-6)
