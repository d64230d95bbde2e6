"""One sampled token a row of logits [B, V] in fp32 and its log-prob under the whole softmax."""

from collections.abc import Callable
from dataclasses import replace
from functools import partial
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
    Results,
    Size,
    compiled,
    plain,
)
from kernels.sample import sample

_TEMPERATURE, _TOP_P = 0.7, 0.9

_SIZES = {
    "cuda": [
        {"rows": 256, "vocab": 50304},
        {"rows": 64, "vocab": 50304},
        {"rows": 512, "vocab": 50304},
        {"rows": 256, "vocab": 6288},
    ],
    "cpu": [{"rows": 8, "vocab": 8192}, {"rows": 8, "vocab": 50304}],
}


def _inputs(size: Size, device: torch.device) -> Inputs:
    return {
        "logits": 4 * torch.randn(size["rows"], size["vocab"], device=device),
        "sample_index": torch.arange(size["rows"], device=device),
        "position": torch.full((size["rows"],), 17, device=device),
        "upstream": {},
    }


def _exact(inputs: Inputs) -> dict[str, Expected]:
    log_p = (inputs["logits"].double() / _TEMPERATURE).log_softmax(-1)

    def of_drawn_tokens(results: Results) -> Tensor:
        return log_p.gather(1, results["tokens"].long()[:, None])[:, 0]

    return {"logprobs": Expected(of_drawn_tokens, 1e-3)}


def _cost(inputs: Inputs, mode: Mode) -> Cost:
    return Cost(num_bytes=inputs["logits"].nbytes)


def _ours(
    logits: Tensor, sample_index: Tensor, position: Tensor, *, top_p: float = 1.0
) -> tuple[Tensor, Tensor]:
    drawn = sample(
        logits,
        temperature=_TEMPERATURE,
        seed=1,
        sample_index=sample_index,
        position=position,
        top_p=top_p,
    )
    return drawn.tokens, drawn.logprobs


def _multinomial(logits: Tensor) -> tuple[Tensor, Tensor]:
    log_p = (logits / _TEMPERATURE).log_softmax(-1)
    tokens = torch.multinomial(log_p.exp(), 1)
    return tokens[:, 0], log_p.gather(1, tokens)[:, 0]


def _exponential_race(logits: Tensor) -> tuple[Tensor, Tensor]:
    """argmax of p / Exp(1): Gumbel-max in another form, as vLLM draws."""
    log_p = (logits / _TEMPERATURE).log_softmax(-1)
    tokens = (log_p.exp() / torch.empty_like(log_p).exponential_()).argmax(-1, keepdim=True)
    return tokens[:, 0], log_p.gather(1, tokens)[:, 0]


def _sorted_top_p(logits: Tensor) -> tuple[Tensor, Tensor]:
    log_p = (logits / _TEMPERATURE).log_softmax(-1)
    p, order = log_p.exp().sort(-1, descending=True)
    kept = p.masked_fill(p.cumsum(-1) - p >= _TOP_P, 0.0)
    tokens = order.gather(1, torch.multinomial(kept, 1))
    return tokens[:, 0], log_p.gather(1, tokens)[:, 0]


def _scored(draw: Callable[[Tensor], Tensor]) -> Callable[[Tensor], tuple[Tensor, Tensor]]:
    """Tokens from draw(scaled logits), and their log-probs, which flashinfer does not give."""

    def draw_and_score(logits: Tensor) -> tuple[Tensor, Tensor]:
        scaled = logits / _TEMPERATURE
        tokens = draw(scaled).long()
        return tokens, scaled.gather(1, tokens[:, None])[:, 0] - scaled.logsumexp(-1)

    return draw_and_score


def _flashinfer() -> Any:
    from flashinfer.sampling import sampling_from_logits

    return _scored(sampling_from_logits)


def _flashinfer_top_p() -> Any:
    from flashinfer.sampling import top_p_sampling_from_probs

    return _scored(lambda scaled: top_p_sampling_from_probs(scaled.softmax(-1), _TOP_P))


def _rival(name: str, load: Any, *, needs_gpu: bool = False) -> Provider:
    return Provider(name, load, arguments=("logits",), needs_gpu=needs_gpu)


SAMPLE = Operation(
    name="sample",
    sizes=_SIZES,
    inputs=_inputs,
    arguments=("logits", "sample_index", "position"),
    outputs=("tokens", "logprobs"),
    modes=("forward",),
    exact=_exact,
    cost=_cost,
    providers=(
        Provider("trident", plain(_ours)),
        _rival("torch multinomial", plain(_multinomial)),
        _rival("torch exponential race", plain(_exponential_race)),
        _rival("torch.compile", compiled(_exponential_race), needs_gpu=True),
        _rival("flashinfer", _flashinfer, needs_gpu=True),
    ),
)

SAMPLE_TOP_P = replace(
    SAMPLE,
    name="sample_top_p",
    providers=(
        Provider("trident", plain(partial(_ours, top_p=_TOP_P))),
        _rival("torch, sorted", plain(_sorted_top_p)),
        _rival("flashinfer", _flashinfer_top_p, needs_gpu=True),
    ),
)
