"""A rank's file of tensors, in the safetensors format, first in host memory and then on the disk.

The bytes of the file's tensors lie in memory as they will in the file. So one copy of each tensor
lets training go on, and writing is one pass over that memory.
"""

import json
import os
from collections.abc import Iterable
from concurrent.futures import ThreadPoolExecutor
from dataclasses import dataclass
from pathlib import Path

import torch
import xxhash
from torch import Tensor

from engine.checkpoints.index import piece_name
from engine.checkpoints.manifest import FileDigest
from engine.checkpoints.shards import Part
from engine.files import sync

STORED_DTYPES = {
    torch.float64: "F64",
    torch.float32: "F32",
    torch.bfloat16: "BF16",
    torch.float16: "F16",
}
"""safetensors' names of dtypes."""
_CHUNK_BYTES = 8 << 20  # written, or read for the checksum, in one call; our choice
_ALIGNMENT = 8  # bytes: the header's, and so the first tensor's


@dataclass(frozen=True, kw_only=True)
class TensorFile:
    """What a file will hold."""

    name: str
    """Within the checkpoint."""
    parts: list[Part]
    """In the order of the file."""

    @property
    def num_bytes(self) -> int:
        """Of the tensors."""
        return sum(part.tensor.nbytes for part in self.parts)

    def header(self) -> bytes:
        """Return what precedes the tensors: its length in 8 bytes, then names, dtypes, shapes and
        ranges as JSON."""
        start, entries = 0, {}
        for part in self.parts:
            stop = start + part.tensor.nbytes
            entries[piece_name(part.shard.name, part.shard.offset)] = {
                "dtype": STORED_DTYPES[part.tensor.dtype],
                "shape": part.shard.shape,
                "data_offsets": [start, stop],
            }
            start = stop
        text = json.dumps(entries).encode()
        text += b" " * (-len(text) % _ALIGNMENT)
        return len(text).to_bytes(8, "little") + text

    def stage(self, memory: Tensor) -> None:
        """Start copying the tensors into `memory`, [num_bytes] uint8 on the host."""
        start = 0
        for part in self.parts:
            into = memory[start : start + part.tensor.nbytes].view(part.tensor.dtype)
            into.view(part.shard.shape).copy_(part.tensor, non_blocking=True)
            start += part.tensor.nbytes


def tensor_file(name: str, parts: Iterable[Part]) -> TensorFile:
    """Return a file of these parts: those of wide elements first, so that all are aligned."""
    ordered = sorted(parts, key=lambda part: (-part.tensor.element_size(), part.shard.name))
    return TensorFile(name=name, parts=ordered)


def write_tensors(path: Path, header: bytes, memory: Tensor) -> FileDigest:
    """Write a file's header and tensors, and have the disk hold them; return its digest."""
    content = memoryview(memory.numpy())  # type: ignore[arg-type]
    # Beside the writing, which waits for the disk: one after the other they would take longer.
    with ThreadPoolExecutor(max_workers=1) as beside, path.open("xb", buffering=0) as stream:
        checksum = beside.submit(_checksum, header, content)
        for piece in (memoryview(header), content):
            while piece:
                piece = piece[os.write(stream.fileno(), piece[:_CHUNK_BYTES]) :]
        sync(stream)
    return FileDigest(bytes=len(header) + len(content), xxh3_128=checksum.result())


def _checksum(*pieces: bytes | memoryview) -> str:
    state = xxhash.xxh3_128()
    for piece in pieces:
        for start in range(0, len(piece), _CHUNK_BYTES):  # not all at once: it can be interrupted
            state.update(piece[start : start + _CHUNK_BYTES])
    return state.hexdigest()
