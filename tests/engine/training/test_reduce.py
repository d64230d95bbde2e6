import dataclasses

import pytest
import torch

from engine.ranks.parallel import Parallel
from engine.ranks.start import start_parallel
from engine.settings.layout import ParallelLayout
from engine.training.reduce import merge_metrics, reduce_metrics
from tests.ranks import run_ranks


@pytest.fixture
def parallel() -> Parallel:
    return start_parallel(ParallelLayout(), seed=1)


def test_extremes_and_moments_merge_as_what_they_are(parallel: Parallel):
    def moments(values: list[float]) -> torch.Tensor:
        x = torch.tensor(values)
        return torch.stack([torch.tensor(float(len(x))), x.mean(), (x - x.mean()).square().sum()])

    parts = [moments([1.0, 2.0]), moments([6.0]), torch.zeros(3)]
    numbers = [torch.tensor(x) for x in (2.0, -1.0, 5.0)]
    merged = merge_metrics(
        [
            {"x_moments": m, "x_max": x, "x_min": x, "x": x}
            for m, x in zip(parts, numbers, strict=True)
        ]
    )
    assert reduce_metrics(merged, parallel) == {
        "x_mean": pytest.approx(3.0),
        "x_variance": pytest.approx(14 / 3),
        "x_max": 5.0,
        "x_min": -1.0,
        "x": 6.0,
    }


def test_what_no_gradient_needs_is_let_go():
    reading = torch.tensor(2.0, requires_grad=True)
    merged = merge_metrics([{"x": 3 * reading}, {"y": reading}])
    assert not merged["x"].requires_grad and not merged["y"].requires_grad


def test_all_metrics_of_a_step_are_asked_for_at_once(
    parallel: Parallel, monkeypatch: pytest.MonkeyPatch
):
    gather, asked = torch.distributed.all_gather_into_tensor, []

    def counted(into: torch.Tensor, tensor: torch.Tensor, **named: object) -> None:
        asked.append(len(tensor))
        gather(into, tensor, **named)

    monkeypatch.setattr("torch.distributed.all_gather_into_tensor", counted)
    third = torch.tensor(1.0) / 3.0
    metrics = {"loss": third, "x_moments": torch.stack([third, -third, third]), "num": third.int()}
    value = third.item()  # fp32's: not one bit more or less
    assert reduce_metrics(metrics, parallel) == {
        "loss": value,
        "x_mean": -value,
        "x_variance": value,
        "num": 0.0,
    }
    assert asked == [5]


def numbers_of_rank() -> dict[str, float]:
    """What all ranks' metrics come to, where rank r has 1 + r and r."""
    parallel = start_parallel(ParallelLayout(), seed=0)
    rank = float(parallel.rank)
    metrics = {
        "x_moments": torch.tensor([1.0, rank, 0.0]),
        "loss": torch.tensor(1.0 + rank),
        "x_max": torch.tensor(rank),
        "x_min": torch.tensor(rank),
    }
    return reduce_metrics(metrics, parallel)


def test_metrics_of_all_ranks_merge_each_in_its_way():
    expected = {"x_mean": 0.5, "x_variance": 0.25, "loss": 3.0, "x_max": 1.0, "x_min": 0.0}
    assert run_ranks(numbers_of_rank, 2) == [expected] * 2


def test_metrics_of_a_rank_without_the_last_stage_count_for_nothing(parallel: Parallel):
    layout = ParallelLayout(pp=2)
    first_stage = dataclasses.replace(parallel, layout=layout)
    assert reduce_metrics({"loss": torch.tensor(3.0)}, first_stage) == {}
