import dataclasses
import json
import struct
from collections.abc import Iterator
from contextlib import contextmanager
from pathlib import Path

import pytest
import torch
from hypothesis import given
from hypothesis import strategies as st
from safetensors.torch import save_file

from engine.checkpoints import reading
from engine.checkpoints.index import Index, IndexedTensor, TensorPiece
from engine.checkpoints.manifest import Damage
from engine.checkpoints.reading import read_owned
from engine.checkpoints.shards import Part, Shard
from engine.errors import UserError
from tests.engine.checkpoints.near_json import near, refused_or_read
from tests.fuzzing import fuzzed

WHOLE = torch.arange(24.0).view(4, 6)
TOP, LEFT, RIGHT = ((0, 0), (1, 6)), ((1, 0), (3, 2)), ((1, 2), (3, 4))
FILES = {"weights-00000.safetensors": [TOP, LEFT], "weights-00001.safetensors": [RIGHT]}


def stored(folder: Path, files: dict = FILES) -> Index:
    """Write the whole tensor in pieces over files; return their index."""
    pieces = []
    for file, boxes in files.items():
        tensors = {}
        for offset, shape in boxes:
            cut = tuple(slice(at, at + n) for at, n in zip(offset, shape, strict=True))
            tensors[f"a@{','.join(map(str, offset))}"] = WHOLE[cut].contiguous()
            pieces.append(TensorPiece(file, offset, shape))
        save_file(tensors, folder / file)
    return Index(tensors={"a": IndexedTensor("F32", (4, 6), tuple(pieces))}, counts={})


def part(
    offset: tuple[int, ...], shape: tuple[int, ...], dtype: torch.dtype = torch.float32
) -> Part:
    shard = Shard(name="a", global_shape=(4, 6), offset=offset, shape=shape, is_written=True)
    return Part(shard=shard, tensor=torch.full(shape, -1.0, dtype=dtype))


@contextmanager
def noted_fills() -> Iterator[list[tuple[str, int]]]:
    """Collect (file, elements) of what is read in a block."""
    found: list[tuple[str, int]] = []
    read = reading._Fill.read

    def note(self, stored):  # type: ignore[no-untyped-def]
        found.append((self.piece.file, self.part.tensor[self.into].numel()))
        return read(self, stored)

    with pytest.MonkeyPatch.context() as patch:
        patch.setattr(reading._Fill, "read", note)
        yield found


@pytest.mark.parametrize(
    ("offset", "shape", "reads"),
    [
        ((0, 0), (4, 6), {"weights-00000.safetensors": 12, "weights-00001.safetensors": 12}),
        ((0, 0), (1, 6), {"weights-00000.safetensors": 6}),
        ((2, 3), (2, 2), {"weights-00001.safetensors": 4}),
        ((0, 1), (3, 2), {"weights-00000.safetensors": 4, "weights-00001.safetensors": 2}),
        ((3, 5), (1, 1), {"weights-00001.safetensors": 1}),
    ],
)
def test_part_takes_of_each_piece_what_meets_it_and_no_more(
    offset: tuple[int, ...], shape: tuple[int, ...], reads: dict, tmp_path: Path
):
    index, mine = stored(tmp_path), part(offset, shape)
    for file in FILES:
        if file not in reads:
            (tmp_path / file).unlink()  # it is not opened either
    with noted_fills() as fills:
        read_owned([mine], tmp_path, index)
    cut = tuple(slice(at, at + n) for at, n in zip(offset, shape, strict=True))
    assert torch.equal(mine.tensor, WHOLE[cut])
    counts: dict[str, int] = {}
    for file, count in fills:
        counts[file] = counts.get(file, 0) + count
    assert counts == reads


def test_numbers_are_rounded_to_the_dtype_of_the_part(tmp_path: Path):
    index, mine = stored(tmp_path), part((0, 0), (4, 6), torch.bfloat16)
    read_owned([mine], tmp_path, index)
    assert torch.equal(mine.tensor, WHOLE.bfloat16())


def test_tensor_that_is_not_there_or_of_another_shape_is_an_error(tmp_path: Path):
    index, mine = stored(tmp_path), part((0, 0), (4, 6))
    other = dataclasses.replace(mine, shard=dataclasses.replace(mine.shard, name="b"))
    with pytest.raises(UserError, match=f"{tmp_path}: it holds no b"):
        read_owned([other], tmp_path, index)
    wide = dataclasses.replace(mine, shard=dataclasses.replace(mine.shard, global_shape=(4, 8)))
    with pytest.raises(UserError, match=r"a is \[4, 6\], this run's model has \[4, 8\]"):
        read_owned([wide], tmp_path, index)


@pytest.mark.parametrize(
    "tensors",
    [
        {"a@0,0": torch.zeros(2, 3)},  # another shape
        {"a@0,0": torch.zeros(4, 6, dtype=torch.bfloat16)},  # another dtype
        {"a@0,0": torch.zeros(4, 6, dtype=torch.int32)},
        {"b@0,0": torch.zeros(4, 6)},  # another name
    ],
)
def test_file_with_something_else_than_the_index_says_is_damage(tensors: dict, tmp_path: Path):
    index = stored(tmp_path, {"weights-00000.safetensors": [((0, 0), (4, 6))]})
    save_file(tensors, tmp_path / "weights-00000.safetensors")
    with pytest.raises(Damage, match=r"weights-00000\.safetensors: cannot be read as tensors"):
        read_owned([part((0, 0), (4, 6))], tmp_path, index)


def header(content: object) -> bytes:
    text = json.dumps(content).encode()
    return struct.pack("<Q", len(text)) + text


ENTRY = {"dtype": "F32", "shape": [4, 6], "data_offsets": [0, 96]}


@pytest.mark.parametrize(
    "content",
    [
        b"",
        b"\0" * 8,
        b"\xff" * 8,  # a header of 2**64 bytes
        struct.pack("<Q", 1 << 40) + b"{}",
        header({}) + bytes(96),
        header([]) + bytes(96),
        header({"a@0,0": ENTRY}),  # no data
        header({"a@0,0": ENTRY}) + bytes(95),
        header({"a@0,0": ENTRY}) + bytes(97),
        header({"a@0,0": ENTRY | {"data_offsets": [0, 1 << 60]}}) + bytes(96),
        header({"a@0,0": ENTRY | {"data_offsets": [96, 0]}}) + bytes(96),
        header({"a@0,0": ENTRY | {"shape": [1 << 40, 6]}}) + bytes(96),
        header({"a@0,0": ENTRY | {"shape": [-4, -6]}}) + bytes(96),
        header({"a@0,0": ENTRY | {"dtype": "PICKLE"}}) + bytes(96),
        struct.pack("<Q", 200_000) + b"[" * 200_000,
    ],
)
def test_broken_file_of_tensors_is_damage(content: bytes, tmp_path: Path):
    index = stored(tmp_path, {"weights-00000.safetensors": [((0, 0), (4, 6))]})
    (tmp_path / "weights-00000.safetensors").write_bytes(content)
    with pytest.raises(Damage, match=r"weights-00000\.safetensors: cannot be read"):
        read_owned([part((0, 0), (4, 6))], tmp_path, index)


def test_folder_of_any_name_is_read(tmp_path: Path):
    index = stored(tmp_path)
    folder = tmp_path / "not_utf8_\udcff"
    folder.mkdir()
    for file in FILES:
        (tmp_path / file).rename(folder / file)
    mine = part((0, 0), (4, 6))
    read_owned([mine], folder, index)
    assert torch.equal(mine.tensor, WHOLE)
    (folder / "weights-00001.safetensors").write_bytes(b"\xff" * 8)
    with pytest.raises(Damage, match="weights-00001.safetensors: cannot be read"):
        read_owned([mine], folder, index)


@pytest.mark.fuzz
@fuzzed
@given(data=st.data())
def test_any_file_of_tensors_is_read_or_refused(tmp_path: Path, data: st.DataObject):
    (tmp_path / "weights-00000.safetensors").unlink(missing_ok=True)  # it may be mapped still
    index = stored(tmp_path, {"weights-00000.safetensors": [((0, 0), (4, 6))]})
    path, mine = tmp_path / "weights-00000.safetensors", part((0, 0), (4, 6))
    content = path.read_bytes()
    if data.draw(st.booleans()):
        entries = data.draw(near({"a@0,0": ENTRY, "b": ENTRY | {"data_offsets": [96, 192]}}))
        content = header(entries) + content[-96:] * data.draw(st.integers(0, 2))
    start = data.draw(st.integers(0, len(content)))
    stop = data.draw(st.sampled_from([start, start + 1, len(content)]))
    content = content[:start] + data.draw(st.binary(max_size=8)) + content[stop:]
    path.unlink()
    path.write_bytes(content)
    refused_or_read(lambda: read_owned([mine], tmp_path, index) or True)
    assert mine.tensor.shape == (4, 6) and mine.tensor.dtype is torch.float32
