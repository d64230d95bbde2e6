"""What kernels count in."""

import pytest
import torch
import triton.language as tl

from kernels.precision import accumulation_dtype, triton_dtype


@pytest.mark.parametrize("dtype", [torch.float16, torch.bfloat16, torch.float32])
def test_kernels_count_in_fp32(dtype: torch.dtype) -> None:
    assert accumulation_dtype(dtype) == torch.float32
    assert triton_dtype(dtype) == tl.float32


def test_fp64_inputs_check_gradients_in_fp64() -> None:
    assert accumulation_dtype(torch.float64) == torch.float64
    assert triton_dtype(torch.float64) == tl.float64
