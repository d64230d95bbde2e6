"""Ranks on CPUs that do what ranks on GPUs do, wherever a CPU can."""

import contextlib
from collections.abc import Iterator

import pytest
import torch
from megatron.core.fusions import fused_bias_dropout, fused_bias_gelu

from engine.ranks.device import CHOICES
from kernels import linear_logprobs

# What megatron compiles where elementwise operations are fused.
COMPILED = {
    fused_bias_dropout: ("bias_dropout_add_fused_train", "bias_dropout_add_fused_inference"),
    fused_bias_gelu: ("bias_gelu", "bias_gelu_back"),
}


@contextlib.contextmanager
def choices_of_a_gpu() -> Iterator[None]:
    """Within the block networks are built, trained and sampled from as on a GPU: the choices of
    engine/ranks/device.py, and a head that computes rows which are not predicted, too.

    What megatron compiles is traced, with the guards and variants that a GPU's has, and then run by
    torch's own operators: compiling C++ for this machine would test nothing that a GPU runs. One
    variant more than torch takes is an error.
    """
    fails = torch._dynamo.config.patch(fail_on_recompile_limit_hit=True)  # type: ignore[attr-defined]
    with fails, pytest.MonkeyPatch.context() as patch:
        patch.setitem(CHOICES, "cpu", CHOICES["cuda"])
        patch.setattr(linear_logprobs, "_compacted", lambda labels, spec: spec)
        for module, names in COMPILED.items():
            for name in names:
                plain = getattr(module, name)._torchdynamo_orig_callable
                patch.setattr(module, name, torch.compile(plain, backend="aot_eager"))
        yield
