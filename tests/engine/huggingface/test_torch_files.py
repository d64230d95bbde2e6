import io
import os
import pickle
import pickletools
import struct
import zipfile
from collections import OrderedDict
from pathlib import Path

import pytest
import torch
from hypothesis import given
from hypothesis import strategies as st

from engine.errors import UserError
from engine.huggingface.torch_files import find_tensors, map_tensor
from tests.fuzzing import fuzzed

MATRIX = torch.arange(6.0).view(2, 3)
TENSORS = {
    "matrix": MATRIX,
    "turned": MATRIX.T,  # the same numbers in another order
    "row": MATRIX[1],
    "parameter": torch.nn.Parameter(torch.tensor([1.5, 2.5]).half()),
    "bf16": torch.tensor([[1.5]], dtype=torch.bfloat16),
    "none": torch.empty(0, 3),
    "one": torch.tensor(7.0),
    "mask": torch.tensor([True, False]),
    "bytes": torch.tensor([1, 2, 3], dtype=torch.uint8),
}
FORMATS = {"zip": True, "legacy": False}


def save(value: object, path: Path, *, is_zip: bool, **options: object) -> bytes:
    torch.save(value, path, _use_new_zipfile_serialization=is_zip, **options)
    return path.read_bytes()


def refusal(path: Path) -> str:
    """The line with which the file is refused."""
    with pytest.raises(UserError) as caught:
        find_tensors(path)
    message = str(caught.value)
    assert message.startswith(str(path))
    assert len(message.splitlines()) == 1 and len(message) < 600
    return message


@pytest.mark.parametrize("is_zip", FORMATS.values(), ids=FORMATS)
@pytest.mark.parametrize("protocol", [2, 3])
def test_tensors_are_those_that_torch_loads(tmp_path, is_zip, protocol):
    state_dict = OrderedDict(TENSORS)
    state_dict._metadata = {"": {"version": 1}}
    path = tmp_path / "weights.bin"
    save(state_dict, path, is_zip=is_zip, pickle_protocol=protocol)
    found = find_tensors(path)
    loaded = torch.load(path, weights_only=True)
    assert list(found) == list(TENSORS)
    for name, located in found.items():
        tensor = map_tensor(path, located)
        assert (tensor.dtype, tensor.shape) == (located.dtype, located.shape)
        assert torch.equal(tensor, loaded[name]), name


def test_a_module_of_torch_comes_back(tmp_path):
    module = torch.nn.Sequential(torch.nn.Linear(3, 2), torch.nn.BatchNorm1d(2))
    torch.save(module.state_dict(), tmp_path / "weights.bin")
    for name, located in find_tensors(tmp_path / "weights.bin").items():
        assert torch.equal(map_tensor(tmp_path / "weights.bin", located), module.state_dict()[name])


def test_a_mapped_tensor_may_be_written_and_the_file_stays(tmp_path):
    path = tmp_path / "weights.bin"
    content = save({"a": torch.ones(3)}, path, is_zip=True)
    map_tensor(path, find_tensors(path)["a"]).zero_()
    assert path.read_bytes() == content


class Hostile:
    """What a pickle makes of it: a call that leaves a file behind."""

    def __init__(self, mark: Path) -> None:
        self.mark = mark

    def __reduce__(self):
        return os.mkdir, (str(self.mark),)


def rewrite(path: Path, changes: dict[str, bytes]) -> None:
    """Replace entries of an archive, or add some."""
    with zipfile.ZipFile(path) as archive:
        entries = {name: archive.read(name) for name in archive.namelist()}
    root = next(iter(entries)).split("/")[0]
    with zipfile.ZipFile(path, "w") as archive:
        for name, content in (entries | {f"{root}/{k}": v for k, v in changes.items()}).items():
            archive.writestr(name, content)


def plant(place: str, mark: Path, path: Path) -> None:
    """Write a torch file with a payload at one of its places."""
    payload = pickle.dumps(Hostile(mark), 2)
    if place == "whole file":
        path.write_bytes(payload)
    elif place == "value":
        torch.save({"a": MATRIX, "b": Hostile(mark)}, path)
    elif place == "root":
        torch.save(Hostile(mark), path)
    elif place == "key":
        torch.save({(Hostile(mark),): MATRIX}, path)
    elif place == "metadata":
        state_dict = OrderedDict(a=MATRIX)
        state_dict._metadata = Hostile(mark)
        torch.save(state_dict, path)
    elif place == "attribute of a tensor":
        tensor = MATRIX.clone()
        tensor.note = Hostile(mark)
        torch.save({"a": tensor}, path)
    elif place == "module":
        torch.save(torch.nn.Linear(2, 2), path)
    elif place.startswith("archive's "):
        torch.save({"a": MATRIX}, path)
        rewrite(path, {place.removeprefix("archive's "): payload})
    elif place == "legacy value":
        save({"a": MATRIX, "b": Hostile(mark)}, path, is_zip=False)
    else:
        parts = pickles_of(save({"a": MATRIX}, path, is_zip=False))
        parts[int(place.split()[-1])] = payload
        path.write_bytes(b"".join(parts))


def pickles_of(legacy: bytes) -> list[bytes]:
    """The five pickles of a legacy file, and the numbers behind them."""
    stream = io.BytesIO(legacy)
    ends = [0]
    for _ in range(5):
        list(pickletools.genops(stream))
        ends.append(stream.tell())
    return [legacy[a:b] for a, b in zip(ends, [*ends[1:], len(legacy)], strict=True)]


PLACES = [
    *("whole file", "value", "root", "key", "metadata", "attribute of a tensor", "module"),
    *("archive's data.pkl", "archive's data/0", "archive's byteorder", "archive's constants.pkl"),
    *("legacy value", *(f"legacy pickle {number}" for number in range(5))),
]


@pytest.mark.filterwarnings("ignore")  # torch's, of what is saved
@pytest.mark.parametrize("place", PLACES)
def test_a_payload_is_run_nowhere(tmp_path, place):
    mark, path = tmp_path / "was_run", tmp_path / "weights.bin"
    plant(place, mark, path)
    if place in ("archive's constants.pkl", "archive's data/0"):  # read as nothing, or as numbers
        assert find_tensors(path).keys() == {"a"}
        map_tensor(path, find_tensors(path)["a"])
    else:
        refusal(path)
    assert not mark.exists()
    # It would have run: pickle does what the file says.
    pickle.loads(pickle.dumps(Hostile(mark)))
    assert mark.exists()


class Subclass(torch.Tensor):
    """A tensor of another class."""


@pytest.mark.parametrize("is_zip", FORMATS.values(), ids=FORMATS)
@pytest.mark.parametrize(
    ("tensor", "problem"),
    [
        (MATRIX.to_sparse(), "_rebuild_sparse_tensor"),
        (MATRIX.to_sparse_csr(), "_rebuild_sparse"),
        (torch.quantize_per_tensor(MATRIX, 0.1, 0, torch.qint8), "_rebuild_qtensor"),
        (torch.empty(2, device="meta"), "_rebuild_meta"),
        (MATRIX.to(torch.complex64), "ComplexFloatStorage"),
        (MATRIX.to(torch.float8_e4m3fn), "_rebuild_tensor_v3"),
        (MATRIX.as_subclass(Subclass), "_rebuild_from_type_v2"),
        (torch.nested.nested_tensor([torch.ones(2), torch.ones(1)]), "nested"),
        (torch.zeros(1).expand(1000, 1000), "larger than what is stored"),
        (torch.zeros(9).as_strided((5, 5), (1, 1)), "larger than what is stored"),
        (3, "is int"),
        (None, "is NoneType"),
        ({"a": MATRIX}, "is dict"),
        (MATRIX.numpy(), "numpy"),
    ],
)
@pytest.mark.filterwarnings("ignore")
def test_other_tensors_than_plain_ones_are_named(tmp_path, is_zip, tensor, problem):
    save({"fine": MATRIX, "odd": tensor}, tmp_path / "weights.bin", is_zip=is_zip)
    assert problem in refusal(tmp_path / "weights.bin")


def with_pickle(path: Path, old: bytes, new: bytes) -> None:
    """Save MATRIX, and replace bytes of its pickle."""
    torch.save({"a": MATRIX}, path)
    with zipfile.ZipFile(path) as archive:
        content = archive.read("weights/data.pkl")
    assert content.count(old) == 1
    rewrite(path, {"data.pkl": content.replace(old, new)})


HUGE = b"\x8a\x07" + (1 << 50).to_bytes(7, "little")  # LONG1
SHAPE = b"K\x02K\x03\x86"  # 2, 3, TUPLE2


@pytest.mark.parametrize(
    ("old", "new", "problem"),
    [
        (SHAPE, HUGE + b"K\x03\x86", "larger than what is stored"),
        (SHAPE, b"K\x02K\x04\x86", "larger than what is stored"),
        (SHAPE, b"J\xff\xff\xff\xffK\x03\x86", "has no shape"),
        (SHAPE, b"K\x02\x85", "has 1 axes, 2 strides"),
        (SHAPE, b"\x88K\x03\x86", "has no shape"),
        (b"K\x03K\x01\x86", b"K\x03J\xff\xff\xff\xff\x86", "has no shape"),
        (b"K\x03K\x01\x86", HUGE + b"K\x01\x86", "larger than what is stored"),
        (b"QK\x00" + SHAPE, b"QK\x01" + SHAPE, "larger than what is stored"),
        (b"K\x06tq", HUGE + b"tq", "is shorter than its tensors"),
        (b"X\x01\x00\x00\x000", b"X\x01\x00\x00\x009", "no entry data/'9'"),
        (b"X\x01\x00\x00\x000", b"X\x06\x00\x00\x00../../", "no entry data/"),
        (b"FloatStorage", b"ChairStorage", "torch.ChairStorage"),
        (b"_rebuild_tensor_v2", b"_rebuild_tensor_v9", "_rebuild_tensor_v9"),
    ],
)
def test_what_lies_outside_of_the_file_is_refused(tmp_path, old, new, problem):
    with_pickle(tmp_path / "weights.bin", old, new)
    assert problem in refusal(tmp_path / "weights.bin")


def test_a_legacy_storage_of_more_numbers_than_the_file_is_refused(tmp_path):
    path = tmp_path / "weights.bin"
    parts = pickles_of(save({"a": MATRIX}, path, is_zip=False))
    parts[3] = parts[3].replace(b"K\x06N", HUGE + b"N")
    path.write_bytes(b"".join(parts))
    assert f"a storage of 6 numbers, not {1 << 50}" in refusal(path)
    parts[5] = struct.pack("<q", 1 << 50) + parts[5][8:]
    path.write_bytes(b"".join(parts))
    assert "the numbers end beyond the file" in refusal(path)


def test_a_bomb_is_refused_before_it_is_unpacked(tmp_path):
    path = tmp_path / "weights.bin"
    torch.save({"a": MATRIX}, path)
    with zipfile.ZipFile(path, "a", zipfile.ZIP_DEFLATED) as archive:
        archive.writestr("weights/data/7", bytes(1 << 20))
    assert find_tensors(path).keys() == {"a"}  # which nothing reads
    for name in ("data.pkl", "data/0"):
        torch.save({"a": MATRIX}, path)
        with zipfile.ZipFile(path) as archive:
            entries = {each: archive.read(each) for each in archive.namelist()}
        with zipfile.ZipFile(path, "w") as archive:
            for each, content in entries.items():
                is_bomb = each == f"weights/{name}"
                kind = zipfile.ZIP_DEFLATED if is_bomb else zipfile.ZIP_STORED
                archive.writestr(each, content, compress_type=kind)
        assert "compressed or encrypted" in refusal(path)
    torch.save({"a": MATRIX}, path)
    rewrite(path, {"data.pkl": b"\x80\x02" + bytes(5 << 20)})
    assert "data.pkl has 5242882 bytes" in refusal(path)


def test_an_archive_with_a_gigabyte_of_directory_is_refused(tmp_path):
    path = tmp_path / "weights.bin"
    torch.save({"a": MATRIX}, path)
    content = path.read_bytes()
    end = content.rindex(b"PK\x05\x06")
    size = 1 << 30
    with path.open("wb") as stream:
        stream.write(content[:end])
        stream.truncate(end + size)
        stream.seek(end + size)
        stream.write(struct.pack("<4s4H2LH", b"PK\x05\x06", 0, 0, 1, 1, size, end, 0))
    assert "directory is too long" in refusal(path)


def test_two_entries_of_one_name_are_refused(tmp_path):
    path = tmp_path / "weights.bin"
    torch.save({"a": MATRIX}, path)
    with zipfile.ZipFile(path, "a") as archive, pytest.warns(UserWarning):
        archive.writestr("weights/data.pkl", b"")
    assert "two entries of the archive have one name" in refusal(path)


def test_big_endian_numbers_are_refused(tmp_path):
    path = tmp_path / "weights.bin"
    torch.save({"a": MATRIX}, path)
    rewrite(path, {"byteorder": b"big"})
    assert "not little endian" in refusal(path)


@pytest.mark.parametrize("is_zip", FORMATS.values(), ids=FORMATS)
def test_a_file_cut_anywhere_is_refused(tmp_path, is_zip):
    path = tmp_path / "weights.bin"
    content = save({"a": MATRIX, "b": torch.ones(300)}, path, is_zip=is_zip)
    for length in range(0, len(content), 7):
        path.write_bytes(content[:length])
        refusal(path)


@pytest.fixture(scope="module")
def samples(tmp_path_factory) -> dict[str, bytes]:
    path = tmp_path_factory.mktemp("samples") / "weights.bin"
    small = {"a": MATRIX, "b": MATRIX.T, "c": torch.nn.Parameter(torch.ones(1).half())}
    return {name: save(small, path, is_zip=is_zip) for name, is_zip in FORMATS.items()}


@pytest.fixture(scope="module")
def spoiled(tmp_path_factory) -> Path:
    return tmp_path_factory.mktemp("fuzz") / "weights.bin"


@pytest.mark.fuzz
@fuzzed
@given(
    kind=st.sampled_from(sorted(FORMATS)),
    new=st.binary(min_size=1, max_size=8),
    cut=st.tuples(st.integers(0, 2500), st.integers(0, 12), st.none() | st.integers(0, 3000)),
)
def test_any_bytes_are_tensors_of_the_file_or_one_line(samples, spoiled, kind, new, cut):
    content = samples[kind]
    start, num_dropped, end = cut
    start %= len(content)
    spoiled.write_bytes((content[:start] + new + content[start + num_dropped :])[:end])
    try:
        found = find_tensors(spoiled)
    except UserError as error:
        message = str(error)
        assert message.startswith(str(spoiled))
        assert len(message.splitlines()) <= 2 and len(message) < 2000
        return
    for located in found.values():
        assert map_tensor(spoiled, located).numel() * located.dtype.itemsize <= len(content) + 8
