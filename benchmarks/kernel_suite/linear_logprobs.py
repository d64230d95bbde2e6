"""Log-probs from hidden states [T, H] and the LM head [V, H], and the mean loss on top of them.

The loss is a row of its own because many rivals compute its gradients during their forward pass:
only the whole of forward and backward compares.
"""

import contextlib
import importlib
import sys
import types
from dataclasses import replace
from typing import Any

import torch
import torch.nn.functional as F
from torch import Tensor
from torch.utils.checkpoint import checkpoint

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
)
from kernels.linear_logprobs import ProportionalLoss, linear_logprobs, linear_logprobs_loss

_VERL_CHUNK = 512
_BOUND_CHUNK = 8192
_EXACT_CHUNK = 1024


def _head(tokens: int, hidden: int, vocab: int = 50304) -> Size:
    return {"tokens": tokens, "hidden": hidden, "vocab": vocab}


_SIZES = {
    "cuda": [
        _head(8192, 2048),
        _head(2048, 2048),
        _head(32768, 2048),
        _head(131072, 2048),
        _head(8192, 768),
        _head(8192, 4096),
        _head(131072, 4096),
        _head(8192, 12288),
        _head(8192, 4096, 25152),
        _head(8192, 4096, 12576),
        _head(8192, 4096, 6288),
        _head(8192, 4096, 151936),
    ],
    "cpu": [_head(128, 128, 8192), _head(128, 128, 16384)],
}


def _inputs(size: Size, device: torch.device) -> Inputs:
    tokens, width, vocab = size["tokens"], size["hidden"], size["vocab"]
    # On a CPU in fp32: its matrix products in bf16 tell nothing about the kernels.
    options: Any = {
        "dtype": torch.bfloat16 if device.type == "cuda" else torch.float32,
        "device": device,
    }
    return {
        "hidden": torch.randn(tokens, width, **options),
        # Logits of standard deviation 2.
        "weight": torch.randn(vocab, width, **options).mul_(2 * width**-0.5),
        "labels": torch.randint(0, vocab, (tokens,), device=device),
        "upstream": {"logprobs": torch.randn(tokens, device=device)},
    }


def _loss_inputs(size: Size, device: torch.device) -> Inputs:
    return _inputs(size, device) | {"upstream": {"loss": torch.ones((), device=device)}}


def _exact_logprobs(inputs: Inputs) -> dict[str, Expected]:
    return _exact(inputs, inputs["upstream"]["logprobs"])


def _exact_loss(inputs: Inputs) -> dict[str, Expected]:
    num_tokens = len(inputs["labels"])
    weights = torch.full_like(inputs["labels"], -1 / num_tokens, dtype=torch.float32)
    return _exact(inputs, weights)


@torch.no_grad()
def _exact(inputs: Inputs, upstream: Tensor) -> dict[str, Expected]:
    """Sampled rows of the log-probs and both gradients, and the mean loss; upstream [T].

    The rows are in fp64. The loss and the weight's gradient need the logsumexp of all tokens,
    which is that of fp32 logits: four digits better than what is to be told apart.
    """
    hidden, weight, labels = (inputs[name].detach() for name in ("hidden", "weight", "labels"))
    rows = sampled_rows(len(labels), labels.device)
    columns = labels[rows].unique()
    z = hidden[rows].double() @ weight.double().t()  # [rows, V]
    log_p = z.log_softmax(-1)
    dz = -log_p.exp()
    dz[torch.arange(len(rows), device=rows.device), labels[rows]] += 1
    dz *= upstream[rows, None].double()

    weight_fp32, logsumexp = weight.float(), []
    for chunk in hidden.split(_EXACT_CHUNK):
        logsumexp.append((chunk.float() @ weight_fp32.t()).logsumexp(-1))
    logsumexp = torch.cat(logsumexp).double()  # [T]
    z_columns = hidden.double() @ weight[columns].double().t()  # [T, columns]
    p_columns = (z_columns - logsumexp[:, None]).exp()
    dz_columns = upstream[:, None].double() * ((labels[:, None] == columns).double() - p_columns)
    z_labels = torch.cat(
        [
            (h.double() * weight[y].double()).sum(-1)
            for h, y in zip(hidden.split(_EXACT_CHUNK), labels.split(_EXACT_CHUNK), strict=True)
        ]
    )
    return {
        "logprobs": Expected(log_p.gather(1, labels[rows, None])[:, 0], 0.15, rows),
        "loss": Expected((logsumexp - z_labels).mean(), 1e-2),
        "hidden_grad": Expected(dz @ weight.double(), 0.05, rows, is_relative=True),
        "weight_grad": Expected(dz_columns.t() @ hidden.double(), 0.05, columns, is_relative=True),
    }


def _cost(inputs: Inputs, mode: Mode) -> Cost:
    # z = h W^T forward; z again is avoidable, dh = dz W and dW = dz^T h are not.
    product = 2 * inputs["hidden"].numel() * len(inputs["weight"])
    return Cost(flops=product * (1 if mode == "forward" else 3))


class _BareProducts(torch.autograd.Function):
    """The three matrix products alone, and nothing else; gives zeros."""

    @staticmethod
    def forward(ctx: Any, hidden: Tensor, weight: Tensor) -> Tensor:
        logits = hidden.new_empty(min(_BOUND_CHUNK, len(hidden)), len(weight))
        for chunk in hidden.split(_BOUND_CHUNK):
            torch.mm(chunk, weight.t(), out=logits[: len(chunk)])
        ctx.save_for_backward(hidden, weight, logits)  # logits stand for dz
        return hidden.new_zeros(len(hidden))

    @staticmethod
    def backward(ctx: Any, _: Tensor) -> tuple[Tensor, Tensor]:
        hidden, weight, dz = ctx.saved_tensors
        hidden_grad, weight_grad = torch.empty_like(hidden), torch.zeros_like(weight)
        parts = zip(hidden.split(_BOUND_CHUNK), hidden_grad.split(_BOUND_CHUNK), strict=True)
        for chunk, out in parts:
            torch.mm(dz[: len(chunk)], weight, out=out)
            weight_grad.addmm_(dz[: len(chunk)].t(), chunk)
        return hidden_grad, weight_grad


def _softmax(hidden: Tensor, weight: Tensor, labels: Tensor) -> Tensor:
    return (hidden @ weight.t()).float().log_softmax(-1).gather(1, labels[:, None])[:, 0]


def _softmax_recomputed(hidden: Tensor, weight: Tensor, labels: Tensor) -> Tensor:
    """Chunks of 512 tokens, computed again in backward: the method of verl's FusedLinearForPPO."""
    pairs = zip(hidden.split(_VERL_CHUNK), labels.split(_VERL_CHUNK), strict=True)
    return torch.cat([checkpoint(_softmax, h, weight, y, use_reentrant=False) for h, y in pairs])


def _mean_loss(hidden: Tensor, weight: Tensor, labels: Tensor) -> Tensor:
    return F.cross_entropy((hidden @ weight.t()).float(), labels)


def _one_pass(hidden: Tensor, weight: Tensor, labels: Tensor) -> Tensor:
    loss = ProportionalLoss(torch.full((), -1 / len(labels), device=hidden.device))
    return linear_logprobs_loss(hidden, weight, labels, loss)[0]


def _one_pass_by_autograd(hidden: Tensor, weight: Tensor, labels: Tensor) -> Tensor:
    scale = -1 / len(labels)
    return linear_logprobs_loss(hidden, weight, labels, lambda logprobs, rows: scale * logprobs)[0]


def _trl() -> Any:
    from trl.kernels import ChunkedLogProbFunction

    # Its backward imports this module, and that datasets, accelerate and pandas, for a context that
    # gathers DeepSpeed's shards. There are none here: without those packages an empty one serves.
    name = "trl.trainer.utils"
    try:
        importlib.import_module(name)
    except ImportError:
        sys.modules[name] = types.ModuleType(name)
        sys.modules[name].maybe_gather_lm_head_ctx = lambda *_: contextlib.nullcontext()
    # Tiles of 32768 columns, as its trainers take them; no entropy.
    return lambda hidden, weight, labels: ChunkedLogProbFunction.apply(
        hidden, weight, None, labels, 1.0, 32768, None, 1.0, ()
    )[0]


def _liger_scaled() -> Any:
    from liger_kernel.ops.fused_linear_scaled_cross_entropy import (
        LigerFusedLinearScaledCrossEntropyFunction,
    )

    return lambda *x: -LigerFusedLinearScaledCrossEntropyFunction.apply(*x, 1.0)


def _liger_loss() -> Any:
    from liger_kernel.ops.fused_linear_cross_entropy import LigerFusedLinearCrossEntropyFunction

    return lambda *x: LigerFusedLinearCrossEntropyFunction.apply(*x)[0]


def _verl_kernel() -> Any:
    from verl.utils.kernel.linear_cross_entropy import linear_cross_entropy

    return lambda *x: linear_cross_entropy(*x, 1.0)[0]


def _cut_cross_entropy(reduction: str) -> Any:
    def load() -> Any:
        from cut_cross_entropy import linear_cross_entropy

        sign = -1 if reduction == "none" else 1
        return lambda *x: sign * linear_cross_entropy(*x, reduction=reduction, filter_eps=None)

    return load


def _quack_loss() -> Any:
    from quack.linear_cross_entropy import chunked_linear_cross_entropy

    return chunked_linear_cross_entropy


def _torch_chunked_loss() -> Any:
    if not hasattr(F, "linear_cross_entropy"):
        raise ImportError("torch 2.13 brings F.linear_cross_entropy")
    options = torch.nn.LinearCrossEntropyOptions()
    return lambda *x: F.linear_cross_entropy(*x, options=options)


LINEAR_LOGPROBS = Operation(
    name="linear_logprobs",
    sizes=_SIZES,
    inputs=_inputs,
    arguments=("hidden", "weight", "labels"),
    outputs=("logprobs",),
    gradients=("hidden", "weight"),
    exact=_exact_logprobs,
    cost=_cost,
    providers=(
        Provider("trident", plain(lambda *x: linear_logprobs(*x)[0])),
        Provider(
            "bare products",
            plain(lambda hidden, weight, _: _BareProducts.apply(hidden, weight)),
            is_bound=True,
        ),
        Provider("torch, full logits", plain(_softmax)),
        Provider("torch.compile", compiled(_softmax), needs_gpu=True),
        Provider("verl: torch by 512", plain(_softmax_recomputed)),
        Provider("TRL chunked", _trl),
        Provider("Liger scaled", _liger_scaled),
        Provider("verl", _verl_kernel, needs_gpu=True),
        Provider("cut-cross-entropy", _cut_cross_entropy("none"), needs_gpu=True),
    ),
)

LINEAR_LOSS = replace(
    LINEAR_LOGPROBS,
    name="linear_loss",
    inputs=_loss_inputs,
    outputs=("loss",),
    modes=("forward+backward",),
    exact=_exact_loss,
    providers=(
        Provider("trident", plain(_one_pass)),
        Provider("trident, any token loss", plain(_one_pass_by_autograd)),
        Provider("trident, two passes", plain(lambda *x: -linear_logprobs(*x)[0].mean())),
        Provider(
            "bare products",
            plain(lambda hidden, weight, _: _BareProducts.apply(hidden, weight).sum()),
            is_bound=True,
        ),
        Provider("torch, full logits", plain(_mean_loss)),
        Provider("torch.compile", compiled(_mean_loss), needs_gpu=True),
        Provider("torch chunked", _torch_chunked_loss),
        Provider("Liger", _liger_loss, needs_gpu=True),
        Provider("quack", _quack_loss, needs_gpu=True),
        Provider("cut-cross-entropy", _cut_cross_entropy("mean"), needs_gpu=True),
    ),
)
