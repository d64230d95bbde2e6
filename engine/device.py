"""Which device this rank computes on: one CUDA GPU, or the CPU with stand-ins for megatron's CUDA
calls.

megatron-core asks torch.cuda for a current device, a generator state and a synchronisation in the
middle of code that is otherwise free of any device. On a machine without a GPU the same code runs
over gloo once those few calls answer for the CPU, so that tests exercise the real engine and not a
copy of it.
"""

import contextlib
import functools
import os
from collections.abc import Callable, Iterator
from typing import Any

import torch

DTYPES = {"fp32": torch.float32, "fp16": torch.float16, "bf16": torch.bfloat16}

# Factory functions that megatron calls with the literal device="cuda".
_FACTORIES = ("tensor", "zeros", "ones", "empty", "full", "arange", "empty_like", "zeros_like")


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
    return torch.device("cpu")


def communication_backend(device: torch.device) -> str:
    """Return the torch.distributed backend for a device: nccl on CUDA, gloo on the CPU."""
    return "nccl" if device.type == "cuda" else "gloo"


def synchronize(device: torch.device) -> None:
    """Wait for the device to finish; nothing on the CPU."""
    if device.type == "cuda":
        torch.cuda.synchronize(device)


@functools.cache  # once a process: wrapping a wrapper would pile up
def _install_cpu_stand_ins() -> None:
    from megatron.core.tensor_parallel import random as megatron_random

    cpu = torch.device("cpu")
    torch.cuda.current_device = lambda: cpu  # type: ignore[assignment, return-value]
    torch.cuda.synchronize = _ignore
    torch.cuda.empty_cache = _ignore
    torch.cuda.manual_seed = torch.manual_seed  # type: ignore[assignment]
    torch.cuda.get_rng_state = lambda device=None: torch.get_rng_state()  # type: ignore
    torch.Tensor.cuda = lambda self, *args, **kwargs: self  # type: ignore
    torch.nn.Module.cuda = lambda self, device=None: self  # type: ignore
    # The distributed optimizer sorts parameters by Tensor.type() strings such as
    # torch.cuda.FloatTensor.
    torch.Tensor.type = _with_cuda_type_names(torch.Tensor.type)  # type: ignore
    for name in _FACTORIES:
        setattr(torch, name, _on_cpu(getattr(torch, name)))
    megatron_random._get_cuda_rng_state = lambda *args, **kwargs: torch.get_rng_state()
    megatron_random._set_cuda_rng_state = lambda state, *args, **kwargs: torch.set_rng_state(state)
    # megatron warns when the CPU generator moves while a "GPU" state is forked; here they are one.
    megatron_random.CudaRNGStatesTracker.fork = _fork


def _ignore(*args: Any, **kwargs: Any) -> None:
    return None


def _on_cpu(factory: Callable[..., torch.Tensor]) -> Callable[..., torch.Tensor]:
    """Wrap a tensor factory so that device="cuda" means the CPU."""

    @functools.wraps(factory)
    def wrapper(*args: Any, **kwargs: Any) -> torch.Tensor:
        if kwargs.get("device") == "cuda":
            kwargs["device"] = "cpu"
        return factory(*args, **kwargs)

    return wrapper


def _with_cuda_type_names(plain: Callable[..., Any]) -> Callable[..., Any]:
    """Wrap Tensor.type() so that its answer reads torch.cuda.X; conversions pass through."""

    @functools.wraps(plain)
    def wrapper(self: torch.Tensor, *args: Any, **kwargs: Any) -> Any:
        answer = plain(self, *args, **kwargs)
        if isinstance(answer, str):
            return answer.replace("torch.", "torch.cuda.", 1)
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
