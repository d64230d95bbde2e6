import dataclasses
import math

import numpy as np
import pytest
import torch
import torch.nn.functional as F
from torch import Tensor

from engine.data.batches import PackedBatch, pack
from engine.data.examples import Example
from engine.ranks.parallel import Parallel
from engine.ranks.start import start_parallel
from engine.settings.layout import ParallelLayout
from engine.settings.numerics import Numerics
from engine.training.network import Network, build_network
from engine.training.trainable import make_trainable
from kernels.linear_logprobs import TokenLoss
from models.packed_sequences import PackedSequences
from models.readouts import Logits, Logprobs, Readout, TokenLosses
from models.sizes import GPTSize
from tests.tiny import SIZE, random_network

LENGTHS = (64, 1, 23, 2, 40)  # 64 is the whole context


@pytest.fixture
def parallel() -> Parallel:
    return start_parallel(ParallelLayout(), seed=1)


@pytest.fixture
def network(parallel: Parallel) -> Network:
    return random_network("language", parallel)


def sequences() -> list[np.ndarray]:
    draw = np.random.default_rng(0)
    return [draw.integers(0, SIZE.vocab_size, length) for length in LENGTHS]


def batch_of(tokens: list[np.ndarray], multiple_of: int = 1) -> PackedBatch:
    examples = [Example(tokens=t, prompt_length=1) for t in tokens]
    return pack(examples, multiple_of=multiple_of)


def call(network: Network, batch: PackedBatch, readout: Readout):
    packed = PackedSequences.of(batch.cu_seqlens, batch.max_seqlen)
    return network.modules[0](batch.tokens, batch.positions, packed, readout)


def logprobs_of(network: Network, batch: PackedBatch, temperature: float = 1.0) -> Tensor:
    return call(network, batch, Logprobs(batch.mask, temperature=temperature))


def losses_of(network: Network, batch: PackedBatch, token_loss: TokenLoss) -> tuple[Tensor, Tensor]:
    return call(network, batch, TokenLosses(Logprobs(batch.mask), token_loss))


def plain_gpt2_logits(weights: dict[str, Tensor], size: GPTSize, tokens: Tensor) -> Tensor:
    """[n, vocabulary] logits of one sequence by GPT-2 as its paper draws it, in fp64."""
    w = {name: weight.double() for name, weight in weights.items()}
    count, heads = len(tokens), size.num_heads

    def norm(x: Tensor, name: str) -> Tensor:
        centred = x - x.mean(-1, keepdim=True)
        scaled = centred / (centred.square().mean(-1, keepdim=True) + 1e-5).sqrt()
        return scaled * w[f"{name}.weight"] + w[f"{name}.bias"]

    def linear(x: Tensor, name: str) -> Tensor:
        return x @ w[f"{name}.weight"].T + w[f"{name}.bias"]

    def gelu(x: Tensor) -> Tensor:
        return 0.5 * x * (1 + torch.tanh(math.sqrt(2 / math.pi) * (x + 0.044715 * x**3)))

    embedding = w["embedding.word_embeddings.weight"]
    x = embedding[tokens] + w["embedding.position_embeddings.weight"][:count]
    for i in range(size.num_layers):
        layer = f"decoder.layers.{i}"
        qkv = linear(norm(x, f"{layer}.input_layernorm"), f"{layer}.self_attention.linear_qkv")
        # megatron lays query, key and value of one head side by side
        q, k, v = qkv.view(count, heads, 3, -1).permute(2, 1, 0, 3)
        logits = q @ k.transpose(1, 2) / math.sqrt(q.shape[-1])
        future = torch.ones(count, count, dtype=torch.bool).triu(1)
        attention = logits.masked_fill(future, -torch.inf).softmax(-1) @ v
        joined = attention.transpose(0, 1).reshape(count, -1)
        x = x + linear(joined, f"{layer}.self_attention.linear_proj")
        inner = gelu(linear(norm(x, f"{layer}.pre_mlp_layernorm"), f"{layer}.mlp.linear_fc1"))
        x = x + linear(inner, f"{layer}.mlp.linear_fc2")
    return norm(x, "decoder.final_layernorm") @ embedding[: size.vocab_size].T


def plain_logprobs(network: Network, tokens: np.ndarray, temperature: float = 1.0) -> Tensor:
    """[n] with 0 for the first token."""
    ids = torch.from_numpy(tokens)
    weights = dict(network.modules[0].named_parameters())
    with torch.no_grad():
        logits = plain_gpt2_logits(weights, network.size, ids) / temperature
    chosen = logits.log_softmax(-1)[:-1].gather(1, ids[1:, None])[:, 0]
    return torch.cat([torch.zeros(1), chosen.float()])


@pytest.mark.parametrize("temperature", [1.0, 0.6])
def test_logprobs_are_those_of_gpt2(temperature: float, network: Network):
    found = logprobs_of(network, batch_of(sequences()), temperature)
    expected = torch.cat([plain_logprobs(network, t, temperature) for t in sequences()])
    assert found.dtype is torch.float32
    assert expected.std() > 0.5
    torch.testing.assert_close(found, expected, rtol=1e-4, atol=1e-4)


def test_packing_changes_nothing_but_rounding(network: Network):
    together = logprobs_of(network, batch_of(sequences(), multiple_of=8))
    one_by_one = [logprobs_of(network, batch_of([tokens])) for tokens in sequences()]
    num_tokens = sum(LENGTHS)
    torch.testing.assert_close(together[:num_tokens], torch.cat(one_by_one), rtol=1e-4, atol=1e-5)
    assert (together[num_tokens:] == 0).all()  # the padding


def test_masked_tokens_have_no_logprob_and_change_none(network: Network):
    batch = batch_of(sequences())
    everything = logprobs_of(network, batch)
    mask = batch.mask & (torch.arange(len(batch.tokens)) % 3 == 0)
    some = call(network, batch, Logprobs(mask))
    torch.testing.assert_close(some[mask], everything[mask])
    assert (some[~mask] == 0).all()
    targets = mask.nonzero()[:, 0]  # the same, with the other tokens spared
    torch.testing.assert_close(call(network, batch, Logprobs(mask, targets)), some)


def test_fused_loss_is_the_loss_of_the_logprobs(network: Network):
    make_trainable(network)
    batch = batch_of(sequences())
    weights = torch.randn(len(batch.tokens), generator=torch.Generator().manual_seed(0))

    def token_loss(logprobs: Tensor, positions: Tensor) -> Tensor:
        return weights[positions] * logprobs.square()

    gradients, losses = [], []
    for fused in (False, True):
        network.chunks[0].zero_grad_buffer()
        if fused:
            loss, logprobs = losses_of(network, batch, token_loss)
            assert not logprobs.requires_grad
        else:
            logprobs = logprobs_of(network, batch)
            loss = token_loss(logprobs, torch.arange(len(batch.tokens)))[batch.mask].sum()
        (3.0 * loss).backward()
        losses.append(loss.detach())
        parameters = network.modules[0].parameters()
        gradients.append(torch.cat([p.main_grad.flatten() for p in parameters]))
    torch.testing.assert_close(losses[1], losses[0], rtol=1e-5, atol=1e-5)
    difference = (gradients[1] - gradients[0]).norm() / gradients[0].norm()
    assert difference < 1e-5
    assert gradients[0].norm() > 1.0


def test_gradients_are_those_of_gpt2(network: Network):
    make_trainable(network)
    tokens = sequences()[2]
    batch = batch_of([tokens])
    loss, _ = losses_of(network, batch, lambda logprobs, positions: -logprobs)
    loss.backward()
    weights = dict(network.modules[0].named_parameters())
    plain = {name: w.detach().double().requires_grad_() for name, w in weights.items()}
    ids = torch.from_numpy(tokens)
    logits = plain_gpt2_logits(plain, SIZE, ids)
    F.cross_entropy(logits[:-1], ids[1:], reduction="sum").backward()
    total = torch.cat([w.grad.flatten() for w in plain.values()]).norm()
    for name, weight in weights.items():
        assert (weight.main_grad - plain[name].grad).norm() < 1e-5 * total, name


def test_logits_of_rows(network: Network):
    batch = batch_of(sequences())
    ends = batch.cu_seqlens[1:].long() - 1
    logits = call(network, batch, Logits(ends))
    assert logits.shape == (len(LENGTHS), SIZE.padded_vocab_size)
    weights = dict(network.modules[0].named_parameters())
    for row, tokens in zip(logits, sequences(), strict=True):
        with torch.no_grad():
            expected = plain_gpt2_logits(weights, SIZE, torch.from_numpy(tokens))[-1]
        torch.testing.assert_close(row[: SIZE.vocab_size], expected.float(), rtol=1e-4, atol=1e-4)


def test_padding_of_the_vocabulary_takes_no_part(network: Network):
    batch = batch_of(sequences())
    before = logprobs_of(network, batch)
    embedding = network.modules[0].embedding.word_embeddings.weight
    with torch.no_grad():
        embedding[SIZE.vocab_size :] = 1e3
    assert torch.equal(logprobs_of(network, batch), before)
    make_trainable(network)
    loss, _ = losses_of(network, batch, lambda logprobs, positions: -logprobs)
    loss.backward()
    assert (embedding.main_grad[SIZE.vocab_size :] == 0).all()
    assert (embedding.main_grad[: SIZE.vocab_size] != 0).any(1).all()


def test_initialisation_is_gpt3s(parallel: Parallel):
    size = dataclasses.replace(SIZE, hidden_size=128, num_layers=8)
    network = build_network("language", size, parallel, numerics=Numerics())
    for name, weight in network.modules[0].named_parameters():
        if weight.ndim == 2:
            writes_to_residual = name.endswith(("linear_proj.weight", "linear_fc2.weight"))
            std = 0.02 / math.sqrt(2 * 8) if writes_to_residual else 0.02
            assert weight.std().item() == pytest.approx(std, rel=0.05), name
            assert abs(weight.mean().item()) < 0.1 * std
        else:
            is_scale = name.endswith("layernorm.weight")
            assert (weight == (1.0 if is_scale else 0.0)).all(), name


def test_parameters_are_counted_right(network: Network):
    padding = (SIZE.padded_vocab_size - SIZE.vocab_size) * SIZE.hidden_size
    found = sum(p.numel() for p in network.modules[0].parameters())
    assert found == SIZE.num_parameters + padding
