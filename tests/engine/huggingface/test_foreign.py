from pathlib import Path

import pytest

from engine.errors import UserError
from engine.huggingface.foreign import (
    held_instead,
    is_foreign,
    refuse_foreign,
    require_model_folder,
)


def refusal(path: Path) -> str:
    with pytest.raises(UserError) as caught:
        require_model_folder(path)
    assert len(str(caught.value).splitlines()) == 1
    return str(caught.value)


@pytest.mark.parametrize(
    ("name", "said"),
    [
        ("adapter_config.json", "LoRA adapter: merge it"),
        ("adapter_model.safetensors", "LoRA adapter: merge it"),
        ("model-Q4_K_M.gguf", "GGUF, llama.cpp's format"),
        ("tf_model.h5", "TensorFlow or Flax"),
        ("tf_model-00001-of-00002.h5", "TensorFlow or Flax"),
        ("flax_model.msgpack", "TensorFlow or Flax"),
        ("model.fp16.safetensors", "a variant"),
        ("pytorch_model.fp16.bin", "a variant"),
        ("model.fp16-00001-of-00002.safetensors", "a variant"),
        ("model.safetensors.index.fp16.json", "a variant"),
        ("consolidated.00.pth", "Meta's or Mistral's own"),
        ("consolidated.safetensors", "Meta's or Mistral's own"),
        ("params.json", "Meta's or Mistral's own"),
        ("zero_to_fp32.py", "DeepSpeed's parts: python zero_to_fp32.py"),
        ("global_step500", "DeepSpeed's parts"),
        ("mp_rank_00_model_states.pt", "DeepSpeed's parts"),
        ("__0_0.distcp", "FSDP's parts"),
        ("pytorch_model_fsdp.bin", "FSDP's parts"),
        ("model.onnx", "another program's format"),
        ("model_optim_rng.pt", "another program's format"),
        ("model-00001-of-00002.safetensors", "without their index"),
        ("pytorch_model-00001-of-00002.bin", "without their index"),
    ],
)
def test_another_format_is_named_with_what_to_do(tmp_path, name, said):
    (tmp_path / name).touch()
    assert said in refusal(tmp_path) and f"its {name} is" in refusal(tmp_path)
    assert said in held_instead(tmp_path)


def test_a_folder_of_weights_is_taken_whatever_else_it_holds(tmp_path):
    for name in ("config.json", "tf_model.h5", "model.onnx"):
        (tmp_path / name).touch()
    require_model_folder(tmp_path)


@pytest.mark.parametrize(
    "files",
    [
        {"config.json": '{"stage": "sft"}', "checkpoints/latest": ""},
        {"manifest.json": "{}", "policy/network.json": "{}"},
        {"network.json": "{}"},
    ],
)
def test_a_run_of_ours_is_named_as_one(tmp_path, files):
    for name, text in files.items():
        (tmp_path / name).parent.mkdir(parents=True, exist_ok=True)
        (tmp_path / name).write_text(text)
    assert refusal(tmp_path).startswith(f"{tmp_path} is a run of ours or a part of one")
    refuse_foreign(tmp_path)


def test_a_folder_of_theirs_is_refused_where_a_run_is_wanted(tmp_path):
    (tmp_path / "config.json").write_text('{"model_type": "llama"}')
    with pytest.raises(UserError, match="is a Hugging Face folder already: use it as it is"):
        refuse_foreign(tmp_path)
    (tmp_path / "model.safetensors").touch()
    with pytest.raises(UserError, match=r"is a file: give its folder"):
        refuse_foreign(tmp_path / "model.safetensors")


def test_a_link_to_nothing_is_said_to_be_one(tmp_path):
    (tmp_path / "model").symlink_to("blobs")
    assert refusal(tmp_path / "model").startswith(f"{tmp_path}/model is a link to nothing (blobs")


def test_the_snapshot_of_a_cache_of_the_hub_is_named(tmp_path):
    root = tmp_path / "models--org--name"
    for snapshot in ("aaaa", "bbbb", "cccc"):
        (root / "snapshots" / snapshot).mkdir(parents=True)
    assert f"cache of the hub: give {root / 'snapshots' / 'cccc'}" in refusal(root)
    (root / "refs").mkdir()
    (root / "refs" / "main").write_text("bbbb\n")
    assert f"give {root / 'snapshots' / 'bbbb'}" in refusal(root)
    assert "models--org--name/snapshots/HASH" in refusal(tmp_path)
    empty = tmp_path / "models--org--other"
    (empty / "snapshots").mkdir(parents=True)
    assert "without a snapshot" in refusal(empty)


def test_the_folder_inside_is_named(tmp_path):
    (tmp_path / "model").mkdir()
    (tmp_path / "model" / "config.json").touch()
    assert "model in it does: give that folder" in refusal(tmp_path)
    for step in (500, 1000):
        (tmp_path / f"checkpoint-{step}").mkdir()
    assert f"a Trainer's output: give a checkpoint, {tmp_path / 'checkpoint-1000'}" in refusal(
        tmp_path
    )


def test_a_file_is_answered_with_its_folder_or_its_format(tmp_path):
    for name in ("model.safetensors", "pytorch_model.bin", "config.json", "model-1.safetensors"):
        (tmp_path / name).touch()
        assert refusal(tmp_path / name).endswith(f"is a file: give its folder, {tmp_path}")
    (tmp_path / "x.gguf").touch()
    assert "is GGUF" in refusal(tmp_path / "x.gguf")


def test_a_hub_name_is_answered_with_the_network(tmp_path, monkeypatch):
    monkeypatch.chdir(tmp_path)
    for name in ("gpt2", "EleutherAI/pythia-1.4b"):
        assert f"nothing here uses the network. `hf download {name}" in refusal(Path(name))
    assert refusal(tmp_path / "gpt2") == f"{tmp_path / 'gpt2'}: no such folder"
    (tmp_path / "runs").mkdir()
    assert refusal(Path("runs/sft")) == "runs/sft: no such folder"


def test_a_folder_of_nothing_known_is_plainly_without_a_config(tmp_path):
    (tmp_path / "notes.txt").touch()
    assert refusal(tmp_path) == f"{tmp_path} holds no config.json"


@pytest.mark.parametrize(
    ("files", "foreign"),
    [
        ({"config.json": '{"model_type": "llama"}'}, True),
        ({"config.json": '{"model_type": "mamba"}', "checkpoints/a": ""}, True),
        ({"config.json": '{"architectures": ["GPT2LMHeadModel"]}'}, True),
        ({"config.json": "{", "model.safetensors": ""}, True),  # damaged, which its reader says
        ({"model.safetensors.index.json": "{}"}, True),
        ({"pytorch_model.bin": ""}, True),
        ({"model-Q4_K_M.gguf": ""}, True),
        ({"snapshots/abc/config.json": "{}", "refs/main": "abc"}, True),
        ({"checkpoint-500/config.json": "{}"}, True),
        ({"config.json": '{"stage": "sft"}', "checkpoints/latest": ""}, False),
        ({"config.json": '{"directory": "runs/sft"}', "tokenizer/tokenizer.json": ""}, False),
        ({"sft/config.json": "{}", "rm/config.json": "{}"}, False),  # a folder of runs
        ({"manifest.json": "{}", "policy/network.json": "{}"}, False),
        ({"network.json": "{}", "weights-00000.safetensors": ""}, False),
        ({}, False),
    ],
)
def test_a_model_of_another_program_is_told_from_ours(tmp_path, files, foreign):
    for name, text in files.items():
        (tmp_path / name).parent.mkdir(parents=True, exist_ok=True)
        (tmp_path / name).write_text(text)
    assert is_foreign(tmp_path) is foreign


def test_a_file_is_foreign_by_its_name(tmp_path):
    assert is_foreign(tmp_path / "model.safetensors")
    assert is_foreign(tmp_path / "llama.gguf")
    assert not is_foreign(tmp_path / "demonstrations.jsonl")
    assert not is_foreign(tmp_path / "nowhere")
