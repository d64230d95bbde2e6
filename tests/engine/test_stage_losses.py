"""The stages' losses and gradients are those of plain torch on the logits of every token."""

import numpy as np
import pytest
import torch
import torch.nn.functional as F
from torch import Tensor

from engine.data.batches import PackedBatch, pack
from engine.data.examples import Example
from engine.losses import (
    ClippedPolicyLoss,
    NegativeLogLikelihood,
    clipped_value_loss,
    comparison_loss,
)
from engine.ranks.start import start_parallel
from engine.settings.layout import ParallelLayout
from engine.training.network import Network
from engine.training.passes import forward_backward
from engine.training.trainable import make_trainable
from kernels.moments import Whitening
from models.packed_sequences import PackedSequences
from models.readouts import Logits, Readings, Readout
from tests.tiny import random_network

LENGTHS, PROMPT = (9, 5, 12), 2
NUM_TARGETS = torch.tensor(sum(LENGTHS) - PROMPT * len(LENGTHS))
WHITENING = Whitening(torch.tensor(0.2), torch.tensor(1.4))


@pytest.fixture(params=["reference", "triton"], autouse=True)
def backend(request: pytest.FixtureRequest, monkeypatch: pytest.MonkeyPatch) -> None:
    """The kernels' references, then the kernels in Triton's interpreter."""
    if request.param == "triton":
        monkeypatch.setenv("TRITON_INTERPRET", "1")


def batch() -> PackedBatch:
    """Three responses of three prompts, or three completions of one; random rollout numbers."""
    draw = np.random.default_rng(0)
    names = ("logprobs", "advantages", "values", "returns")
    centers = (-4.6, 0.0, 0.0, 0.0)  # log-probs around log(1 / 100), so that some ratios are cut
    unit = [
        Example(
            tokens=draw.integers(0, 100, n),
            prompt_length=PROMPT,
            fields={
                **{k: c + draw.standard_normal(n) for k, c in zip(names, centers, strict=True)},
                "ranks": rank,
            },
        )
        for rank, n in enumerate(LENGTHS)
    ]
    return pack([unit], multiple_of=8)


def module_of(network: Network, batch: PackedBatch, readout: Readout) -> Tensor:
    sequences = PackedSequences.of(batch.cu_seqlens, batch.max_seqlen)
    return network.modules[0](batch.tokens, batch.positions, sequences, readout)


def plain_logprobs(network: Network, batch: PackedBatch) -> Tensor:
    """[R] of the predicted tokens."""
    logits = module_of(network, batch, Logits(torch.arange(len(batch.tokens))))
    log_p = logits[:, : network.size.vocab_size].double().log_softmax(-1)
    return log_p[batch.targets - 1].gather(1, batch.tokens[batch.targets, None])[:, 0]


def plain_sft(network: Network, batch: PackedBatch) -> Tensor:
    return -plain_logprobs(network, batch).mean()


def plain_policy(network: Network, batch: PackedBatch) -> Tensor:
    old, advantages = (batch.fields[k][batch.targets] for k in ("logprobs", "advantages"))
    ratio = (plain_logprobs(network, batch) - old).exp()
    advantages = (advantages - WHITENING.mean) * WHITENING.rstd
    return -torch.minimum(ratio * advantages, ratio.clamp(0.8, 1.2) * advantages).mean()


def plain_value(network: Network, batch: PackedBatch) -> Tensor:
    values = module_of(network, batch, Readings())[batch.targets - 1].double()
    old, returns = (batch.fields[name][batch.targets] for name in ("values", "returns"))
    near = old + (values - old).clamp(-0.2, 0.2)
    return 0.5 * torch.maximum((values - returns) ** 2, (near - returns) ** 2).mean()


def plain_ranking(network: Network, batch: PackedBatch) -> Tensor:
    ends = batch.cu_seqlens[1 : 1 + len(LENGTHS)].long() - 1
    first, second, third = module_of(network, batch, Readings())[ends].double()
    margins = torch.stack([first - second, first - third, second - third])
    return -F.logsigmoid(margins).mean()


STAGES = {
    "sft": ("language", "loss", NegativeLogLikelihood(int(NUM_TARGETS)), plain_sft),
    "rm": ("scalar", "loss", comparison_loss(1), plain_ranking),
    "ppo policy": (
        "language",
        "policy_loss",
        ClippedPolicyLoss(num_targets=NUM_TARGETS, cliprange=0.2, whitening=WHITENING),
        plain_policy,
    ),
    "ppo value": ("scalar", "value_loss", clipped_value_loss(NUM_TARGETS, cliprange=0.2),
                  plain_value),
}  # fmt: skip


@pytest.mark.parametrize("stage", STAGES)
def test_loss_and_gradient_are_those_of_full_logits(stage: str) -> None:
    kind, name, loss, plain = STAGES[stage]
    network = random_network(kind, start_parallel(ParallelLayout(), seed=1))
    make_trainable(network)
    found = forward_backward(network, [batch()], loss)[name].item()
    expected = plain(network, batch())
    names, parameters = zip(*network.modules[0].named_parameters(), strict=True)
    gradients = torch.autograd.grad(expected, parameters, allow_unused=True)
    assert found == pytest.approx(expected.item(), rel=1e-5)
    norm = torch.cat([g.flatten() for g in gradients if g is not None]).norm()
    assert norm > 1e-3
    for key, parameter, gradient in zip(names, parameters, gradients, strict=True):
        difference = parameter.main_grad - (0 if gradient is None else gradient)
        assert difference.norm() < 1e-5 * norm, key
