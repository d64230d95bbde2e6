"""Networks of every form generate what they are trained to predict."""

import numpy as np
import pytest
import torch

from engine.generation.generate import generate
from engine.ranks.start import start_parallel
from engine.settings.layout import ParallelLayout
from engine.settings.sampling import SamplingConfig
from engine.training.network import Network
from models.packed_sequences import PackedSequences
from models.readouts import Logits
from tests.forms import FORMS
from tests.tiny import random_network


def next_token_logits(network: Network, tokens: np.ndarray) -> torch.Tensor:
    """[vocabulary] fp32 after the last of the tokens, from the trainer's forward pass."""
    (module,) = network.modules
    length = len(tokens)
    bounds = torch.tensor([0, length], dtype=torch.int32)
    last = Logits(torch.tensor([length - 1]))
    module.eval()
    with torch.no_grad(), network.parallel.active():
        logits = module(
            torch.from_numpy(tokens),
            torch.arange(length),
            PackedSequences.of(bounds, length),
            last,
        )
    return logits[0, : network.size.vocab_size]


@pytest.mark.parametrize("name", FORMS)
def test_greedy_with_the_cache_is_the_trainers_choice_token_for_token(name: str):
    network = random_network("language", start_parallel(ParallelLayout(), seed=0), size=FORMS[name])
    rng = np.random.default_rng(0)
    prompts = [rng.integers(0, 100, length) for length in (1, 4, 9, 17, 30)]
    sampling = SamplingConfig(
        max_new_tokens=24, temperature=0.0, num_slots=3, block_size=8, cache_gib=0.01
    )
    distinct = set()
    for response in generate(network, prompts, sampling, eos_id=-1, seed=0):
        tokens = prompts[response.sample_index]
        assert len(response.tokens) == 24
        for token, logprob in zip(response.tokens, response.logprobs, strict=True):
            logits = next_token_logits(network, tokens)
            best = logits.max()
            assert logits[token] > best - 1e-4
            assert logprob == pytest.approx(logits.log_softmax(0)[token].item(), abs=1e-4)
            tokens = np.append(tokens, token)
        distinct |= set(response.tokens.tolist())
    assert len(distinct) > 2  # it says more than one thing


@pytest.mark.parametrize("name", FORMS)
def test_every_part_of_a_form_matters_to_the_logits(name: str):
    network = random_network("language", start_parallel(ParallelLayout(), seed=0), size=FORMS[name])
    tokens = np.random.default_rng(1).integers(0, 100, 20)
    before = next_token_logits(network, tokens)
    (module,) = network.modules
    for parameter_name, parameter in module.named_parameters():
        kept = parameter.detach().clone()
        with torch.no_grad():
            parameter.mul_(1.5)
            if "layernorm.weight" in parameter_name:
                parameter[::2] *= 0.5
        changed = next_token_logits(network, tokens)
        with torch.no_grad():
            parameter.copy_(kept)
        assert not torch.allclose(before, changed, atol=1e-5), parameter_name
    assert torch.equal(before, next_token_logits(network, tokens))
