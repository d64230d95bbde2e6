import json
import os
import struct
from pathlib import Path

import pytest
import torch
from safetensors import safe_open
from safetensors.torch import load_file

from engine.checkpoints.manifest import digest_of_file
from engine.checkpoints.shards import Part, Shard
from engine.checkpoints.tensor_file import TensorFile, tensor_file, write_tensors


def part(name: str, tensor: torch.Tensor, offset: tuple[int, ...] | None = None) -> Part:
    shape = tuple(tensor.shape)
    return Part(
        shard=Shard(
            name=name,
            global_shape=(9,) * len(shape),
            offset=offset or (0,) * len(shape),
            shape=shape,
            is_written=True,
        ),
        tensor=tensor,
    )


def write(file: TensorFile, path: Path) -> None:
    memory = torch.empty(file.num_bytes, dtype=torch.uint8)
    file.stage(memory)
    digest = write_tensors(path, file.header(), memory)
    assert digest == digest_of_file(path)


def test_bytes_of_a_file_are_the_formats(tmp_path: Path):
    """The safetensors format: 8 bytes of a length, a JSON header, then the tensors' bytes."""
    halves = part("h", torch.tensor([1.0, -2.0], dtype=torch.bfloat16), (3,))
    words = part("w", torch.tensor([[1.0]]))
    write(tensor_file("policy/x", [halves, words]), tmp_path / "x")
    content = (tmp_path / "x").read_bytes()
    (length,) = struct.unpack("<Q", content[:8])
    assert length % 8 == 0
    assert json.loads(content[8 : 8 + length]) == {
        "w@0,0": {"dtype": "F32", "shape": [1, 1], "data_offsets": [0, 4]},
        "h@3": {"dtype": "BF16", "shape": [2], "data_offsets": [4, 8]},
    }
    assert content[8 + length :] == bytes.fromhex("0000803f 803f 00c0")


@pytest.mark.parametrize("dtype", [torch.float64, torch.float32, torch.bfloat16, torch.float16])
def test_the_safetensors_library_opens_it(dtype: torch.dtype, tmp_path: Path):
    generator = torch.Generator().manual_seed(0)
    tensors = {
        name: torch.randn(shape, generator=generator).to(dtype)
        for name, shape in {"a": (3, 5), "b": (7,), "c": (1, 2, 3)}.items()
    }
    odd = part("odd", torch.randn(3, generator=generator).to(torch.bfloat16))
    write(tensor_file("x", [odd, *(part(n, t) for n, t in tensors.items())]), tmp_path / "x")
    found = load_file(tmp_path / "x")
    assert found.keys() == {"a@0,0", "b@0", "c@0,0,0", "odd@0"}
    for name, tensor in tensors.items():
        theirs = found[f"{name}@{','.join('0' * tensor.dim())}"]
        assert theirs.dtype is dtype and torch.equal(theirs, tensor)
    assert torch.equal(found["odd@0"], odd.tensor)
    with safe_open(tmp_path / "x", framework="pt") as stored:
        assert stored.metadata() is None


def test_part_of_a_larger_tensor_is_copied_whatever_its_strides(tmp_path: Path):
    whole = torch.arange(20.0).view(4, 5)
    write(tensor_file("x", [part("a", whole.T[1:3])]), tmp_path / "x")
    assert torch.equal(load_file(tmp_path / "x")["a@0,0"], whole.T[1:3])


def test_snapshot_keeps_what_it_was_while_the_tensor_goes_on(tmp_path: Path):
    tensor = torch.zeros(4)
    file = tensor_file("x", [part("a", tensor)])
    memory = torch.empty(file.num_bytes, dtype=torch.uint8)
    file.stage(memory)
    tensor += 1.0
    write_tensors(tmp_path / "x", file.header(), memory)
    assert load_file(tmp_path / "x")["a@0"].tolist() == [0.0] * 4


def test_short_writes_are_gone_on_with(tmp_path: Path, monkeypatch: pytest.MonkeyPatch):
    write_some = os.write
    monkeypatch.setattr(os, "write", lambda number, content: write_some(number, content[:7]))
    tensor = torch.arange(100.0)
    write(tensor_file("x", [part("a", tensor)]), tmp_path / "x")
    assert torch.equal(load_file(tmp_path / "x")["a@0"], tensor)


def test_file_that_is_there_is_not_written_over(tmp_path: Path):
    (tmp_path / "x").write_text("another's")
    with pytest.raises(FileExistsError):
        write(tensor_file("x", [part("a", torch.zeros(1))]), tmp_path / "x")
    assert (tmp_path / "x").read_text() == "another's"


def test_what_was_written_is_synced(tmp_path: Path, monkeypatch: pytest.MonkeyPatch):
    synced: list[int] = []
    sync = os.fsync
    monkeypatch.setattr(
        os, "fsync", lambda number: (synced.append(os.fstat(number).st_size), sync(number))
    )
    write(tensor_file("x", [part("a", torch.zeros(1000))]), tmp_path / "x")
    assert synced == [(tmp_path / "x").stat().st_size]
