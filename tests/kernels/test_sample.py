"""Gumbel-max sampling: its bits, its distribution, and what a sample does not depend on."""

import math

import pytest
import torch
from torch import Tensor

from kernels import philox as philox_module
from kernels import sample_state as state_module
from kernels.philox import SampleKey, group_log_survival
from kernels.sample import Sample, merge_samples, merge_states, sample
from kernels.sample_state import sample_state
from tests.kernels.oracle import largest_difference

# Sample indices beyond 32 bits, and positions up to the largest.
INDEX = torch.tensor([0, 2**33 + 5, 7, 2**40])
POSITION = torch.tensor([0, 1000, 3, 2**31 - 1])


@pytest.fixture(autouse=True)
def small_blocks(monkeypatch: pytest.MonkeyPatch) -> None:
    """Programs of 64 columns, so that a row is merged from several."""
    monkeypatch.setattr(state_module, "_BLOCK", 64)


def draw(logits: Tensor, **options: object) -> Sample:
    defaults = {"temperature": 1.0, "seed": 3, "sample_index": INDEX, "position": POSITION}
    return sample(logits, **{**defaults, **options})


def draw_many(logits: Tensor, num_draws: int = 100_000, **options: object) -> Tensor:
    """Tokens [num_draws] of one row of logits [V], each with a key of its own."""
    return draw(
        logits.expand(num_draws, -1),
        sample_index=torch.arange(num_draws) // 100,
        position=torch.arange(num_draws) % 100,
        **options,
    ).tokens


def exact_logprobs(logits: Tensor, temperature: float = 1.0) -> Tensor:
    return (logits.double() / (temperature or 1.0)).log_softmax(1)


OPTIONS = [
    {"temperature": 1.0},
    {"temperature": 0.7, "num_valid_vocab": 140},
    {"temperature": 0.0},
    {"temperature": 1.0, "top_k": 10},
    {"temperature": 1.0, "top_p": 0.8},
    {"temperature": 1.3, "top_k": 20, "top_p": 0.8, "num_valid_vocab": 100},
]


@pytest.mark.parametrize(
    "options", [*OPTIONS, {"seed": 0}, {"seed": 1}, {"seed": 2**40 + 7}, {"seed": 2**63 - 1}]
)
def test_kernel_draws_what_the_reference_draws(
    interpreter: None, monkeypatch: pytest.MonkeyPatch, options: dict
) -> None:
    # Flat, so that noise and truncation decide.
    logits = torch.randn(4, 150)
    logits[1, 8:16] = -torch.inf
    on_triton = draw(logits, **options)
    monkeypatch.delenv("TRITON_INTERPRET")
    on_torch = draw(logits, **options)
    assert torch.equal(on_triton.tokens, on_torch.tokens)
    assert largest_difference(on_triton.logprobs, on_torch.logprobs) < 4e-6
    assert largest_difference(on_triton.logsumexp, on_torch.logsumexp) < 4e-6


@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16])
@pytest.mark.parametrize("options", OPTIONS)
def test_logprob_and_logsumexp_match_fp64(backend: str, options: dict, dtype: torch.dtype) -> None:
    logits = (4 * torch.randn(4, 150)).to(dtype)
    result = draw(logits, **options)
    valid = options.get("num_valid_vocab", 150)
    temperature = options["temperature"] or 1.0
    exact = exact_logprobs(logits[:, :valid], temperature)
    assert (result.tokens < valid).all()
    tolerance = 2e-6 * logits.abs().max() / temperature
    # Of the whole distribution, whatever top-k and top-p cut away.
    assert (
        largest_difference(result.logprobs, exact.gather(1, result.tokens[:, None])[:, 0])
        < tolerance
    )
    lse = (logits[:, :valid].double() / temperature).logsumexp(1)
    assert largest_difference(result.logsumexp, lse) < tolerance


def chi_square(counts: Tensor, probabilities: Tensor) -> float:
    """Standard deviations by which Pearson's statistic exceeds its mean."""
    expected = probabilities * counts.sum()
    kept = expected > 0
    assert counts[~kept].sum() == 0
    statistic = ((counts - expected)[kept] ** 2 / expected[kept]).sum()
    freedom = int(kept.sum()) - 1
    return float((statistic - freedom) / math.sqrt(2 * freedom))


@pytest.mark.parametrize(
    "options",
    [
        {},
        {"temperature": 0.5},
        {"top_k": 7},
        {"top_p": 0.7},
        {"top_k": 12, "top_p": 0.8},
        {"top_k": 7, "top_p": 0.95, "temperature": 1.4},
    ],
)
def test_frequencies_are_the_softmax(options: dict) -> None:
    logits = 1.2 * torch.randn(40)
    tokens = draw_many(logits, **options)
    exact = exact_logprobs(logits[None], options.get("temperature", 1.0))[0].exp()
    probabilities, columns = exact.sort(descending=True)
    # The k likeliest, and of those as many as it takes to reach top_p of their mass.
    probabilities[options.get("top_k", 40) :] = 0
    probabilities /= probabilities.sum()
    before = probabilities.cumsum(0) - probabilities
    probabilities[before >= options.get("top_p", 1.0)] = 0
    counts = torch.bincount(tokens, minlength=40)[columns].double()
    assert abs(chi_square(counts, probabilities / probabilities.sum())) < 4


def hard_logits() -> Tensor:
    """[45]: groups that one column dominates, a group of equals, a light one, a part of one."""
    logits = torch.randn(45)
    logits[0:8] = -4.0
    logits[3] = 1.5
    logits[8:16] = -torch.inf
    logits[12] = 0.5
    logits[16:24] = -1.0
    logits[24:32] -= 4.0
    return logits


@pytest.mark.parametrize("num_valid_vocab", [45, 41, 33])
@pytest.mark.parametrize("top_k", [0, 9])
def test_frequencies_are_the_softmax_whatever_a_group_holds(
    num_valid_vocab: int, top_k: int
) -> None:
    logits = hard_logits()
    tokens = draw_many(logits, num_valid_vocab=num_valid_vocab, top_k=top_k)
    probabilities = logits[:num_valid_vocab].double().softmax(0)
    if top_k:
        least = probabilities.topk(top_k).values[-1]
        probabilities = torch.where(probabilities >= least, probabilities, 0.0)
    counts = torch.bincount(tokens, minlength=num_valid_vocab).double()
    assert abs(chi_square(counts, probabilities / probabilities.sum())) < 4


def test_the_column_does_not_depend_on_how_its_group_won() -> None:
    # Two groups. The larger the noise with which the first wins, the likelier it is to have won
    # by far; its column is softmax of its own eight all the same.
    logits = torch.cat((torch.randn(8), torch.randn(8) + 1.0))
    num_draws = 200_000
    key = SampleKey(3, torch.arange(num_draws) // 100, torch.arange(num_draws) % 100)
    tokens = draw_many(logits, num_draws)
    noise = -group_log_survival(key, 0, 1)[:, 0].neg().log()
    won = tokens < 8
    middle = noise[won].median()
    for part in (won & (noise < middle), won & (noise >= middle)):
        counts = torch.bincount(tokens[part], minlength=8).double()
        assert abs(chi_square(counts, logits[:8].double().softmax(0))) < 4


def test_rare_tokens_are_drawn_as_often_as_they_should() -> None:
    # 4000 columns of 1e-6 each, in groups of their own and beside the likely column, which holds
    # the rest: 400 draws of them are expected of 100,000, 0.7 beside the likely one.
    rare = 4000
    logits = torch.full((rare + 1,), math.log(1e-6))
    logits[0] = math.log(1 - rare * 1e-6)
    tokens = torch.cat([draw_many(logits, 10_000, seed=seed) for seed in range(10)])
    drawn = tokens[tokens > 0]
    assert abs(len(drawn) - 400) < 4 * math.sqrt(400)
    assert len(drawn.unique()) > 330  # 381 are expected to be distinct


@pytest.mark.parametrize("column", [4, 70])  # in the likely column's group, and in its own
def test_the_largest_noise_draws_a_token_of_1e_9(
    monkeypatch: pytest.MonkeyPatch, column: int
) -> None:
    def middling(key: SampleKey, words: Tensor) -> tuple[Tensor, ...]:
        """Bits of u = 1/2, but the least for the column and for its group."""
        least = [(column // 4, column % 4), (2**30 + column // 32, column // 8 % 4)]
        shape = len(key.position), words.shape[1]
        return tuple(
            torch.full(shape, 2**31).masked_fill(
                sum((words == word) & (lane == of) for word, of in least).bool(), 0
            )
            for lane in range(4)
        )

    monkeypatch.setattr(philox_module, "philox", middling)
    logits = torch.full((4, 150), -torch.inf)
    logits[:, 0] = 0.0
    logits[:, column] = math.log(1e-9)
    assert draw(logits).tokens.tolist() == [column] * 4


def test_a_sample_does_not_depend_on_its_batch(backend: str) -> None:
    logits = torch.randn(4, 150)
    whole = draw(logits)
    order = torch.tensor([3, 0, 2, 1])
    shuffled = draw(logits[order], sample_index=INDEX[order], position=POSITION[order])
    alone = draw(logits[3:4], sample_index=INDEX[3:4], position=POSITION[3:4])
    for a, b, c in zip(whole, shuffled, alone, strict=True):
        assert torch.equal(a[order], b)
        assert torch.equal(a[3:4], c)


@pytest.mark.parametrize("seed", [0, 2**40 + 7, 2**63 - 1])
def test_a_seed_on_the_device_draws_what_a_number_does(backend: str, seed: int) -> None:
    logits = 3 * torch.randn(4, 160)
    for a, b in zip(draw(logits, seed=seed), draw(logits, seed=torch.tensor(seed)), strict=True):
        assert torch.equal(a, b)


def draw_from_shards(
    logits: Tensor, widths: list[int], num_valid_vocab: int | None = None
) -> Sample:
    """`draw` with the columns dealt to shards, which exchange 16 bytes a row."""
    states, first_column = [], 0
    for shard in logits.split(widths, dim=1):
        parts = sample_state(
            shard,
            SampleKey(3, INDEX, POSITION),
            temperature=1.0,
            first_column=first_column,
            num_valid_vocab=num_valid_vocab,
        )
        state = merge_states(parts)
        assert state.shape == (4, 4)
        assert state.element_size() == 4
        states.append(state)
        first_column += shard.shape[1]
    return merge_samples(torch.stack(states))


@pytest.mark.parametrize("num_valid_vocab", [None, 98])
@pytest.mark.parametrize("widths", [[64] * 2, [64, 8, 56], [32] * 4, [8] * 16])
def test_shards_draw_what_the_whole_draws(
    backend: str, widths: list[int], num_valid_vocab: int | None
) -> None:
    # With 98 valid columns of 128, the last of 4 shards holds two, the last of 16 none.
    logits = 3 * torch.randn(4, 128)
    whole = draw(logits, num_valid_vocab=num_valid_vocab)
    merged = draw_from_shards(logits, widths, num_valid_vocab)
    assert torch.equal(merged.tokens, whole.tokens)
    assert largest_difference(merged.logprobs, whole.logprobs) < 2e-6
    assert largest_difference(merged.logsumexp, whole.logsumexp) < 2e-6


def test_padding_is_never_sampled(backend: str) -> None:
    logits = torch.full((4, 100), -50.0)
    logits[:, 90:] = 50.0
    for temperature in (0.0, 1.0):
        result = draw(logits, temperature=temperature, num_valid_vocab=90)
        assert (result.tokens < 90).all()
        assert largest_difference(result.logprobs, torch.full((4,), -math.log(90))) < 1e-5


def test_greedy_takes_the_first_of_equals(backend: str) -> None:
    logits = torch.zeros(4, 150)
    logits[:, [70, 3, 149]] = 1.0
    assert draw(logits, temperature=0.0).tokens.tolist() == [3] * 4


def test_shifting_all_logits_changes_no_token(backend: str) -> None:
    logits = torch.randn(4, 100).round(decimals=2)
    base = draw(logits)
    for shift in (-104.0, 1e3):
        shifted = draw(logits + shift)
        assert torch.equal(shifted.tokens, base.tokens)
        assert largest_difference(shifted.logprobs, base.logprobs) < 1e-3


def test_rows_of_nan_and_infinities_give_a_valid_column(backend: str) -> None:
    logits = torch.randn(4, 150)
    logits[0, 70] = torch.nan
    logits[1] = torch.nan
    logits[2, :] = -torch.inf
    logits[3, :] = -torch.inf
    logits[3, 100] = 2.0
    results = [draw(logits, **x) for x in ({}, {"temperature": 0.0}, {"top_p": 0.9}, {"top_k": 3})]
    results.append(draw_from_shards(logits, [48, 102]))
    for result in results:
        assert ((result.tokens >= 0) & (result.tokens < 150)).all()
        assert result.logprobs[:2].isnan().all()
        assert result.tokens[3] == 100
        assert result.logprobs[3:].isfinite().all()


def test_the_only_column_that_top_k_keeps_is_drawn(backend: str) -> None:
    logits = torch.tensor([[0.4, 0.3, 0.2, 0.1]]).log()
    assert draw(logits.expand(4, -1), top_k=1).tokens.tolist() == [0] * 4


@pytest.mark.parametrize(
    "options", [{"temperature": -1.0}, {"top_p": 0.0}, {"top_k": -1}, {"seed": 2**63}]
)
def test_values_out_of_range_are_named(options: dict) -> None:
    with pytest.raises(ValueError, match="must"):
        draw(torch.randn(4, 10), **options)


def test_no_rows_and_strided_rows(backend: str) -> None:
    wide = torch.randn(4, 200)
    assert torch.equal(draw(wide[:, :100]).tokens, draw(wide[:, :100].contiguous()).tokens)
    assert torch.equal(draw(wide[:, ::2]).tokens, draw(wide[:, ::2].contiguous()).tokens)
    nothing = draw(wide[:0], sample_index=INDEX[:0], position=POSITION[:0])
    assert [len(x) for x in nothing] == [0, 0, 0]


def test_offsets_past_31_bits(interpreter: None) -> None:
    # Row 2 begins 2^31 + 200 elements into the storage; its pages are never touched but there.
    stride = 2**30 + 100
    storage = torch.empty(2 * stride + 100, dtype=torch.float16)
    far = storage.as_strided((3, 100), (stride, 1))
    far.copy_(torch.randn(3, 100))
    keys = {"sample_index": INDEX[:3], "position": POSITION[:3]}
    for a, b in zip(draw(far, **keys), draw(far.contiguous(), **keys), strict=True):
        assert torch.equal(a, b)


def test_repeats_bit_for_bit_and_compiles(interpreter: None) -> None:
    logits = torch.randn(4, 150)
    compiled = torch.compile(draw, backend="aot_eager", fullgraph=True)
    for a, b, c in zip(draw(logits), draw(logits), compiled(logits), strict=True):
        assert torch.equal(a, b)
        assert torch.equal(a, c)


@pytest.mark.gpu
@pytest.mark.parametrize("num_columns", [50304, 17, 151936])
@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16])
def test_on_a_gpu(num_columns: int, dtype: torch.dtype, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.undo()
    logits = (3 * torch.randn(64, num_columns)).to(dtype)
    keys = {"sample_index": torch.arange(64), "position": torch.arange(64)}
    on_cpu = draw(logits, **keys)
    on_gpu = logits.cuda()
    keys = {name: x.cuda() for name, x in keys.items()}
    draw(on_gpu, **keys)
    torch.cuda.synchronize()
    graph = torch.cuda.CUDAGraph()
    with torch.cuda.graph(graph):
        result = draw(on_gpu, **keys)
    for _ in range(3):
        graph.replay()
        assert largest_difference(result.logsumexp.cpu(), on_cpu.logsumexp) < 1e-5
        # The logarithms differ in their last bits: a near tie may fall the other way.
        assert (result.tokens.cpu() == on_cpu.tokens).sum() >= 63
        exact = exact_logprobs(logits).gather(1, result.tokens.cpu()[:, None])[:, 0]
        assert largest_difference(result.logprobs.cpu(), exact) < 5e-5
