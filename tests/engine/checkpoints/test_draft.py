import json
from pathlib import Path

from engine.checkpoints.draft import Draft
from engine.ranks.parallel import Parallel
from models.sizes import size_as_json
from tests.engine.checkpoints.small_runs import training
from tests.tiny import SIZE, random_network

NUM_WEIGHTS = sum(
    [
        128 * 32 + 64 * 32 + 2 * 32,  # words (padded to 128), positions, the last norm
        4 * (4 * 32 * 32 + 4 * 32),  # attention of four layers
        4 * (8 * 32 * 32 + 5 * 32),  # and MLP
        4 * 4 * 32,  # and norms
    ]
)


def test_place_until_it_is_whole_is_beside_it(tmp_path: Path):
    draft = Draft(folder=tmp_path / "step_00000003", step=3)
    assert draft.partial == tmp_path / "step_00000003.partial"


def test_network_has_a_file_of_weights_and_its_optimizer_one_of_state(
    parallel: Parallel, tmp_path: Path
):
    run = training(tmp_path, parallel, dtype="bf16")
    draft = Draft(folder=tmp_path / "step_00000003", step=3)
    draft.add_network("policy", run.optimizer.network, run.optimizer, "a tokenizer")
    sizes = {file.name: file.num_bytes for file in draft.files}
    assert sizes == {
        "policy/weights-00000.safetensors": 2 * NUM_WEIGHTS,
        "policy/optimizer-00000.safetensors": 3 * 4 * NUM_WEIGHTS,  # masters and two moments
    }
    assert json.loads(draft.texts["policy/network.json"]) == {
        "kind": "language",
        "size": size_as_json(SIZE),
        "tokenizer": "a tokenizer",
    }
    names = ("total", "in_a_row", "num_searching", "num_taken", "since_taken")
    assert draft.counts == {"policy": {"step": 0.0, "skipped": dict.fromkeys(names, 0)}}


def test_weights_alone_have_no_state(parallel: Parallel, tmp_path: Path):
    draft = Draft(folder=tmp_path / "epoch_0001", step=None)
    draft.add_network("reward_model", random_network("scalar", parallel), None, "")
    (file,) = draft.files
    assert file.name == "reward_model/weights-00000.safetensors"
    assert draft.counts == {"reward_model": {}}
    assert json.loads(draft.texts["reward_model/network.json"])["kind"] == "scalar"


def test_average_has_the_names_of_weights_in_fp32(parallel: Parallel, tmp_path: Path):
    run = training(tmp_path, parallel, dtype="bf16")
    draft = Draft(folder=tmp_path / "step_00000003", step=3)
    draft.add_network("policy", run.optimizer.network, None, "")
    draft.add_average("ema", run.ema, "")
    weights, average = draft.files
    assert average.name == "ema/weights-00000.safetensors"
    assert average.num_bytes == 4 * NUM_WEIGHTS
    assert {p.shard.name for p in average.parts} == {p.shard.name for p in weights.parts}
