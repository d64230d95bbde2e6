import json
import pickle
from pathlib import Path

import pytest
import torch
from safetensors.torch import save_file

from engine.errors import UserError
from engine.huggingface.weight_files import open_weights

TENSORS = {"a": torch.arange(6.0).view(2, 3), "b": torch.tensor([1.5], dtype=torch.bfloat16)}


def in_parts(folder: Path, suffix: str) -> Path:
    """Write each tensor to a file of its own, and the index."""
    single = {"safetensors": "model.safetensors", "bin": "pytorch_model.bin"}[suffix]
    places = {}
    for number, (name, tensor) in enumerate(TENSORS.items()):
        places[name] = f"part-{number}.{suffix}"
        if suffix == "bin":
            torch.save({name: tensor}, folder / places[name])
        else:
            save_file({name: tensor}, folder / places[name])
    index = folder / f"{single}.index.json"
    index.write_text(json.dumps({"weight_map": places}))
    return index


def assert_opens(folder: Path) -> None:
    found = open_weights(folder)
    assert found.keys() == TENSORS.keys()
    for name, tensor in TENSORS.items():
        assert found[name].path.parent == folder
        assert found[name].tensor.dtype == tensor.dtype
        assert torch.equal(found[name].tensor, tensor)


def test_reads_one_safetensors_file(tmp_path):
    save_file(TENSORS, tmp_path / "model.safetensors")
    assert_opens(tmp_path)


@pytest.mark.parametrize("is_zip", [True, False])
def test_reads_a_torch_file_of_either_format(tmp_path, is_zip):
    path = tmp_path / "pytorch_model.bin"
    torch.save(TENSORS, path, _use_new_zipfile_serialization=is_zip)
    assert_opens(tmp_path)


@pytest.mark.parametrize("suffix", ["safetensors", "bin"])
def test_reads_parts_with_an_index(tmp_path, suffix):
    in_parts(tmp_path, suffix)
    assert_opens(tmp_path)


def test_safetensors_goes_before_a_torch_file(tmp_path):
    save_file(TENSORS, tmp_path / "model.safetensors")
    (tmp_path / "pytorch_model.bin").write_bytes(b"never opened")
    assert_opens(tmp_path)


@pytest.mark.filterwarnings("ignore:Detected pickle protocol")  # of the file that is refused
def test_a_pickle_with_code_is_refused_and_not_run(tmp_path):
    class Hostile:
        def __reduce__(self):
            return Path.touch, (tmp_path / "was_run",)

    path = tmp_path / "pytorch_model.bin"
    torch.save({"a": TENSORS["a"], "b": Hostile()}, path)
    with pytest.raises(UserError, match="pytorch_model.bin .* would run code"):
        open_weights(tmp_path)
    path.write_bytes(pickle.dumps(Hostile()))
    with pytest.raises(UserError, match="pytorch_model.bin"):
        open_weights(tmp_path)
    assert not (tmp_path / "was_run").exists()


@pytest.mark.parametrize("name", ["model.safetensors", "pytorch_model.bin"])
@pytest.mark.parametrize("fraction", [0.0, 0.1, 0.5, 0.99])
def test_a_file_cut_short_is_named(tmp_path, name, fraction):
    path = tmp_path / name
    save = save_file if path.suffix == ".safetensors" else torch.save
    save(TENSORS, path)
    content = path.read_bytes()
    path.write_bytes(content[: int(fraction * len(content))])
    with pytest.raises(UserError, match=f"{name} is damaged") as caught:
        open_weights(tmp_path)
    assert len(str(caught.value).splitlines()) == 1


def test_a_part_that_is_missing_is_named(tmp_path):
    in_parts(tmp_path, "safetensors")
    (tmp_path / "part-1.safetensors").unlink()
    with pytest.raises(UserError, match="part-1.safetensors: no such file"):
        open_weights(tmp_path)


def test_a_tensor_that_its_part_lacks_is_named(tmp_path):
    index = in_parts(tmp_path, "safetensors")
    index.write_text(json.dumps({"weight_map": {"c": "part-0.safetensors"}}))
    with pytest.raises(UserError, match="part-0.safetensors holds no c"):
        open_weights(tmp_path)


@pytest.mark.parametrize("part", ["../model.safetensors", "/etc/passwd", "", "..", 3])
def test_an_index_cannot_point_out_of_its_folder(tmp_path, part):
    index = tmp_path / "model.safetensors.index.json"
    index.write_text(json.dumps({"weight_map": {"a": part}}))
    with pytest.raises(UserError, match="index.json: a is in"):
        open_weights(tmp_path)


def test_a_folder_without_weights_says_what_is_looked_for(tmp_path):
    with pytest.raises(UserError, match="holds no model.safetensors or pytorch_model.bin"):
        open_weights(tmp_path)


def test_a_torch_file_of_something_else_is_refused(tmp_path):
    torch.save([TENSORS["a"]], tmp_path / "pytorch_model.bin")
    with pytest.raises(UserError, match="not a model's state dict"):
        open_weights(tmp_path)
