"""What a path means, by names alone; test_found.py has what is read there."""

import json
from pathlib import Path

import pytest

from engine.checkpoints.candidates import candidates_at, read_description
from engine.errors import UserError
from engine.ranks.parallel import Parallel
from tests.engine.checkpoints.small_runs import checkpointer_of, saved
from tests.tiny import SIZE, random_network


def test_a_run_means_its_newest_checkpoint_and_then_those_before(
    parallel: Parallel, tmp_path: Path
):
    run = checkpointer_of(random_network("language", parallel), tmp_path / "checkpoints")
    for step in (1, 2):
        run.save(step, {})
    folder = tmp_path / "checkpoints"
    names = ["step_00000002", "step_00000001"]
    for path in (tmp_path, folder):
        found = candidates_at(path, "policy")
        assert found == {
            "folders": [str(folder / name) for name in names],
            "role": "policy",
            "damage": "",
        }
    named = folder / "step_00000001"
    assert candidates_at(named, "policy")["folders"] == [str(named)]
    # A network's folder is that network, whatever role it is to have.
    within = candidates_at(named / "policy", "reward_model")
    assert (within["folders"], within["role"]) == ([str(named)], "policy")


def test_a_folder_says_what_its_network_is(parallel: Parallel, tmp_path: Path):
    run = saved(random_network("scalar", parallel), tmp_path, "reward_model", fingerprint="one")
    (found,) = candidates_at(run, "reward_model")["folders"]
    folder = Path(found) / "reward_model"
    assert read_description(folder) == ("scalar", SIZE, "one")
    description = json.loads((folder / "network.json").read_text())
    for broken in ({"kind": "image"}, {"size": {}}, {"tokenizer": 3}):
        (folder / "network.json").write_text(json.dumps(description | broken))
        with pytest.raises(UserError, match=r"network\.json: not the (kind, )?size"):
            read_description(folder)


def test_what_is_no_run_is_an_error_that_says_what_is_wanted(tmp_path: Path):
    with pytest.raises(UserError, match="no checkpoint of a policy here .*Hugging Face folder"):
        candidates_at(tmp_path, "policy")
