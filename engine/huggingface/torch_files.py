"""Where the tensors of a torch.save file lie in it: found without torch.load, checked, and mapped.

Two formats: a zip archive (since torch 1.6) and pickles followed by numbers (before). In both, the
pickle says a tensor's storage, offset, shape and strides. Whatever lies outside of the file or its
storage is refused, so no tensor takes more memory than its file has bytes.
Source: torch/serialization.py, `_save` and `_legacy_save`.
"""

import io
import math
import struct
import zipfile
from dataclasses import dataclass
from io import BufferedReader
from pathlib import Path
from typing import Any, BinaryIO

import numpy as np
import torch
from torch import Tensor

from engine.errors import UserError
from engine.files import open_file
from engine.huggingface.pickles import (
    Called,
    Elsewhere,
    ForeignNameError,
    Named,
    read_pickle,
)

# All our choice. GPT-3's 1,157 tensors need 0.2 MB of pickle and as much of a zip's directory.
_MAX_PICKLE_BYTES = 4 << 20
_MAX_DIRECTORY_BYTES = 8 << 20
_MOST_SHOWN = 60  # characters of a text from the file in an error

_DTYPES = {
    "torch.DoubleStorage": torch.float64,
    "torch.FloatStorage": torch.float32,
    "torch.HalfStorage": torch.float16,
    "torch.BFloat16Storage": torch.bfloat16,
    "torch.LongStorage": torch.int64,
    "torch.IntStorage": torch.int32,
    "torch.ShortStorage": torch.int16,
    "torch.CharStorage": torch.int8,
    "torch.ByteStorage": torch.uint8,
    "torch.BoolStorage": torch.bool,
}
_TENSOR = "torch._utils._rebuild_tensor_v2"
_PARAMETER = "torch._utils._rebuild_parameter"
_NAMES = {*_DTYPES, _TENSOR, _PARAMETER, "collections.OrderedDict"}
_LEGACY_MAGIC = 0x1950A86A20F9469CFC6C
_ZIP_MAGIC = b"PK\x03\x04"
_ZIP_ERRORS = (zipfile.BadZipFile, EOFError, NotImplementedError)  # of zipfile
_LOCAL_HEADER_BYTES = 30  # of a zip's entry, before its name and its extra field
_STORED = (zipfile.ZIP_STORED, 0)  # neither compressed nor encrypted


@dataclass(frozen=True)
class _Storage:
    key: str
    dtype: torch.dtype
    numel: int


@dataclass(frozen=True)
class LocatedTensor:
    """A tensor in a file."""

    dtype: torch.dtype
    shape: tuple[int, ...]
    strides: tuple[int, ...]
    """In numbers, of at least 0."""
    start: int
    """The byte of the file at which its first number lies."""

    @property
    def num_spanned(self) -> int:
        """Numbers from its first to its last in the file."""
        return _num_spanned(self.shape, self.strides)


def find_tensors(path: Path) -> dict[str, LocatedTensor]:
    """Return where the tensors of a state dict lie in a torch.save file, by their names.

    Raises UserError for a file that is damaged or that holds anything else.
    """
    with open_file(path) as stream:
        try:
            is_zip = stream.read(4) == _ZIP_MAGIC
            stream.seek(0)
            return _find_in_zip(stream) if is_zip else _find_in_legacy(stream)
        except ForeignNameError as error:
            raise UserError(
                f"{path} holds more than tensors ({error}) and would run code in other readers; "
                "get the model's safetensors files instead"
            ) from None
        except (*_ZIP_ERRORS, ValueError, OSError, struct.error) as e:
            reason = str(e).split("\n", 1)[0][: 2 * _MOST_SHOWN]
            raise UserError(
                f"{path} is damaged, cut short, or not a model's state dict ({reason}); "
                "download it again"
            ) from None


def map_tensor(path: Path, located: LocatedTensor) -> Tensor:
    """Return the tensor at a place that find_tensors has found: its bytes are read when used."""
    if math.prod(located.shape) == 0:
        return torch.empty(located.shape, dtype=located.dtype)
    num_bytes = located.num_spanned * located.dtype.itemsize
    with open_file(path) as stream:
        try:
            mapped = np.memmap(stream, np.uint8, mode="c", offset=located.start, shape=num_bytes)
        except (ValueError, OSError) as error:
            raise UserError(f"{path}: cannot be mapped: {error}") from None
    # An old file's numbers may lie at odd addresses, which not every processor reads.
    is_aligned = located.start % located.dtype.itemsize == 0
    numbers = torch.from_numpy(mapped if is_aligned else mapped.copy()).view(located.dtype)
    return numbers.as_strided(located.shape, located.strides)


class _BoundedReader:
    """A file for zipfile, which reads as many bytes at once as an archive says its directory has.

    The directory becomes one object an entry.
    """

    def __init__(self, stream: BufferedReader) -> None:
        self.seek, self.tell, self.seekable = stream.seek, stream.tell, stream.seekable
        self._stream = stream

    def read(self, size: int = -1) -> bytes:
        """Return that many bytes, or all; raises ValueError where they are too many."""
        content = self._stream.read(_MAX_DIRECTORY_BYTES + 1 if size < 0 else size)
        if max(size, len(content)) > _MAX_DIRECTORY_BYTES:
            raise ValueError("the archive's directory is too long")
        return content


def _find_in_zip(stream: BufferedReader) -> dict[str, LocatedTensor]:
    entries = zipfile.ZipFile(_BoundedReader(stream)).infolist()  # type: ignore[arg-type]
    by_name = {entry.filename: entry for entry in entries}
    if len(by_name) < len(entries):
        raise ValueError("two entries of the archive have one name")
    pickles = [name for name in by_name if name.count("/") == 1 and name.endswith("/data.pkl")]
    if len(pickles) != 1:
        raise ValueError(f"the archive has {len(pickles)} entries data.pkl")
    root = pickles[0].removesuffix("data.pkl")
    if f"{root}byteorder" in by_name:
        start, num_bytes = _extent(stream, by_name[f"{root}byteorder"])
        stream.seek(start)
        if stream.read(min(num_bytes, 8)) != b"little":
            raise ValueError("the numbers are not little endian")
    start, num_bytes = _extent(stream, by_name[pickles[0]])
    if num_bytes > _MAX_PICKLE_BYTES:
        raise ValueError(f"data.pkl has {num_bytes} bytes; {_MAX_PICKLE_BYTES} are the most")
    stream.seek(start)
    described = _describe(read_pickle(io.BytesIO(stream.read(num_bytes)), _NAMES))
    starts = {}
    for storage, *_ in described.values():
        entry = by_name.get(f"{root}data/{storage.key}")
        if entry is None:
            raise ValueError(f"no entry data/{storage.key[:_MOST_SHOWN]!r}")
        starts[storage.key], num_bytes = _extent(stream, entry)
        if num_bytes < storage.numel * storage.dtype.itemsize:
            raise ValueError(f"data/{storage.key[:_MOST_SHOWN]!r} is shorter than its tensors")
    return _locate(described, starts)


def _extent(stream: BinaryIO, entry: zipfile.ZipInfo) -> tuple[int, int]:
    """Return where the bytes of a zip's entry begin in the file, and how many there are."""
    if (entry.compress_type, entry.flag_bits & 1) != _STORED:
        raise ValueError("an entry of the archive is compressed or encrypted; torch's are not")
    stream.seek(entry.header_offset)
    header = stream.read(_LOCAL_HEADER_BYTES)
    if not header.startswith(_ZIP_MAGIC) or len(header) < _LOCAL_HEADER_BYTES:
        raise ValueError("an entry of the archive is not where its directory says")
    name_bytes, extra_bytes = struct.unpack_from("<HH", header, 26)
    start = entry.header_offset + _LOCAL_HEADER_BYTES + name_bytes + extra_bytes
    if entry.compress_size != entry.file_size or start + entry.file_size > _length(stream):
        raise ValueError("an entry of the archive ends beyond the file")
    return start, entry.file_size


def _find_in_legacy(stream: BinaryIO) -> dict[str, LocatedTensor]:
    head = io.BytesIO(stream.read(_MAX_PICKLE_BYTES))
    magic, protocol, system = (read_pickle(head) for _ in range(3))
    if magic != _LEGACY_MAGIC or protocol != 1001:
        raise ValueError("no format of torch.save")
    if not isinstance(system, dict) or system.get("little_endian") is not True:
        raise ValueError("the numbers are not little endian")
    described = _describe(read_pickle(head, _NAMES))
    keys = read_pickle(head)
    storages = {storage.key: storage for storage, *_ in described.values()}
    if not isinstance(keys, list) or sorted(map(str, keys)) != sorted(storages):
        raise ValueError("the list of storages is not that of the tensors")
    starts = {}
    start = head.tell()
    for key in map(str, keys):
        storage = storages[key]
        stream.seek(start)
        (numel,) = struct.unpack("<q", stream.read(8))
        if numel != storage.numel:
            raise ValueError(f"a storage of {numel} numbers, not {storage.numel}")
        starts[key] = start + 8
        start += 8 + numel * storage.dtype.itemsize
    if start > _length(stream):
        raise ValueError("the numbers end beyond the file")
    return _locate(described, starts)


# A tensor's storage, its first number there, its shape, its strides.
_Described = tuple[_Storage, int, tuple[int, ...], tuple[int, ...]]


def _describe(state_dict: Any) -> dict[str, _Described]:
    """Return the tensors of a state dict by their names, each checked against its storage."""
    if not isinstance(state_dict, dict):
        raise ValueError(f"it holds {_shown(state_dict)}, no named tensors")
    described = {}
    dtypes: dict[str, _Storage] = {}
    for name, value in state_dict.items():
        if not isinstance(name, str):
            raise ValueError("a tensor without a name")
        found = _describe_tensor(name, value)
        if dtypes.setdefault(found[0].key, found[0]) != found[0]:
            raise ValueError("a storage that has two types or lengths")
        described[name] = found
    return described


def _describe_tensor(name: str, value: Any) -> _Described:
    while _is_call(value, _PARAMETER) and len(value.arguments) == 3:
        value = value.arguments[0]
    if not _is_call(value, _TENSOR) or len(value.arguments) not in (6, 7):
        raise ValueError(f"{name[:_MOST_SHOWN]!r} is {_shown(value)}")
    storage = _read_storage(value.arguments[0])
    offset, shape, strides = value.arguments[1:4]
    if not (_are_counts((offset,)) and _are_counts(shape) and _are_counts(strides)):
        raise ValueError(f"{name[:_MOST_SHOWN]!r} has no shape")
    if len(shape) != len(strides):
        raise ValueError(f"{name[:_MOST_SHOWN]!r} has {len(shape)} axes, {len(strides)} strides")
    # More numbers than there are places: one number said to be a whole matrix.
    numel = math.prod(shape)
    if numel and max(numel, _num_spanned(shape, strides)) + offset > storage.numel:
        raise ValueError(f"{name[:_MOST_SHOWN]!r} is larger than what is stored of it")
    return storage, offset, shape, strides


def _read_storage(value: Any) -> _Storage:
    match value.key if isinstance(value, Elsewhere) else None:
        case ("storage", Named(), str() as key, str(), int() as numel, *views):
            kind = value.key[1].name
        case _:
            raise ValueError(f"a storage that is {_shown(value)}")
    if views not in ([], [None]) or not _are_counts((numel,)):
        raise ValueError("a storage that is a part of another")
    if kind not in _DTYPES:
        raise ValueError(f"a storage of {kind!r}")
    return _Storage(key, _DTYPES[kind], numel)


def _locate(described: dict[str, _Described], starts: dict[str, int]) -> dict[str, LocatedTensor]:
    """Return the tensors at their bytes of the file, where each storage starts at starts[key]."""
    return {
        name: LocatedTensor(
            dtype=storage.dtype,
            shape=shape,
            strides=strides,
            start=starts[storage.key] + offset * storage.dtype.itemsize,
        )
        for name, (storage, offset, shape, strides) in described.items()
    }


def _num_spanned(shape: tuple[int, ...], strides: tuple[int, ...]) -> int:
    return 1 + sum((n - 1) * stride for n, stride in zip(shape, strides, strict=True))


def _is_call(value: Any, function: str) -> bool:
    return (
        isinstance(value, Called)
        and isinstance(value.function, Named)
        and value.function.name == function
        and isinstance(value.arguments, tuple)
    )


def _are_counts(values: Any) -> bool:
    """Return whether these are a few whole numbers of at least 0 that fit 63 bits."""
    return (
        isinstance(values, tuple)
        and len(values) <= 8
        and all(type(value) is int and 0 <= value < 1 << 63 for value in values)
    )


def _shown(value: Any) -> str:
    """Return what a value is, in a few characters."""
    while isinstance(value, Called):
        value = value.function
    return f"{value.name[:_MOST_SHOWN]!r}" if isinstance(value, Named) else type(value).__name__


def _length(stream: BinaryIO) -> int:
    return stream.seek(0, io.SEEK_END)
