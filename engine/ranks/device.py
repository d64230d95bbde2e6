"""Which device this rank computes on: one CUDA GPU, or the CPU with stand-ins for megatron's CUDA
calls.

megatron-core asks torch.cuda for a current device, a generator state and a synchronisation in the
middle of code that is otherwise free of any device. Without a GPU the same code runs
over gloo once those few calls answer for the CPU: tests exercise the engine itself, not a copy.
"""

import contextlib
import functools
import os
import re
from collections.abc import Callable, Iterator
from dataclasses import dataclass
from typing import Any

import psutil
import torch

from engine.errors import UserError
from engine.ranks.heap import freed_bytes, keep_freed_memory
from engine.settings.sampling import GPU_STEPS_PER_SYNC

DTYPES = {"fp32": torch.float32, "fp16": torch.float16, "bf16": torch.bfloat16}

# Factory functions that megatron calls with the literal device="cuda".
_FACTORIES = ("tensor", "zeros", "ones", "empty", "full", "arange", "empty_like", "zeros_like")


@dataclass(frozen=True, kw_only=True)
class Choices:
    """What is done in one way on a GPU and in another on a CPU, though either could do both.

    The numbers are the same up to rounding, and tests have CPUs do as GPUs do. What only a GPU can
    do (its attention, pinned memory, streams, graphs) asks for the device where it is done.
    """

    fuses_elementwise: bool
    """Compile bias + GELU, and bias + dropout + addition, to one kernel each."""
    fuses_gradient_accumulation: bool
    """The default of Numerics.gradient_accumulation_fusion."""
    overlaps_replicas: bool
    """The default of ParallelLayout.overlap_grad_reduce and overlap_param_gather where there are
    replicas; a CPU has nothing to hide communication under."""
    steps_per_sync: int
    """The default of SamplingConfig.steps_per_sync: a look at a GPU waits for all it was given."""


CHOICES = {
    "cuda": Choices(
        fuses_elementwise=True,
        fuses_gradient_accumulation=True,
        overlaps_replicas=True,
        steps_per_sync=GPU_STEPS_PER_SYNC,
    ),
    "cpu": Choices(
        fuses_elementwise=False,
        fuses_gradient_accumulation=False,
        overlaps_replicas=False,
        steps_per_sync=1,
    ),
}

# What the stand-ins answer as the current CUDA device.
_stood_in = torch.device("cpu")

# Workspaces of cuBLAS that streams do not share.
_WORKSPACES = (":4096:8", ":16:8")
# NCCL's algorithms: those that add up in an order of their own making, and those that leave it to
# the switches of NVLink.
_IN_ORDER = {"tree", "ring", "collnetdirect", "collnetchain", "pat"}
_IN_SWITCHES = {"nvls", "nvlstree"}

_Replacements = list[tuple[Any, str, Any]]  # (owner of an attribute, its name, its new value)


def start_device() -> torch.device:
    """Return this rank's device, with the CPU stand-ins installed when no GPU is present.

    On CUDA the device is cuda:LOCAL_RANK (SLURM_LOCALID under srun) and becomes the current one.
    """
    if torch.cuda.is_available():
        local_rank = int(os.environ.get("LOCAL_RANK", os.environ.get("SLURM_LOCALID", "0")))
        device = torch.device("cuda", local_rank % torch.cuda.device_count())
        torch.cuda.set_device(device)
        return device
    _install_cpu_stand_ins()
    keep_freed_memory()
    return torch.device("cpu")


def communication_backend(device: torch.device) -> str:
    """Return the torch.distributed backend for a device: nccl on CUDA, gloo on the CPU."""
    return "nccl" if device.type == "cuda" else "gloo"


def choices_for(device: torch.device) -> Choices:
    """Return the choices of a device; torch's meta device has a CPU's."""
    return CHOICES["cuda" if device.type == "cuda" else "cpu"]


def make_deterministic() -> None:
    """Have torch, cuBLAS, NCCL and attention give the same bits every time, from here on in this
    process.

    What cannot raises RuntimeError where it is used. A warning in its place would not do: with
    warn_only the backward passes of torch's attention add up in any order. UserError where a
    variable of the environment asks for what is not deterministic.
    """
    workspace = _variable("CUBLAS_WORKSPACE_CONFIG", ":4096:8")  # read at its first product
    if workspace not in _WORKSPACES:
        raise UserError(
            f"CUBLAS_WORKSPACE_CONFIG is {workspace!r}, and --numerics.deterministic needs "
            f"{' or '.join(_WORKSPACES)}"
        )
    # Read when ranks first communicate. torch sets ^NVLS itself, which leaves NVLSTree.
    algorithms = _variable("NCCL_ALGO", "^NVLS,NVLSTree")
    named = set(algorithms.removeprefix("^").lower().split(","))
    if not (named >= _IN_SWITCHES if algorithms.startswith("^") else named <= _IN_ORDER):
        raise UserError(
            f"NCCL_ALGO is {algorithms!r}, which may leave sums to the switches, whose order is "
            "not known;\n--numerics.deterministic needs ^NVLS,NVLSTree, or some of Ring, Tree, "
            "PAT, CollnetDirect and CollnetChain"
        )
    torch.use_deterministic_algorithms(True)
    # What torch.empty gives would be filled at every call, which nothing here reads.
    torch.utils.deterministic.fill_uninitialized_memory = False  # type: ignore[attr-defined]


def _variable(name: str, default: str) -> str:
    """Return a variable of the environment, set to the default where it has no value."""
    value = os.environ[name] = os.environ.get(name) or default
    return value


def synchronize(device: torch.device) -> None:
    """Wait for the device to finish; nothing on the CPU."""
    if device.type == "cuda":
        torch.cuda.synchronize(device)


def free_bytes(device: torch.device) -> int:
    """Return the memory that this process could take on the device now."""
    if device.type == "cuda":
        torch.cuda.empty_cache()
        return torch.cuda.mem_get_info(device)[0]
    return psutil.virtual_memory().available + freed_bytes()


@contextlib.contextmanager
def meta_device() -> Iterator[torch.device]:
    """Within the block megatron builds networks on torch's meta device: shapes without memory.

    A GPU is left alone, and torch's CUDA calls are as before after the block.
    """
    global _stood_in
    kept = []
    if torch.cuda.is_available():
        kept = [(owner, name, getattr(owner, name)) for owner, name, _ in _stand_ins()]
        _replace(_stand_ins())
    else:
        _install_cpu_stand_ins()
    _stood_in = torch.device("meta")
    try:
        yield _stood_in
    finally:
        _stood_in = torch.device("cpu")
        _replace(kept)


@functools.cache  # once a process: wrapping a wrapper would pile up
def _install_cpu_stand_ins() -> None:
    # torch lists its factories once, for `with torch.device(...)`: as they are before they are
    # wrapped. Otherwise transformers, which builds models on "meta", leaves rotary frequencies
    # uninitialised.
    torch.utils._device._device_constructors()  # type: ignore[attr-defined]
    _replace(_stand_ins())


def _replace(replacements: _Replacements) -> None:
    for owner, name, value in replacements:
        setattr(owner, name, value)


def _stand_ins() -> _Replacements:
    from megatron.core.tensor_parallel import random as megatron_random

    return [
        (torch.cuda, "current_device", lambda: _stood_in),
        (torch.cuda, "synchronize", _ignore),
        (torch.cuda, "empty_cache", _ignore),
        (torch.cuda, "manual_seed", torch.manual_seed),
        (torch.cuda, "get_rng_state", lambda device=None: torch.get_rng_state()),
        (torch.Tensor, "cuda", lambda self, *args, **kwargs: self),
        (torch.nn.Module, "cuda", lambda self, device=None: self),
        # The distributed optimizer sorts parameters by Tensor.type() strings such as
        # torch.cuda.FloatTensor.
        (torch.Tensor, "type", _with_cuda_type_names(torch.Tensor.type)),
        *((torch, name, _on_stood_in(getattr(torch, name))) for name in _FACTORIES),
        (megatron_random, "_get_cuda_rng_state", lambda *args, **kwargs: torch.get_rng_state()),
        (
            megatron_random,
            "_set_cuda_rng_state",
            lambda state, *args, **kwargs: torch.set_rng_state(state),
        ),
        # megatron warns when the CPU generator moves while a "GPU" state is forked; here they are
        # one.
        (megatron_random.CudaRNGStatesTracker, "fork", _fork),
    ]


def _ignore(*args: Any, **kwargs: Any) -> None:
    return None


def _on_stood_in(factory: Callable[..., torch.Tensor]) -> Callable[..., torch.Tensor]:
    """Wrap a tensor factory so that device="cuda" means the device that stands in."""

    @functools.wraps(factory)
    def wrapper(*args: Any, **kwargs: Any) -> torch.Tensor:
        if kwargs.get("device") == "cuda":
            kwargs["device"] = _stood_in
        return factory(*args, **kwargs)

    return wrapper


def _with_cuda_type_names(plain: Callable[..., Any]) -> Callable[..., Any]:
    """Wrap Tensor.type() so that its answer reads torch.cuda.X; conversions pass through."""

    @functools.wraps(plain)
    def wrapper(self: torch.Tensor, *args: Any, **kwargs: Any) -> Any:
        answer = plain(self, *args, **kwargs)
        if isinstance(answer, str):
            return re.sub(r"^torch\.(meta\.)?", "torch.cuda.", answer)
        return answer

    return wrapper


@contextlib.contextmanager
def _fork(self: Any, name: str = "model-parallel-rng") -> Iterator[None]:
    """Run a block under one of the tracker's generator states, then put the default state back."""
    default_state = torch.get_rng_state()
    torch.set_rng_state(self.states_[name])
    try:
        yield
    finally:
        self.states_[name] = torch.get_rng_state()
        torch.set_rng_state(default_state)
