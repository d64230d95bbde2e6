"""The precision that kernels count in: fp32, or fp64 for fp64 inputs, which check gradients."""

import torch
import triton.language as tl


def accumulation_dtype(dtype: torch.dtype) -> torch.dtype:
    """fp64 for fp64 inputs (gradient checks), fp32 for everything else."""
    return torch.float64 if dtype == torch.float64 else torch.float32


def triton_dtype(dtype: torch.dtype) -> tl.dtype:
    """Triton's name of the accumulation dtype of inputs of this dtype."""
    return tl.float64 if dtype == torch.float64 else tl.float32
