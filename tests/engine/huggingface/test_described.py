import json
from pathlib import Path

import pytest

from engine.errors import UserError
from engine.huggingface.described import classes_of, describe_folder, stored_size
from engine.ranks.start import start_parallel
from engine.settings.layout import ParallelLayout
from models.sizes import GPTSize
from tests.engine.checkpoints.small_runs import saved
from tests.families import CONFIGS, CONTEXT, VOCAB
from tests.tiny import SIZE, random_network


def folder_of(path: Path, **changes) -> Path:
    """A folder with the config.json of a tiny Llama, and nothing else."""
    path.mkdir()
    (path / "config.json").write_text(json.dumps(CONFIGS["llama"] | changes))
    return path


def test_a_config_alone_says_the_size(tmp_path: Path):
    folder = folder_of(tmp_path / "model", architectures=["LlamaForCausalLM"])
    family, size, config = describe_folder(folder)
    assert family.model_type == "llama" and classes_of(config) == ["LlamaForCausalLM"]
    assert (size.num_layers, size.hidden_size, size.num_kv_heads) == (4, 64, 4)
    assert (size.vocab_size, size.context_length) == (VOCAB, CONTEXT)
    assert stored_size(folder, "policy") == (size, folder)


def test_what_is_no_model_of_ours_is_refused_with_its_field(tmp_path: Path):
    folder = folder_of(tmp_path / "model", model_type="mamba")
    with pytest.raises(UserError, match=r"config\.json: model_type is 'mamba'.*only 'gpt2'"):
        describe_folder(folder)
    with pytest.raises(UserError, match="nowhere: no such folder"):
        describe_folder(tmp_path / "nowhere")


def test_a_language_model_is_no_reward_model(tmp_path: Path):
    writer = folder_of(tmp_path / "writer", architectures=["LlamaForCausalLM"])
    with pytest.raises(UserError, match="holds a language model, where a reward model is needed"):
        stored_size(writer, "reward_model")
    scorer = folder_of(tmp_path / "scorer", architectures=["LlamaForSequenceClassification"])
    assert stored_size(scorer, "reward_model")[0] == stored_size(writer, "policy")[0]


def test_a_run_and_its_checkpoint_say_theirs(tmp_path: Path):
    parallel = start_parallel(ParallelLayout(), seed=0)
    run = saved(random_network("language", parallel), tmp_path, "policy")
    (folder,) = run.glob("checkpoints/step_*/policy")
    wanted: tuple[GPTSize, Path] = (SIZE, folder)
    for path in (run, folder.parent, folder):
        assert stored_size(path, "policy") == wanted
    with pytest.raises(UserError, match="no checkpoint of a reward_model here; it holds policy"):
        stored_size(run, "reward_model")
