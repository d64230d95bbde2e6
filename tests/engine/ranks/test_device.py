import pytest
import torch

from engine.ranks.device import (
    DTYPES,
    communication_backend,
    free_bytes,
    start_device,
    synchronize,
)
from tests.ranks import run_ranks

if torch.cuda.is_available():
    pytest.skip("the stand-ins are for machines without a GPU", allow_module_level=True)


@pytest.fixture(autouse=True)
def device() -> torch.device:
    return start_device()


def test_device_is_the_cpu_over_gloo(device: torch.device):
    assert device == torch.device("cpu")
    assert communication_backend(device) == "gloo"
    assert communication_backend(torch.device("cuda", 0)) == "nccl"
    synchronize(device)


def test_free_memory_is_that_of_the_machine(device: torch.device):
    assert 2**20 < free_bytes(device) < 2**50


def test_dtypes_are_named_as_in_the_options():
    assert DTYPES["fp32"] is torch.float32
    assert DTYPES["fp16"] is torch.float16
    assert DTYPES["bf16"] is torch.bfloat16


def test_cuda_means_the_cpu_to_megatron():
    assert torch.cuda.current_device() == torch.device("cpu")
    assert torch.zeros(2, device="cuda").device.type == "cpu"
    assert torch.empty_like(torch.ones(2), device="cuda").device.type == "cpu"
    tensor, module = torch.ones(1), torch.nn.Linear(1, 1)
    assert tensor.cuda() is tensor
    assert module.cuda() is module
    torch.cuda.synchronize()


def test_type_names_say_cuda_and_conversions_still_convert():
    tensor = torch.ones(2)
    assert tensor.type() == "torch.cuda.FloatTensor"
    assert tensor.bfloat16().type() == "torch.cuda.BFloat16Tensor"
    assert tensor.type(torch.float64).dtype is torch.float64


def meta_factories() -> list[bool]:
    start_device()
    with torch.device("meta"):
        return [torch.arange(3).is_meta, torch.empty(3).is_meta, torch.zeros(3).is_meta]


def test_a_device_as_a_context_reaches_the_factories_that_stand_in():
    """In a fresh process: torch lists its factories at the first such context."""
    assert run_ranks(meta_factories, 1) == [[True] * 3]


def test_second_start_wraps_nothing_twice():
    factory = torch.zeros
    start_device()
    assert torch.zeros is factory


def test_forked_generator_state_leaves_the_default_one():
    from megatron.core.tensor_parallel import random as megatron_random

    tracker = megatron_random.CudaRNGStatesTracker()
    tracker.add("dropout", 7)
    torch.manual_seed(1)
    expected = torch.rand(4)
    torch.manual_seed(1)
    with tracker.fork("dropout"):
        first = torch.rand(4)
    assert torch.equal(torch.rand(4), expected)
    with tracker.fork("dropout"):
        second = torch.rand(4)
    torch.manual_seed(7)
    assert torch.equal(torch.cat([first, second]), torch.rand(8))  # one stream, continued
