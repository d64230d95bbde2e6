import math
from pathlib import Path

import pytest
import torch

from engine.checkpoints.weights import load_weights
from engine.errors import UserError
from engine.ranks.start import start_parallel
from engine.settings.layout import ParallelLayout
from engine.training.finite import check_finite
from tests.engine.checkpoints.test_checkpointer import checkpointer_of, saved, training
from tests.ranks import run_ranks
from tests.tiny import random_network


def broken_network(value: float = math.nan):
    network = random_network("language", start_parallel(ParallelLayout(), seed=1))
    with torch.no_grad():
        network.modules[0].decoder.final_layernorm.bias[3] = value
    return network


@pytest.mark.parametrize("value", [math.nan, math.inf, -math.inf])
def test_one_weight_that_is_not_finite_is_seen(value: float):
    check_finite(broken_network(1e30), "a large one is finite")
    with pytest.raises(UserError, match="broken"):
        check_finite(broken_network(value), "broken")


def check_broken_on_one_rank(rank: int) -> str:
    parallel = start_parallel(ParallelLayout(pp=2), seed=1)
    network = random_network("language", parallel)
    if parallel.rank == rank:
        next(network.modules[0].parameters()).data[0] = math.nan
    with pytest.raises(UserError) as error:
        check_finite(network, "broken")
    return str(error.value)


@pytest.mark.slow
@pytest.mark.parametrize("rank", [0, 1])
def test_all_ranks_hear_of_a_weight_on_one(rank: int):
    assert run_ranks(check_broken_on_one_rank, 2, rank) == ["broken"] * 2


def test_broken_weights_and_averages_are_not_saved(tmp_path: Path):
    run = training(tmp_path, start_parallel(ParallelLayout(), seed=1))
    run.checkpointer.save(1, {})
    with torch.no_grad():
        run.ema.shadows[0][0] = math.nan
    for save in (lambda: run.checkpointer.save(2, {}), lambda: run.checkpointer.save_weights("x")):
        with pytest.raises(UserError, match="policy are not finite, and are not saved"):
            save()
    assert {path.name for path in tmp_path.iterdir()} == {"latest", "step_00000001"}
    assert (tmp_path / "latest").read_text() == "step_00000001"


def test_broken_weights_in_a_file_are_an_error_that_names_it(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch
):
    network = broken_network()
    with monkeypatch.context() as patch:
        patch.setattr(
            "engine.checkpoints.checkpointer.check_finite", lambda *_: None
        )  # as earlier versions did
        saved(network, tmp_path, "policy")
    with pytest.raises(UserError, match=f"{tmp_path}.*policy: weights that are not finite"):
        load_weights(network, tmp_path, role="policy")
    with pytest.raises(UserError, match="weights that are not finite"):
        checkpointer_of(network, tmp_path / "checkpoints").resume()
