import dataclasses
from pathlib import Path

import pytest
import torch

from engine.checkpoints.found import find_network, size_of
from engine.checkpoints.weights import load_weights
from engine.errors import UserError
from engine.ranks.parallel import Parallel
from engine.settings.numerics import Numerics
from engine.training.network import build_network
from tests.engine.checkpoints.small_runs import checkpointer_of, saved, weights
from tests.tiny import SIZE, random_network


@pytest.mark.parametrize("where", ["", "checkpoints", "checkpoints/step_00000001"])
def test_weights_are_found_under_a_run_its_checkpoints_and_one_of_them(
    where: str, parallel: Parallel, tmp_path: Path
):
    network = random_network("language", parallel, seed=4)
    run = saved(network, tmp_path, "policy")
    found = random_network("language", parallel, seed=5)
    load_weights(found, run / where, role="policy")
    for name, weight in weights(network).items():
        assert torch.equal(weights(found)[name], weight)
    assert size_of(run / where, "policy") == SIZE


@pytest.mark.parametrize(
    ("change", "cause"),
    [
        ({"vocab_size": 101}, "vocab_size is 100, this run's model has 101"),
        ({"num_layers": 2}, "num_layers is 4, this run's model has 2"),
        ({"hidden_size": 64}, "hidden_size is 32, this run's model has 64"),
        ({"context_length": 32}, "context_length is 64, this run's model has 32"),
    ],
)
def test_other_size_is_an_error(change: dict, cause: str, parallel: Parallel, tmp_path: Path):
    saved(random_network("language", parallel), tmp_path, "policy")
    size = dataclasses.replace(SIZE, **change)
    network = build_network("language", size, parallel, numerics=Numerics())
    with pytest.raises(UserError, match=cause):
        load_weights(network, tmp_path, role="policy")


def test_other_tokenizer_is_an_error(parallel: Parallel, tmp_path: Path):
    network = random_network("language", parallel)
    saved(network, tmp_path, "policy", fingerprint="one")
    load_weights(network, tmp_path, role="policy", tokenizer_fingerprint="one")
    load_weights(network, tmp_path, role="policy")  # nothing to compare with
    with pytest.raises(UserError, match="trained with another tokenizer"):
        load_weights(network, tmp_path, role="policy", tokenizer_fingerprint="two")


def test_missing_role_is_an_error_that_lists_the_others(parallel: Parallel, tmp_path: Path):
    saved(random_network("scalar", parallel), tmp_path, "reward_model")
    with pytest.raises(UserError, match="no checkpoint of a policy here; it holds reward_model"):
        find_network(tmp_path, "policy")
    with pytest.raises(UserError, match="no checkpoint of a policy here"):
        size_of(tmp_path / "nowhere", "policy")


def test_damaged_description_is_an_error(parallel: Parallel, tmp_path: Path):
    run = saved(random_network("language", parallel), tmp_path, "policy")
    description = find_network(run, "policy") / "network.json"
    description.write_text(description.read_text()[:20])
    with pytest.raises(UserError, match=r"network\.json: damaged: 20 bytes, \d+ were written"):
        size_of(run, "policy")


def test_a_selected_checkpoint_is_found_in_place_of_the_newest(parallel: Parallel, tmp_path: Path):
    run = checkpointer_of(random_network("language", parallel), tmp_path / "checkpoints")
    run.save_weights("epoch_0001")
    run.save(8, {})
    folder = tmp_path / "checkpoints"
    assert find_network(tmp_path, "policy") == folder / "step_00000008" / "policy"
    run.select("epoch_0001")
    assert find_network(tmp_path, "policy") == folder / "epoch_0001" / "policy"
    assert find_network(folder / "step_00000008", "policy") == folder / "step_00000008" / "policy"
