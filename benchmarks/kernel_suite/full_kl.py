"""KL of two sets of logits [T, V] in bf16, exact over the vocabulary; gradient of the first."""

from typing import Any

import torch
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
from kernels.full_kl import full_kl

_SIZES = {
    "cuda": [
        {"tokens": 8192, "vocab": 50304},
        {"tokens": 2048, "vocab": 50304},
        {"tokens": 32768, "vocab": 50304},
        {"tokens": 8192, "vocab": 6288},
    ],
    "cpu": [{"tokens": 64, "vocab": 8192}, {"tokens": 64, "vocab": 50304}],
}


def _inputs(size: Size, device: torch.device) -> Inputs:
    shape = (size["tokens"], size["vocab"])
    ref_logits = torch.randn(shape, dtype=torch.bfloat16, device=device).mul_(4)
    # A policy half a logit away from its reference.
    logits = ref_logits + 0.5 * torch.randn_like(ref_logits)
    upstream = {"kl": torch.randn(size["tokens"], device=device)}
    return {"logits": logits, "ref_logits": ref_logits, "upstream": upstream}


def _exact(inputs: Inputs) -> dict[str, Expected]:
    rows = sampled_rows(len(inputs["logits"]), inputs["logits"].device)
    z = inputs["logits"].detach()[rows].double().requires_grad_()
    kl = _difference_of_softmaxes(z, inputs["ref_logits"][rows].double())
    upstream = {"kl": inputs["upstream"]["kl"][rows]}
    (gradient,) = torch.autograd.grad(weighted_sum({"kl": kl}, upstream), z)
    return {
        "kl": Expected(kl.detach(), 0.05, rows),
        "logits_grad": Expected(gradient, 0.02, rows, is_relative=True),
    }


def _cost(inputs: Inputs, mode: Mode) -> Cost:
    # Both read forward; both read and one written backward.
    return Cost(num_bytes=inputs["logits"].nbytes * (2 if mode == "forward" else 5))


def _difference_of_softmaxes(logits: Tensor, ref_logits: Tensor) -> Tensor:
    log_p, log_q = logits.log_softmax(-1), ref_logits.log_softmax(-1)
    return (log_p.exp() * (log_p - log_q)).sum(-1)


def _in_fp32(logits: Tensor, ref_logits: Tensor) -> Tensor:
    return _difference_of_softmaxes(logits.float(), ref_logits.float())


def _liger() -> Any:
    from liger_kernel.ops.kl_div import LigerKLDivLossFunction

    # It takes log-probs and differentiates the second distribution only.
    def kl(logits: Tensor, ref_logits: Tensor) -> Tensor:
        log_p, log_q = logits.float().log_softmax(-1), ref_logits.float().log_softmax(-1)
        return LigerKLDivLossFunction.apply(log_q, log_p, "none", True).sum(-1)

    return kl


FULL_KL = Operation(
    name="full_kl",
    sizes=_SIZES,
    inputs=_inputs,
    arguments=("logits", "ref_logits"),
    outputs=("kl",),
    gradients=("logits",),
    exact=_exact,
    cost=_cost,
    providers=(
        Provider("trident", plain(full_kl)),
        Provider("torch, fp32", plain(_in_fp32)),
        Provider("torch.compile", compiled(_in_fp32), needs_gpu=True),
        Provider("Liger", _liger, modes=("forward",), needs_gpu=True),
    ),
)
