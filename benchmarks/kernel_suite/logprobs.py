"""Log-probs of given tokens from logits [T, V] in bf16, alone and with the entropy."""

from dataclasses import replace
from typing import Any

import torch
import torch.distributed as dist
import torch.nn.functional as F
from torch import Tensor

from benchmarks.kernel_suite.operation import (
    Cost,
    Expected,
    Inputs,
    Mode,
    Operation,
    Provider,
    Size,
    compiled,
    plain,
    sampled_rows,
    weighted_sum,
)
from kernels.logprobs import logprobs

_SEQUENCE = 1024
"""Tokens of a row in the frameworks that loop over the rows of a padded batch."""

_SIZES = {
    "cuda": [
        {"tokens": 8192, "vocab": 50304},
        {"tokens": 2048, "vocab": 50304},
        {"tokens": 32768, "vocab": 50304},
        {"tokens": 131072, "vocab": 50304},
        {"tokens": 8192, "vocab": 25152},
        {"tokens": 8192, "vocab": 12576},
        {"tokens": 8192, "vocab": 6288},
        {"tokens": 8192, "vocab": 151936},
    ],
    "cpu": [{"tokens": 64, "vocab": 8192}, {"tokens": 64, "vocab": 50304}],
}


def _inputs(size: Size, device: torch.device) -> Inputs:
    shape = (size["tokens"], size["vocab"])
    # Logits of a trained model spread about this far; rounding to bf16 then costs 2e-2 nats.
    logits = torch.randn(shape, dtype=torch.bfloat16, device=device).mul_(4)
    labels = torch.randint(0, size["vocab"], (size["tokens"],), device=device)
    upstream = {"logprobs": torch.randn(size["tokens"], device=device)}
    return {"logits": logits, "labels": labels, "upstream": upstream}


def _inputs_with_entropy(size: Size, device: torch.device) -> Inputs:
    inputs = _inputs(size, device)
    inputs["upstream"]["entropy"] = torch.randn(size["tokens"], device=device)
    return inputs


def _exact(inputs: Inputs) -> dict[str, Expected]:
    rows = sampled_rows(len(inputs["labels"]), inputs["labels"].device)
    z = inputs["logits"].detach()[rows].double().requires_grad_()
    log_p = z.log_softmax(-1)
    picked = log_p.gather(1, inputs["labels"][rows, None])[:, 0]
    outputs = {"logprobs": picked, "entropy": -(log_p.exp() * log_p).sum(-1)}
    upstream = {name: g[rows] for name, g in inputs["upstream"].items()}
    (gradient,) = torch.autograd.grad(weighted_sum(outputs, upstream), z)
    return {
        **{name: Expected(value.detach(), 0.15, rows) for name, value in outputs.items()},
        "logits_grad": Expected(gradient, 0.02, rows, is_relative=True),
    }


def _cost(inputs: Inputs, mode: Mode) -> Cost:
    # One read forward; one read and one write backward.
    return Cost(num_bytes=inputs["logits"].nbytes * (1 if mode == "forward" else 3))


def _softmax_in_fp32(logits: Tensor, labels: Tensor) -> Tensor:
    return logits.float().log_softmax(-1).gather(1, labels[:, None])[:, 0]


def _softmax_in_fp32_with_entropy(logits: Tensor, labels: Tensor) -> tuple[Tensor, Tensor]:
    log_p = logits.float().log_softmax(-1)
    return log_p.gather(1, labels[:, None])[:, 0], -(log_p.exp() * log_p).sum(-1)


def _softmax_by_sequence(logits: Tensor, labels: Tensor) -> Tensor:
    """Sequence by sequence and in bf16: the torch form of TRL, verl and OpenRLHF."""
    pairs = zip(logits.split(_SEQUENCE), labels.split(_SEQUENCE), strict=True)
    return torch.cat([F.log_softmax(z, -1).gather(1, y[:, None])[:, 0] for z, y in pairs])


def _logsumexp_by_chunk(logits: Tensor, labels: Tensor) -> Tensor:
    """Logits to fp32, then z_y - logsumexp in chunks of rows: OpenRLHF's form for fp32 logits."""
    z = logits.float()
    logsumexp = torch.cat([chunk.logsumexp(-1) for chunk in z.split(_SEQUENCE)])
    return z.gather(1, labels[:, None])[:, 0] - logsumexp


def _entropy_unshifted(logits: Tensor, labels: Tensor) -> tuple[Tensor, Tensor]:
    """logsumexp(z) - sum p z for the entropy, as verl forms it."""
    z = logits.float()
    entropy = z.logsumexp(-1) - (z.softmax(-1) * z).sum(-1)
    return z.log_softmax(-1).gather(1, labels[:, None])[:, 0], entropy


def _start_megatron() -> Any:
    """megatron's parallel state for a single rank."""
    from megatron.core import parallel_state

    if not dist.is_initialized():
        backend = "cpu:gloo,cuda:nccl" if torch.cuda.is_available() else "gloo"
        dist.init_process_group(backend, store=dist.HashStore(), rank=0, world_size=1)
    if not parallel_state.model_parallel_is_initialized():
        parallel_state.initialize_model_parallel()
    return parallel_state


def _megatron() -> Any:
    from megatron.core.tensor_parallel import vocab_parallel_cross_entropy

    _start_megatron()
    return lambda logits, labels: (
        -vocab_parallel_cross_entropy(logits[:, None], labels[:, None])[:, 0]
    )


def _megatron_fused() -> Any:
    from megatron.core.fusions.fused_cross_entropy import fused_vocab_parallel_cross_entropy

    group = _start_megatron().get_tensor_model_parallel_group()
    return lambda logits, labels: (
        -fused_vocab_parallel_cross_entropy(logits[:, None], labels[:, None], group)[:, 0]
    )


def _trl() -> Any:
    from trl.kernels import selective_log_softmax_and_entropy

    return lambda logits, labels: selective_log_softmax_and_entropy(logits, labels)[0]


def _trl_with_entropy() -> Any:
    from trl.kernels import selective_log_softmax_and_entropy

    return selective_log_softmax_and_entropy


def _liger_selective() -> Any:
    from liger_kernel.ops.grpo_loss import fused_selective_log_softmax

    # It takes [B, L + 1, V] and drops the last position, so one row fewer is computed here.
    return lambda logits, labels: fused_selective_log_softmax(
        logits[None], labels[None, :-1], temperature=1.0
    )[0]


def _liger_vocab_parallel() -> Any:
    from liger_kernel.transformers import LigerVocabParallelCrossEntropy

    loss = LigerVocabParallelCrossEntropy()
    return lambda logits, labels: -loss(logits[:, None], labels[:, None])[:, 0]


def _flash_attn() -> Any:
    from flash_attn.ops.triton.cross_entropy import cross_entropy_loss

    return lambda logits, labels: -cross_entropy_loss(logits, labels)[0]


def _quack() -> Any:
    from quack.cross_entropy import cross_entropy

    return lambda logits, labels: -cross_entropy(logits, labels, reduction="none")


LOGPROBS = Operation(
    name="logprobs",
    sizes=_SIZES,
    inputs=_inputs,
    arguments=("logits", "labels"),
    outputs=("logprobs",),
    gradients=("logits",),
    exact=_exact,
    cost=_cost,
    providers=(
        Provider("trident", plain(lambda logits, labels: logprobs(logits, labels)[0])),
        Provider("torch, fp32", plain(_softmax_in_fp32)),
        Provider("torch.compile", compiled(_softmax_in_fp32), needs_gpu=True),
        Provider("TRL, verl: torch by sequence", plain(_softmax_by_sequence)),
        Provider("OpenRLHF: torch by chunk", plain(_logsumexp_by_chunk)),
        Provider("megatron-core", _megatron),
        Provider("megatron-core fused", _megatron_fused, needs_gpu=True),
        Provider("TRL", _trl, needs_gpu=True),
        Provider("Liger selective", _liger_selective, modes=("forward",), needs_gpu=True),
        Provider("Liger vocab-parallel", _liger_vocab_parallel, needs_gpu=True),
        Provider("flash-attn", _flash_attn, needs_gpu=True),
        Provider("quack", _quack, needs_gpu=True),
    ),
)

LOGPROBS_ENTROPY = replace(
    LOGPROBS,
    name="logprobs_entropy",
    inputs=_inputs_with_entropy,
    outputs=("logprobs", "entropy"),
    providers=(
        Provider("trident", plain(lambda *x: logprobs(*x, with_entropy=True))),
        Provider("torch, fp32", plain(_softmax_in_fp32_with_entropy)),
        Provider("torch.compile", compiled(_softmax_in_fp32_with_entropy), needs_gpu=True),
        Provider("verl: torch", plain(_entropy_unshifted)),
        Provider("TRL", _trl_with_entropy, needs_gpu=True),
    ),
)
