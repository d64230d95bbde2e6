"""Device memory that keeps its addresses while its pages come and go.

A CUDA graph holds raw pointers, and the key-value cache gives its memory back between rollouts.
CUDA's virtual memory management has both: a range of addresses is reserved once, physical memory is
mapped into it for a rollout and unmapped after it. Here are the few calls of libcuda that this
takes, through ctypes (CUDA driver API, "Virtual Memory Management").
"""

import ctypes
import weakref
from typing import Any

import torch
from torch import Tensor

# From cuda.h.
_OUT_OF_MEMORY = 2
_NOT_SUPPORTED = 801
_ATTRIBUTE_VIRTUAL_MEMORY = 102  # CU_DEVICE_ATTRIBUTE_VIRTUAL_MEMORY_MANAGEMENT_SUPPORTED
_PINNED, _ON_DEVICE, _READ_WRITE = 1, 1, 3


class Unsupported(RuntimeError):
    """This machine's driver maps no memory."""


class _Location(ctypes.Structure):
    _fields_ = [("type", ctypes.c_int), ("id", ctypes.c_int)]


class _Properties(ctypes.Structure):
    """CUmemAllocationProp: 32 bytes."""

    _fields_ = [
        ("type", ctypes.c_int),
        ("handle_types", ctypes.c_int),
        ("location", _Location),
        ("metadata", ctypes.c_void_p),
        ("flags", ctypes.c_ubyte * 8),
    ]


class _Access(ctypes.Structure):
    _fields_ = [("location", _Location), ("flags", ctypes.c_int)]


class _Bytes:
    """Bytes at an address, as torch takes them without a copy."""

    def __init__(self, address: int, num_bytes: int) -> None:
        self.__cuda_array_interface__ = {
            "shape": (num_bytes,),
            "typestr": "|u1",
            "data": (address, False),
            "version": 2,
        }


class _Driver:
    """The driver's calls for one device."""

    def __init__(self, device: torch.device) -> None:
        torch.cuda.synchronize(device)  # makes torch's context, which the calls are for
        index = torch.cuda.current_device() if device.index is None else device.index
        try:
            self._cuda = ctypes.CDLL("libcuda.so.1")
        except OSError as error:
            raise Unsupported(f"libcuda.so.1: {error}") from None
        self._properties = _Properties(type=_PINNED, location=_Location(_ON_DEVICE, index))
        self._access = _Access(location=_Location(_ON_DEVICE, index), flags=_READ_WRITE)
        supports = ctypes.c_int()
        self._call(
            "cuDeviceGetAttribute",
            ctypes.byref(supports),
            ctypes.c_int(_ATTRIBUTE_VIRTUAL_MEMORY),
            ctypes.c_int(index),
        )
        if not supports.value:
            raise Unsupported("the device has no virtual memory management")

    def granularity(self) -> int:
        """Return the bytes that sizes and addresses are multiples of."""
        found = ctypes.c_size_t()
        self._call(
            "cuMemGetAllocationGranularity",
            ctypes.byref(found),
            ctypes.byref(self._properties),
            ctypes.c_int(0),  # the least
        )
        return found.value

    def reserve(self, num_bytes: int) -> int:
        """Return the first of num_bytes addresses that nobody else gets."""
        address = ctypes.c_uint64()
        self._call(
            "cuMemAddressReserve",
            ctypes.byref(address),
            ctypes.c_size_t(num_bytes),
            ctypes.c_size_t(0),
            ctypes.c_uint64(0),
            ctypes.c_ulonglong(0),
        )
        return address.value

    def free(self, address: int, num_bytes: int) -> None:
        """Give reserved addresses up."""
        self._call("cuMemAddressFree", ctypes.c_uint64(address), ctypes.c_size_t(num_bytes))

    def map(self, address: int, num_bytes: int) -> None:
        """Put new memory at reserved addresses; torch.OutOfMemoryError where there is too little.

        The memory is freed when it is unmapped: the mapping alone keeps it.
        """
        handle, size = ctypes.c_uint64(), ctypes.c_size_t(num_bytes)
        self._call(
            "cuMemCreate",
            ctypes.byref(handle),
            size,
            ctypes.byref(self._properties),
            ctypes.c_ulonglong(0),
        )
        at = ctypes.c_uint64(address)
        try:
            self._call("cuMemMap", at, size, ctypes.c_size_t(0), handle, ctypes.c_ulonglong(0))
        finally:
            self._call("cuMemRelease", handle)
        try:
            self._call("cuMemSetAccess", at, size, ctypes.byref(self._access), ctypes.c_size_t(1))
        except BaseException:
            self.unmap(address, num_bytes)
            raise

    def unmap(self, address: int, num_bytes: int) -> None:
        """Free the memory at these addresses; nothing on the device may still use it."""
        self._call("cuMemUnmap", ctypes.c_uint64(address), ctypes.c_size_t(num_bytes))

    def _call(self, name: str, *arguments: Any) -> None:
        code = getattr(self._cuda, name)(*arguments)
        if code == 0:
            return
        text = ctypes.c_char_p()
        self._cuda.cuGetErrorString(ctypes.c_int(code), ctypes.byref(text))
        reason = f"{name}: {(text.value or b'unknown error').decode()} (CUresult {code})"
        if code == _OUT_OF_MEMORY:
            raise torch.OutOfMemoryError(f"CUDA out of memory. {reason}")
        if code == _NOT_SUPPORTED:
            raise Unsupported(reason)
        raise RuntimeError(reason)


class LastingMemory:
    """Lanes of device memory: their addresses last, their memory is taken and given back.

    All lanes have as many bytes at a time, and each has addresses for its share of the device.
    """

    lasts = True

    def __init__(self, device: torch.device, *, num_lanes: int) -> None:
        """Reserve the addresses, which cost nothing; raises Unsupported where a driver cannot."""
        self._device = device
        self._driver = driver = _Driver(device)
        self.granularity = driver.granularity()
        total = torch.cuda.get_device_properties(device).total_memory
        self._stride = _round_up(-(-total // num_lanes), self.granularity)
        self._num_lanes = num_lanes
        self._base = driver.reserve(num_lanes * self._stride)
        self._mapped: list[tuple[int, int]] = []  # (address, bytes), shared with the finalizer
        self.last_bytes = 0
        finalizer = weakref.finalize(
            self, _free, driver, device, self._mapped, (self._base, num_lanes * self._stride)
        )
        finalizer.atexit = False  # the process takes all of it along
        driver.map(self._base, self.granularity)  # some report support and refuse
        driver.unmap(self._base, self.granularity)

    @property
    def num_bytes(self) -> int:
        """Device memory taken now, which torch's allocator knows nothing of."""
        return sum(num_bytes for _, num_bytes in self._mapped)

    def take(self, num_bytes: int) -> list[Tensor]:
        """Return the lanes [num_bytes] uint8, each at the same address every time; what is in them
        is not defined. Raises torch.OutOfMemoryError, then holding nothing."""
        if self._mapped:
            raise RuntimeError("the lanes are taken already")
        size = _round_up(num_bytes, self.granularity)
        if size > self._stride:
            raise torch.OutOfMemoryError(
                f"CUDA out of memory. {self._num_lanes} lanes of {size} bytes are more than the "
                "device has"
            )
        torch.cuda.empty_cache()  # what torch keeps for later is not free to others
        addresses = [self._base + n * self._stride for n in range(self._num_lanes)]
        try:
            for address in addresses:
                self._driver.map(address, size)
                self._mapped.append((address, size))
        except BaseException:
            self.give_back()
            raise
        self.last_bytes = self.num_bytes
        return [torch.as_tensor(_Bytes(a, num_bytes), device=self._device) for a in addresses]

    def give_back(self) -> None:
        """Wait for the device and free the memory. The lanes' tensors must not be used again."""
        _unmap(self._driver, self._device, self._mapped)


def _unmap(driver: _Driver, device: torch.device, mapped: list[tuple[int, int]]) -> None:
    if mapped:
        torch.cuda.synchronize(device)
    while mapped:
        driver.unmap(*mapped.pop())


def _free(
    driver: _Driver, device: torch.device, mapped: list[tuple[int, int]], whole: tuple[int, int]
) -> None:
    _unmap(driver, device, mapped)
    driver.free(*whole)


def _round_up(number: int, multiple: int) -> int:
    return -(-number // multiple) * multiple
