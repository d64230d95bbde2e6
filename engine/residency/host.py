"""Bytes of device memory kept in pinned host memory, and the copies between the two.

Each direction has a CUDA stream of its own, so copies run beside the computation and the two
directions beside each other. Memory is copied in buckets: while one bucket leaves the GPU, another
storage's bytes arrive in the one before it. On the CPU a copy is done when it is asked for.
"""

import contextlib
from collections.abc import Callable, Iterable, Iterator, Sequence
from dataclasses import dataclass, field
from typing import NamedTuple

import torch
from torch import Tensor, UntypedStorage

_ALIGNMENT = 64  # bytes: where a storage may begin in host memory


class Link:
    """The two directions between this rank's GPU and its host memory."""

    def __init__(self, device: torch.device, *, bucket_bytes: int) -> None:
        self.device = device
        self.bucket_bytes = bucket_bytes
        is_cuda = device.type == "cuda"
        self.outward = torch.cuda.Stream(device) if is_cuda else None
        self.inward = torch.cuda.Stream(device) if is_cuda else None

    @contextlib.contextmanager
    def behind_computation(self, stream: torch.cuda.Stream | None) -> Iterator[None]:
        """Run a block on a stream of the link, after what the computation was told so far."""
        if stream is None:
            yield
            return
        stream.wait_stream(torch.cuda.current_stream(self.device))
        with torch.cuda.stream(stream):
            yield


class _Piece(NamedTuple):
    """A range of a storage's bytes, and where it lies in its bucket."""

    storage: int
    start: int
    length: int
    offset: int


@dataclass(kw_only=True)
class _Bucket:
    """Host memory that is copied as one, and the events that its copies wait for."""

    memory: Tensor
    """[bytes] uint8, pinned."""
    pieces: list[_Piece]
    saved: torch.cuda.Event | None = field(default=None, repr=False)


class HostCopy:
    """Host memory for the bytes of some device storages."""

    def __init__(self, link: Link, sizes: Sequence[int]) -> None:
        """sizes: bytes of the storages, in the order in which they will be given."""
        self.link = link
        self.sizes = tuple(sizes)
        self._loaded: torch.cuda.Event | None = None
        is_pinned = link.device.type == "cuda"
        self._buckets = [
            _Bucket(
                memory=torch.empty(num_bytes, dtype=torch.uint8, pin_memory=is_pinned),
                pieces=pieces,
            )
            for num_bytes, pieces in _deal(self.sizes, link.bucket_bytes)
        ]

    @property
    def num_bytes(self) -> int:
        """Host memory taken."""
        return sum(bucket.memory.nbytes for bucket in self._buckets)

    def save(self, storages: Sequence[UntypedStorage]) -> None:
        """Start copying the storages here, once the computation so far has run."""
        stream = self.link.outward
        with self.link.behind_computation(stream):
            for bucket in self._buckets:
                for pinned, device in _pairs(bucket, storages):
                    pinned.copy_(device, non_blocking=True)
                bucket.saved = stream.record_event() if stream else None

    def load(self, storages: Sequence[UntypedStorage], *, after: "HostCopy | None" = None) -> None:
        """Start copying into the storages, once the computation so far has run.

        after: a copy of the same storages whose save must be through with a bucket first.
        """
        stream = self.link.inward
        with self.link.behind_computation(stream):
            for n, bucket in enumerate(self._buckets):
                if stream:
                    for copy in (self, after or self):
                        saved = copy._buckets[n].saved
                        if saved is not None:
                            stream.wait_event(saved)
                for pinned, device in _pairs(bucket, storages):
                    device.copy_(pinned, non_blocking=True)
            self._loaded = stream.record_event() if stream else None

    def wait_saved(self) -> None:
        """Let the computation wait until the device memory that was saved may change."""
        if self.link.outward and self._buckets and self._buckets[-1].saved:
            torch.cuda.current_stream(self.link.device).wait_event(self._buckets[-1].saved)

    def wait_loaded(self) -> None:
        """Let the computation wait until what was loaded is there."""
        if self._loaded:
            torch.cuda.current_stream(self.link.device).wait_event(self._loaded)


class Parked:
    """Storages that rest in host memory while nobody reads them, such as an optimizer's state.

    They are emptied and filled again, so every tensor over them stays valid.
    """

    def __init__(self, storages: Callable[[], list[UntypedStorage]], link: Link) -> None:
        """storages: called at every park, since a resume brings tensors anew."""
        self._find = storages
        self._link = link
        self._storages: list[UntypedStorage] = []
        self._is_parked = False
        self._copy: HostCopy | None = None

    @property
    def host_bytes(self) -> int:
        """Host memory taken."""
        return self._copy.num_bytes if self._copy else 0

    def park(self) -> None:
        """Copy the tensors to the host and give up their device memory."""
        if self._is_parked:
            return
        self.wait()
        self._storages = self._find()
        sizes = tuple(storage.nbytes() for storage in self._storages)
        if self._copy is None or self._copy.sizes != sizes:
            self._copy = HostCopy(self._link, sizes)
        self._copy.save(self._storages)
        self._copy.wait_saved()
        release(self._storages)
        self._is_parked = True

    def fetch(self) -> None:
        """Take device memory again and start filling it; wait() before it is read."""
        if not self._is_parked:
            return
        assert self._copy is not None
        allocate(self._storages, self._copy.sizes)
        self._copy.load(self._storages)
        self._is_parked = False

    def wait(self) -> None:
        """Let the computation wait for the tensors; RuntimeError where they are on the host."""
        if self._is_parked:
            raise RuntimeError(
                "the optimizer's state is in host memory: use it inside residency.update()"
            )
        if self._copy is not None:
            self._copy.wait_loaded()


def distinct_storages(tensors: Iterable[Tensor]) -> list[UntypedStorage]:
    """Return the storages that the tensors lie in, each once, in order of first appearance."""
    found: dict[int, UntypedStorage] = {}
    for tensor in tensors:
        storage = tensor.untyped_storage()
        found.setdefault(storage._cdata, storage)
    return list(found.values())


def release(storages: Iterable[UntypedStorage]) -> None:
    """Give up the memory of storages; tensors over them stay, and must not be read."""
    for storage in storages:
        storage.resize_(0)


def allocate(storages: Iterable[UntypedStorage], sizes: Iterable[int]) -> None:
    """Give released storages memory again, with nothing in it yet."""
    for storage, num_bytes in zip(storages, sizes, strict=True):
        storage.resize_(num_bytes)


def _deal(sizes: Sequence[int], bucket_bytes: int) -> list[tuple[int, list[_Piece]]]:
    """Return (bytes, pieces) of buckets that hold storages of these sizes, end to end."""
    buckets: list[tuple[int, list[_Piece]]] = []
    filled = 0
    pieces: list[_Piece] = []
    for index, size in enumerate(sizes):
        start = 0
        filled = -(-filled // _ALIGNMENT) * _ALIGNMENT
        while start < size:
            if filled >= bucket_bytes:
                buckets.append((filled, pieces))
                filled, pieces = 0, []
            length = min(size - start, bucket_bytes - filled)
            pieces.append(_Piece(index, start, length, filled))
            start, filled = start + length, filled + length
    return [*buckets, (filled, pieces)] if pieces else buckets


def _pairs(bucket: _Bucket, storages: Sequence[UntypedStorage]) -> Iterator[tuple[Tensor, Tensor]]:
    """Yield (pinned bytes, device bytes) of every piece of a bucket."""
    for piece in bucket.pieces:
        storage = storages[piece.storage]
        device = torch.empty(0, dtype=torch.uint8, device=storage.device)
        device.set_(storage, piece.start, (piece.length,))  # type: ignore[call-overload]
        yield bucket.memory[piece.offset : piece.offset + piece.length], device
