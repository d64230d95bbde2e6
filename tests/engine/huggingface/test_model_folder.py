import json
from pathlib import Path

import pytest
import torch
from hypothesis import given
from hypothesis import strategies as st
from safetensors.torch import load_file, save_file
from transformers import AutoModelForSequenceClassification

from engine.errors import UserError
from engine.huggingface.model_folder import ModelFolder, find_critic, find_model, read_size
from tests.families import CONFIGS, build_family, save_family
from tests.fuzzing import fuzzed

WEIGHTS = "model.safetensors"


def changed(folder: Path, **changes) -> None:
    config = json.loads((folder / "config.json").read_text())
    (folder / "config.json").write_text(json.dumps(config | changes))


def with_tensors(folder: Path, change) -> None:
    tensors = change(load_file(folder / WEIGHTS))
    save_file(tensors, folder / WEIGHTS, metadata={"format": "pt"})


def refusal(folder: Path) -> str:
    with pytest.raises(UserError) as caught:
        find_model(folder)
    assert len(str(caught.value).splitlines()) <= 2 and len(str(caught.value)) < 600
    return str(caught.value)


@pytest.fixture
def gpt2(tmp_path: Path) -> Path:
    save_family("gpt2", tmp_path / "gpt2")
    return tmp_path / "gpt2"


@pytest.mark.parametrize("name", CONFIGS)
def test_every_family_is_found_whole(tmp_path, name):
    save_family(name, tmp_path)
    model = find_model(tmp_path)
    assert model.family.model_type == CONFIGS[name]["model_type"]
    assert read_size(tmp_path) == model.size and not model.left_out
    assert model.tensors.keys() == load_file(tmp_path / WEIGHTS).keys()


@pytest.mark.parametrize("name", ["gpt2", "opt", "pythia", "llama", "qwen3"])
def test_a_tensor_that_is_missing_misshapen_or_foreign_is_named(tmp_path, name):
    save_family(name, tmp_path)
    tensors = load_file(tmp_path / WEIGHTS)
    for theirs in ([*tensors][0], [*tensors][-1], [*tensors][len(tensors) // 2]):
        save_file({n: t for n, t in tensors.items() if n != theirs}, tmp_path / WEIGHTS)
        assert f"tensor {theirs} is missing" in refusal(tmp_path)
        save_file(tensors | {theirs: torch.zeros(3, 5)}, tmp_path / WEIGHTS)
        assert f"{theirs} has shape [3, 5], config.json asks for" in refusal(tmp_path)
        save_file(tensors | {theirs: tensors[theirs].to(torch.int8)}, tmp_path / WEIGHTS)
        assert f"{theirs} is torch.int8, not a float" in refusal(tmp_path)
    save_file(tensors | {"layers.9.odd": torch.zeros(1)}, tmp_path / WEIGHTS)
    assert "'layers.9.odd' is no tensor of the" in refusal(tmp_path)


@pytest.mark.parametrize("wrapper", ["_orig_mod.", "module.", "module._orig_mod."])
def test_what_a_wrapper_put_before_every_name_is_taken_off(gpt2, wrapper):
    with_tensors(gpt2, lambda tensors: {wrapper + name: t for name, t in tensors.items()})
    find_model(gpt2)


@pytest.mark.parametrize("name", ["gpt2", "llama_31"])
def test_a_stored_head_that_differs_is_a_head_and_one_that_does_not_is_none(tmp_path, name):
    save_family(name, tmp_path)
    (embedding,) = (
        k
        for k in load_file(tmp_path / WEIGHTS)
        if k.endswith(("wte.weight", "embed_tokens.weight"))
    )
    with_tensors(tmp_path, lambda tensors: tensors | {"lm_head.weight": tensors[embedding].clone()})
    model = find_model(tmp_path)
    assert model.size.form.is_tied and "lm_head.weight" not in model.tensors
    with_tensors(tmp_path, lambda tensors: tensors | {"lm_head.weight": tensors[embedding] * 2})
    model = find_model(tmp_path)
    assert not model.size.form.is_tied and "lm_head.weight" in model.tensors
    assert read_size(tmp_path) == model.size


def test_a_stored_head_that_differs_in_its_last_number_is_seen(gpt2):
    def change(tensors):
        head = tensors["transformer.wte.weight"].clone()
        head[-1, -1] += 1
        return tensors | {"lm_head.weight": head}

    with_tensors(gpt2, change)
    assert not read_size(gpt2).form.is_tied


def test_an_untied_model_without_its_head_is_refused(tmp_path):
    save_family("llama", tmp_path)
    with_tensors(tmp_path, lambda t: {k: v for k, v in t.items() if k != "lm_head.weight"})
    assert "tensor lm_head.weight is missing" in refusal(tmp_path)


@pytest.mark.parametrize("name", ["gpt2", "opt", "pythia", "llama", "qwen2"])
def test_a_sequence_classifier_is_said_to_be_a_reward_model(tmp_path, name):
    config = build_family(name).config
    config.num_labels, config.pad_token_id = 1, 0
    AutoModelForSequenceClassification.from_config(config).save_pretrained(tmp_path)
    message = refusal(tmp_path)
    assert "holds a reward model or classifier" in message
    assert "a language model is needed here" in message
    if "score.weight" in load_file(tmp_path / WEIGHTS):  # without its name too
        changed(tmp_path, architectures=None)
        assert "(score.weight); a language model is needed here" in refusal(tmp_path)


def test_the_trunk_under_trls_value_head_is_usable(gpt2):
    head = {"v_head.summary.weight": torch.zeros(1, 64), "v_head.summary.bias": torch.zeros(1)}
    with_tensors(gpt2, lambda tensors: tensors | head)
    assert find_model(gpt2).left_out == ("v_head.summary.bias", "v_head.summary.weight")
    with_tensors(
        gpt2, lambda t: {f"pretrained_model.{k}": v for k, v in t.items() if k not in head} | head
    )
    assert find_model(gpt2).size.form.is_tied


@pytest.mark.parametrize(
    ("name", "said"),
    [
        ("base_model.model.transformer.h.0.attn.c_attn.lora_A.weight", "is of a LoRA adapter"),
        ("transformer.h.0.attn.c_attn.lora_B.default.weight", "is of a LoRA adapter"),
        ("transformer.h.0.attn.c_attn.SCB", "is of quantised weights"),
        ("model.layers.0.mlp.up_proj.qweight", "is of quantised weights"),
        ("model.layers.0.mlp.up_proj.weight.quant_state.bitsandbytes__nf4", "quantised weights"),
    ],
)
def test_tensors_of_adapters_and_of_quantised_models_are_named(gpt2, name, said):
    with_tensors(gpt2, lambda tensors: tensors | {name: torch.zeros(2, 2)})
    assert f"{name} " in refusal(gpt2) and said in refusal(gpt2)


def test_a_quantised_config_is_refused(gpt2):
    changed(gpt2, quantization_config={"quant_method": "bitsandbytes", "load_in_8bit": True})
    assert "without quantization" in refusal(gpt2)


def test_a_config_beside_other_weights_names_them(gpt2):
    (gpt2 / WEIGHTS).rename(gpt2 / "model.fp16.safetensors")
    assert "holds no model.safetensors or pytorch_model.bin" in refusal(gpt2)
    assert "its model.fp16.safetensors is a variant" in refusal(gpt2)
    (gpt2 / "model.fp16.safetensors").rename(gpt2 / "tf_model.h5")
    assert "weights of TensorFlow or Flax" in refusal(gpt2)


@pytest.mark.parametrize("name", [WEIGHTS, "pytorch_model.bin"])
def test_a_pointer_of_git_lfs_is_said_to_be_one(gpt2, name):
    (gpt2 / WEIGHTS).unlink()
    pointer = "version https://git-lfs.github.com/spec/v1\noid sha256:0a1b\nsize 548105171\n"
    (gpt2 / name).write_text(pointer)
    assert f"{gpt2 / name} is a git-lfs pointer and not the file: run `git" in refusal(gpt2)


@pytest.mark.parametrize("name", ["config.json", WEIGHTS])
def test_a_file_of_a_snapshot_whose_blob_is_gone_is_a_link_to_nothing(gpt2, name):
    (gpt2 / name).unlink()
    (gpt2 / name).symlink_to("../../blobs/0a1b")
    said = f"{gpt2 / name} is a link to nothing (../../blobs/0a1b is gone): download"
    assert said in refusal(gpt2)


def test_a_trunk_alone_is_a_tied_model(tmp_path):
    """As GPT-2's and OPT's folders on the hub are: AutoModel's names, without the first part."""
    for name in ("gpt2", "opt"):
        model = build_family(name)
        trunk = model.transformer if name == "gpt2" else model.model
        trunk.save_pretrained(tmp_path / name)
        find_model(tmp_path / name)


@pytest.fixture(scope="module")
def spoiled(tmp_path_factory: pytest.TempPathFactory) -> Path:
    folder = tmp_path_factory.mktemp("spoiled")
    save_family("gpt2", folder)
    return folder


SHAPES = st.lists(st.sampled_from([0, 1, 2, 64]), max_size=3)
DTYPES = st.sampled_from([torch.float32, torch.float64, torch.bfloat16, torch.int64, torch.bool])


@pytest.mark.fuzz
@fuzzed
@given(
    parts=st.dictionaries(
        st.sampled_from(["v_head.summary.weight", "v_head.summary.bias", "m.v_head.summary.bias"])
        | st.sampled_from(["v_head.summary.x", "v_head.weight", "score.weight"]),
        st.tuples(SHAPES, DTYPES, st.sampled_from([0.0, 1e30, float("inf"), float("nan")])),
    )
)
def test_any_value_head_is_a_critic_or_one_line(spoiled, parts):
    kept = load_file(spoiled / WEIGHTS).items()
    trunk = {name: t for name, t in kept if "v_head" not in name and name != "score.weight"}
    head = {
        name: torch.full(shape, value).to(dtype) for name, (shape, dtype, value) in parts.items()
    }
    save_file(trunk | head, spoiled / WEIGHTS, metadata={"format": "pt"})
    try:
        assert isinstance(find_critic(spoiled), ModelFolder)
    except UserError as error:
        assert len(str(error).splitlines()) == 1
