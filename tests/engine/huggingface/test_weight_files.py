import json
import pickle
import struct
from pathlib import Path

import pytest
import torch
from hypothesis import given
from hypothesis import strategies as st
from safetensors.torch import save_file

from engine.errors import UserError
from engine.huggingface.weight_files import open_weights
from tests.fuzzing import fuzzed
from tests.special_files import KINDS, make_special

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
        assert found[name].dtype == tensor.dtype
        assert found[name].shape == tensor.shape
        assert torch.equal(found[name].read(), tensor)


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
    with pytest.raises(UserError, match="part-0.safetensors holds no 'c'"):
        open_weights(tmp_path)


@pytest.mark.parametrize("part", ["../model.safetensors", "/etc/passwd", "", "..", 3])
def test_an_index_cannot_point_out_of_its_folder(tmp_path, part):
    index = tmp_path / "model.safetensors.index.json"
    index.write_text(json.dumps({"weight_map": {"a": part}}))
    with pytest.raises(UserError, match="index.json: 'a' is in"):
        open_weights(tmp_path)


def test_a_folder_without_weights_says_what_is_looked_for(tmp_path):
    with pytest.raises(UserError, match="holds no model.safetensors or pytorch_model.bin"):
        open_weights(tmp_path)


def test_a_torch_file_of_something_else_is_refused(tmp_path):
    torch.save([TENSORS["a"]], tmp_path / "pytorch_model.bin")
    with pytest.raises(
        UserError, match="not a model's state dict .it holds list, no named tensors"
    ):
        open_weights(tmp_path)


def with_header(path: Path, header: object, data: bytes = bytes(24)) -> None:
    """Write a safetensors file of that header, as JSON or as bytes."""
    content = header if isinstance(header, bytes) else json.dumps(header).encode()
    path.write_bytes(struct.pack("<Q", len(content)) + content + data)


def entry(start: int, end: int, *, dtype: str = "F32", shape: object = (2, 3)) -> dict:
    return {"dtype": dtype, "shape": shape, "data_offsets": [start, end]}


HUGE = 1 << 62


@pytest.mark.parametrize(
    "header",
    [
        b"",
        b"{",
        b"null",
        b"[" * 100_000,
        b'{"a":' * 100_000,
        b"\xff\xfe",
        b'{"a":{"dtype":"F32","shape":[2,3],"data_offsets":[0,24]},"a":3}',
        {"a": entry(0, 48)},
        {"a": entry(8, 24)},
        {"a": entry(24, 0)},
        {"a": entry(0, 24, shape=[HUGE, HUGE])},
        {"a": entry(0, 24, shape=[-2, -3])},
        {"a": entry(0, 24, shape=None)},
        {"a": entry(0, 24, dtype="F99")},
        {"a": entry(0, 24, dtype="x" * 100_000)},
        {"a": entry(0, 24, dtype="F8_E4M3", shape=[24])},
        {"a": entry(0, 24, dtype="C64", shape=[3])},
        {"a": entry(0, 24), "b": entry(0, 24)},  # overlapping
        {"a": entry(0, 24), "b": entry(12, 24, shape=[3])},
        {"a" * 1_000_000: entry(0, 25)},
    ],
)
def test_a_safetensors_file_that_lies_is_one_line(tmp_path, header):
    path = tmp_path / "model.safetensors"
    with_header(path, header)
    with pytest.raises(UserError) as caught:
        open_weights(tmp_path)
    message = str(caught.value)
    assert message.startswith(str(path))
    assert len(message.splitlines()) == 1 and len(message) < 1000


@pytest.mark.parametrize("num_bytes", [(16 << 20) + 1, 1 << 40, (1 << 64) - 1])
def test_a_header_of_gigabytes_is_not_read(tmp_path, num_bytes):
    path = tmp_path / "model.safetensors"
    with path.open("wb") as stream:
        stream.write(struct.pack("<Q", num_bytes))
        stream.truncate(1 << 40)  # sparse: it lies about its length, too
    with pytest.raises(UserError, match=f"a header of {num_bytes} bytes"):
        open_weights(tmp_path)


@pytest.mark.parametrize("name", ["model.safetensors", "pytorch_model.bin"])
@pytest.mark.parametrize("kind", KINDS)
@pytest.mark.parametrize("is_part", [False, True])
def test_only_regular_files_are_read(tmp_path, name, kind, is_part):
    special = tmp_path / ("part." + name.split(".")[1] if is_part else name)
    if is_part:
        index = {"weight_map": {"a": special.name}}
        (tmp_path / f"{name}.index.json").write_text(json.dumps(index))
    make_special(special, kind)
    with pytest.raises(UserError, match=f"{special.name}( is |: no such file)"):
        open_weights(tmp_path)


@pytest.mark.parametrize("kind", KINDS)
def test_an_index_that_is_no_regular_file_is_not_read(tmp_path, kind):
    make_special(tmp_path / "model.safetensors.index.json", kind)
    with pytest.raises(UserError, match=r"index\.json( is |: no such file)"):
        open_weights(tmp_path)


def test_a_link_to_a_file_elsewhere_is_followed(tmp_path):
    # The hub's cache keeps a model's files so.
    (tmp_path / "blobs").mkdir()
    save_file(TENSORS, tmp_path / "blobs" / "1")
    (tmp_path / "snapshot").mkdir()
    (tmp_path / "snapshot" / "model.safetensors").symlink_to("../blobs/1")
    assert open_weights(tmp_path / "snapshot").keys() == TENSORS.keys()


def test_an_index_of_thousands_of_files_is_refused(tmp_path):
    index = tmp_path / "model.safetensors.index.json"
    places = {f"a{number}": f"{number}.safetensors" for number in range(1001)}
    index.write_text(json.dumps({"weight_map": places}))
    with pytest.raises(UserError, match="names 1001 files; 1000 are the most"):
        open_weights(tmp_path)


@pytest.mark.parametrize(
    "content",
    [
        "",
        "null",
        "[]",
        "{}",
        "[" * 100_000,
        '{"weight_map": []}',
        '{"weight_map": {"a": null}}',
        '{"weight_map": {"a": ["part-0.safetensors"]}}',
        json.dumps({"weight_map": {"a": f"{'x' * 100_000}.bin"}}),
        json.dumps({"weight_map": {"x" * 100_000: 3}}),
        json.dumps({"weight_map": {"x" * 100_000: "part-0.safetensors"}}),
        '{"weight_map": {"a": "part-0.safetensors\\n"}}',
    ],
)
def test_an_index_of_anything_is_one_line(tmp_path, content):
    index = in_parts(tmp_path, "safetensors")
    index.write_text(content)
    with pytest.raises(UserError) as caught:
        open_weights(tmp_path)
    message = str(caught.value)
    assert len(message.splitlines()) == 1 and len(message) < 1000
    assert str(tmp_path) in message


def assert_loads_or_is_one_line(folder: Path) -> None:
    try:
        for stored in open_weights(folder).values():
            assert tuple(stored.read().shape) == stored.shape
    except UserError as error:
        message = str(error)
        assert len(message.splitlines()) <= 2 and len(message) < 2000
        assert str(folder) in message


@pytest.fixture(scope="module")
def spoiled(tmp_path_factory) -> Path:
    return tmp_path_factory.mktemp("spoiled")


ENTRIES = st.builds(
    entry,
    st.integers(-1, 30) | st.just(HUGE),
    st.integers(-1, 30) | st.just(HUGE),
    dtype=st.sampled_from(["F32", "F16", "I64", "BOOL", "F8_E5M2", "F4", "", "C64"]),
    shape=st.lists(st.sampled_from([0, 1, 2, 3, 6, HUGE, -1]), max_size=3) | st.none(),
)
VALUES = st.recursive(
    st.none() | st.booleans() | st.integers() | st.floats() | st.text(max_size=5),
    lambda inner: st.lists(inner, max_size=3) | st.dictionaries(st.text(max_size=3), inner),
    max_leaves=5,
)


@pytest.mark.fuzz
@fuzzed
@given(
    header=st.dictionaries(
        st.sampled_from(["a", "b", "__metadata__", ""]), ENTRIES | VALUES, max_size=3
    )
    | st.binary(max_size=60),
    data=st.sampled_from([bytes(24), bytes(12), b"", bytes(range(30))]),
)
def test_any_safetensors_header_loads_or_is_one_line(spoiled, header, data):
    with_header(spoiled / "model.safetensors", header, data)
    assert_loads_or_is_one_line(spoiled)


@pytest.fixture(scope="module")
def spoiled_parts(tmp_path_factory) -> Path:
    folder = tmp_path_factory.mktemp("spoiled_parts")
    in_parts(folder, "safetensors")
    return folder


PARTS = st.sampled_from(["part-0.safetensors", "part-1.safetensors", "..", "/dev/zero", "x.bin"])


@pytest.mark.fuzz
@fuzzed
@given(
    index=st.fixed_dictionaries({"weight_map": st.dictionaries(st.sampled_from("abc"), PARTS)})
    | st.fixed_dictionaries({"weight_map": VALUES})
    | VALUES
    | st.binary(max_size=40)
)
def test_any_index_loads_or_is_one_line(spoiled_parts, index):
    content = index if isinstance(index, bytes) else json.dumps(index).encode()
    (spoiled_parts / "model.safetensors.index.json").write_bytes(content)
    assert_loads_or_is_one_line(spoiled_parts)


def test_what_the_library_quotes_of_a_file_is_one_line(spoiled):
    with_header(spoiled / "model.safetensors", {"a": ["\x1e\x85"]}, bytes(24))
    with pytest.raises(UserError) as error:
        open_weights(spoiled)
    assert len(str(error.value).splitlines()) == 1 and str(error.value).isprintable()
