import dataclasses

import pytest
import torch

from engine.generation.draws import Draws, DrawSettings
from engine.generation.scheduler import Step
from engine.generation.sequence import LiveSequence
from engine.generation.step_tensors import IDLE_TOKEN, StepTensors, upload
from engine.ranks.start import start_parallel
from engine.settings.layout import ParallelLayout
from engine.settings.sampling import SamplingConfig
from models.paged_attention import PagedCache
from models.sizes import GPTSize
from tests.ranks import run_ranks

SIZE = GPTSize(num_layers=1, hidden_size=8, num_heads=1, vocab_size=20, context_length=16)
PADDED = SIZE.padded_vocab_size
STOPS = frozenset({7, 3})
PROMPT = 2


def step(lengths: list[int], *, num_rows: int, min_new_tokens: int = 0) -> StepTensors:
    """A decoding step of sequences of these lengths, each after a prompt of two tokens."""
    sequences = [
        LiveSequence(
            sample_index=index,
            tokens=[1] * length,
            prompt_length=PROMPT,
            max_length=16,
            blocks=[index],
            num_cached=length - 1,
        )
        for index, length in enumerate(lengths)
    ]
    lanes = [torch.empty(2048, dtype=torch.uint8) for _ in range(2)]
    cache = PagedCache([1], (8, 16, 1, 2), blocks_per_sequence=1, dtype=torch.float32, lanes=lanes)
    return upload(
        Step(decodes=sequences, prefills=[], num_steps=1),
        cache,
        num_decode_rows=num_rows,
        min_new_tokens=min_new_tokens,
        device=torch.device("cpu"),
    )


def draw(
    logits: torch.Tensor,
    tensors: StepTensors,
    config: SamplingConfig,
    *,
    tp: int = 1,
    seed: int = 5,
    absent: tuple[int, ...] = (),
) -> tuple[torch.Tensor, torch.Tensor]:
    """Return the tokens and log-probs that this rank draws from its columns of the logits."""
    parallel = start_parallel(ParallelLayout(tp=tp), seed=0)
    draws = Draws(DrawSettings.of(config, STOPS, absent), SIZE, parallel)
    draws.seed.fill_(seed)
    shard = logits.chunk(tp, dim=1)[parallel.tp_rank].clone()
    sampled = torch.empty(2, len(logits), dtype=torch.int32)
    draws(shard, tensors, sampled)
    return sampled[0], sampled[1].view(torch.float32)


def random_logits(num_rows: int) -> torch.Tensor:
    return torch.randn(num_rows, PADDED, generator=torch.Generator().manual_seed(0))


GREEDY = SamplingConfig(temperature=0.0)


def test_settings_are_alike_for_alike_stops_and_know_whether_any_wait():
    config = SamplingConfig(temperature=0.5, top_k=3, top_p=0.9, min_new_tokens=2)
    found = DrawSettings.of(config, frozenset([7, 3]))
    assert found == DrawSettings(
        temperature=0.5, top_k=3, top_p=0.9, suppresses_stops=True, stop_ids=(3, 7)
    )
    later = dataclasses.replace(config, min_new_tokens=4)  # from where on is in the step
    assert DrawSettings.of(later, frozenset([3, 7])) == found
    assert not DrawSettings.of(SamplingConfig(), STOPS).suppresses_stops


def test_the_likeliest_token_comes_with_its_logprob():
    logits = random_logits(2)
    tokens, logprobs = draw(logits, step([3, 5], num_rows=2), GREEDY)
    valid = logits[:, : SIZE.vocab_size]
    assert tokens.tolist() == valid.argmax(1).tolist()
    assert torch.allclose(logprobs, valid.log_softmax(1).amax(1), atol=1e-6)


def test_the_padding_of_the_vocabulary_has_no_part():
    logits = random_logits(1)
    other = logits.clone()
    other[:, SIZE.vocab_size :] = 100.0
    ours, theirs = (draw(x, step([3], num_rows=1), SamplingConfig()) for x in (logits, other))
    assert torch.equal(ours[0], theirs[0]) and torch.equal(ours[1], theirs[1])


def test_an_idle_row_draws_no_token():
    tokens, _ = draw(random_logits(3), step([3], num_rows=3), GREEDY)
    assert tokens[0] != IDLE_TOKEN
    assert tokens[1:].tolist() == [IDLE_TOKEN] * 2


def test_a_draw_is_of_the_seed_the_sample_and_the_position():
    config, row = SamplingConfig(), torch.zeros(1, PADDED)

    def drawn(lengths: list[int], seed: int) -> list[int]:
        logits = row.expand(len(lengths), -1)
        return draw(logits, step(lengths, num_rows=len(lengths)), config, seed=seed)[0].tolist()

    assert drawn([3, 4], 5) == drawn([3, 4], 5)
    columns = zip(*(drawn([3] * 8, seed) for seed in range(5)), strict=True)
    assert all(len(set(tokens)) > 1 for tokens in columns)  # of a sample, by the seed
    assert len(set(drawn([3] * 8, 5))) > 1  # by the sample
    assert len({drawn([length], 5)[0] for length in range(3, 11)}) > 1  # by the position


@pytest.mark.parametrize("temperature", [0.0, 0.7])
def test_stops_wait_for_a_responses_first_tokens_and_the_logprob_knows_them(temperature: float):
    logits = random_logits(2)
    logits[:, 3] = 9.0  # a stop token that would win
    # The next token is the second and the third of their responses; two must be no stops.
    tensors = step([PROMPT + 1, PROMPT + 2], num_rows=2, min_new_tokens=2)
    config = SamplingConfig(temperature=temperature, min_new_tokens=2)
    tokens, logprobs = draw(logits, tensors, config)
    assert tokens[0] not in STOPS
    assert tokens[1] == 3
    # Of the full softmax, where the stop tokens have their part.
    full = (logits[:, : SIZE.vocab_size] / (temperature or 1.0)).log_softmax(1)
    assert torch.allclose(logprobs, full.gather(1, tokens[:, None].long())[:, 0], atol=1e-5)


def drawn_on_two_ranks() -> list[torch.Tensor]:
    # Shards of 64 columns: stop token 3 is on the first rank, and no stop on the second.
    logits = random_logits(2)
    logits[:, 3] = 9.0
    tensors = step([PROMPT + 1, PROMPT + 2], num_rows=2, min_new_tokens=2)
    return list(draw(logits, tensors, SamplingConfig(min_new_tokens=2), tp=2))


@pytest.mark.slow  # test_layouts.py generates so, and is not
def test_ranks_that_share_the_vocabulary_draw_as_one():
    first, second = run_ranks(drawn_on_two_ranks, 2)
    assert all(map(torch.equal, first, second))
    tokens, logprobs = first
    assert tokens[0] not in STOPS and tokens[1] == 3
    full = random_logits(2)
    full[:, 3] = 9.0
    wanted = full[:, : SIZE.vocab_size].log_softmax(1).gather(1, tokens[:, None].long())[:, 0]
    assert torch.allclose(logprobs, wanted, atol=1e-5)


ABSENT = (4, 11, 18, 19)


@pytest.mark.parametrize("temperature", [0.0, 0.7])
@pytest.mark.parametrize("min_new_tokens", [0, 3])
def test_ids_that_are_no_token_are_never_drawn_and_keep_their_share(temperature, min_new_tokens):
    num_rows = 600
    logits = random_logits(1).repeat(num_rows, 1)
    logits[:, list(ABSENT)] += 4  # the likeliest
    tensors = step([3] * 8, num_rows=8, min_new_tokens=min_new_tokens)
    config = SamplingConfig(temperature=temperature, min_new_tokens=min_new_tokens)
    full = (logits[0, : SIZE.vocab_size] / (temperature or 1)).log_softmax(0)
    seen = set()
    for seed in range(num_rows // 8):
        tokens, logprobs = draw(logits[:8], tensors, config, seed=seed, absent=ABSENT)
        seen |= set(tokens.tolist())
        torch.testing.assert_close(logprobs, full[tokens.long()], atol=1e-5, rtol=0)
    assert not seen & set(ABSENT)
    assert len(seen) > (1 if temperature else 0)
    assert bool(seen & STOPS) is (temperature > 0 and not min_new_tokens)


def drawn_of_shards() -> tuple[list[int], list[float]]:
    config, tensors = SamplingConfig(temperature=0.7), step([3] * 8, num_rows=8)
    tokens, logprobs = draw(random_logits(8), tensors, config, tp=2, absent=ABSENT)
    return tokens.tolist(), logprobs.tolist()


def test_ranks_that_share_the_vocabulary_leave_the_same_ids_out():
    config, tensors = SamplingConfig(temperature=0.7), step([3] * 8, num_rows=8)
    tokens, logprobs = draw(random_logits(8), tensors, config, absent=ABSENT)
    for found, of_them in run_ranks(drawn_of_shards, 2):
        assert found == tokens.tolist()
        assert of_them == pytest.approx(logprobs.tolist(), abs=1e-5)
