"""Attention of one query a sequence over a paged cache."""

import pytest
import torch
from torch import Tensor

from kernels import decode_attention as decode_module
from kernels import decode_groups as groups_module
from kernels.append_kv import append_kv
from kernels.decode_attention import decode_attention
from tests.kernels.oracle import largest_difference

HEADS, DIM, BLOCK_SIZE = 3, 20, 8
CONTEXTS = (0, 1, 8, 63, 65, 150)


@pytest.fixture(autouse=True)
def small_splits(monkeypatch: pytest.MonkeyPatch) -> None:
    """Splits of 64 tokens read 16 at a time, and CPU groups of about two sequences."""
    monkeypatch.setattr(decode_module, "SPLIT_TOKENS", 64)
    monkeypatch.setattr(decode_module, "_BLOCK_TOKENS", 16)
    monkeypatch.setattr(groups_module, "_GROUP_BYTES", 2 * 65 * HEADS * DIM * 4)


def random_cache(
    contexts: tuple[int, ...] = CONTEXTS, *, dtype: torch.dtype = torch.float32, group: int = 1
) -> tuple[Tensor, ...]:
    """query of `group` heads a key-value head, k_cache, v_cache, block_tables in shuffled order,
    context_lengths."""
    batch, max_blocks = len(contexts), -(-max(contexts) // BLOCK_SIZE) + 1
    blocks = torch.randperm(batch * max_blocks).view(batch, max_blocks).to(torch.int32)
    cache = torch.randn(2, batch * max_blocks, BLOCK_SIZE, HEADS, DIM).to(dtype)
    query = torch.randn(batch, group * HEADS, DIM).to(dtype)
    return query, *cache.unbind(), blocks, torch.tensor(contexts, dtype=torch.int32)


def exact_attention(*inputs: Tensor, scale: float, window: int | None = None) -> Tensor:
    """fp64, one sequence and one query head at a time."""
    query, k_cache, v_cache, tables, lengths = inputs
    out = torch.zeros(query.shape, dtype=torch.float64)
    group = query.shape[1] // k_cache.shape[2]
    for b, length in enumerate(lengths.tolist()):
        first = 0 if window is None else max(0, length - window)
        keys, values = (
            cache[tables[b].long()].flatten(0, 1)[first:length].double()
            for cache in (k_cache, v_cache)
        )
        for head in range(query.shape[1]):
            logits = keys[:, head // group] @ query[b, head].double() * scale
            out[b, head] = logits.softmax(0) @ values[:, head // group]
    return out


@pytest.mark.parametrize(("dtype", "tolerance"), [(torch.float32, 2e-6), (torch.bfloat16, 1.6e-2)])
def test_matches_fp64(backend: str, dtype: torch.dtype, tolerance: float) -> None:
    inputs = random_cache(dtype=dtype)
    out = decode_attention(*inputs, scale=0.3)
    exact = exact_attention(*inputs, scale=0.3)
    assert out.dtype == dtype
    assert largest_difference(out, exact) < tolerance * exact.abs().max()


@pytest.mark.parametrize("window", [None, 1, 5, 64, 100, 1000])
@pytest.mark.parametrize("group", [1, 2, 4, 7, 8])
def test_groups_and_windows_match_fp64(backend: str, group: int, window: int | None) -> None:
    inputs = random_cache(group=group)
    out = decode_attention(*inputs, scale=0.3, window=window)
    exact = exact_attention(*inputs, scale=0.3, window=window)
    assert largest_difference(out, exact) < 2e-6 * exact.abs().max()


@pytest.mark.parametrize(
    ("group", "dtype"), [(16, torch.float16), (17, torch.bfloat16), (40, torch.bfloat16)]
)  # of 32 heads at a time
def test_large_groups_in_two_bytes_match_fp64(backend: str, group: int, dtype: torch.dtype) -> None:
    inputs = random_cache(dtype=dtype, group=group)
    out = decode_attention(*inputs, scale=0.3, window=70)
    exact = exact_attention(*inputs, scale=0.3, window=70)
    assert out.dtype == dtype
    assert largest_difference(out, exact) < 1.6e-2 * exact.abs().max()


def test_idle_slots_give_zeros(backend: str) -> None:
    inputs = random_cache()
    assert (decode_attention(*inputs, scale=0.3)[0] == 0).all()
    inputs[4].zero_()
    assert (decode_attention(*inputs, scale=0.3) == 0).all()


def test_nothing_beyond_the_context_is_read(backend: str) -> None:
    query, k_cache, v_cache, tables, lengths = random_cache()
    want = decode_attention(query, k_cache, v_cache, tables, lengths, scale=0.3)
    for b, length in enumerate(lengths.tolist()):
        used = -(-length // BLOCK_SIZE)
        tables[b, used:] = 0  # not this sequence's block
        offset = length % BLOCK_SIZE
        if offset:  # the rest of its last block
            k_cache[tables[b, used - 1], offset:] = 1e4
            v_cache[tables[b, used - 1], offset:] = 1e4
    assert torch.equal(decode_attention(query, k_cache, v_cache, tables, lengths, scale=0.3), want)


@pytest.mark.parametrize("group", [1, 4])
def test_nothing_before_the_window_counts(backend: str, group: int) -> None:
    query, k_cache, v_cache, tables, lengths = random_cache(group=group)
    want = decode_attention(query, k_cache, v_cache, tables, lengths, scale=0.3, window=20)
    for b, length in enumerate(lengths.tolist()):
        for token in range(length - 20):
            k_cache[tables[b, token // BLOCK_SIZE], token % BLOCK_SIZE] = 1e4
            v_cache[tables[b, token // BLOCK_SIZE], token % BLOCK_SIZE] = 1e4
        tables[b, : max(0, length - 20) // BLOCK_SIZE] = 0  # blocks whole before it: anybody's
    out = decode_attention(query, k_cache, v_cache, tables, lengths, scale=0.3, window=20)
    assert torch.equal(out, want)


def test_a_window_as_long_as_the_context_changes_no_bit(backend: str) -> None:
    inputs = random_cache(group=2)
    whole = decode_attention(*inputs, scale=0.3)
    assert torch.equal(decode_attention(*inputs, scale=0.3, window=max(CONTEXTS)), whole)


def test_a_cache_may_have_more_than_2_31_elements(interpreter: None) -> None:
    query, k_cache, v_cache, tables, lengths = random_cache(dtype=torch.bfloat16)
    want = decode_attention(query, k_cache, v_cache, tables, lengths, scale=0.3)
    # The same blocks at the end of a cache of which the system gives only the pages in use.
    num_blocks, size = len(k_cache), BLOCK_SIZE * HEADS * DIM
    far = -(-(2**31) // size)
    large = torch.empty(2, far + num_blocks, BLOCK_SIZE, HEADS, DIM, dtype=torch.bfloat16)
    large[0, far:], large[1, far:] = k_cache, v_cache
    out = decode_attention(query, *large.unbind(), tables + far, lengths, scale=0.3)
    assert torch.equal(out, want)


@pytest.mark.parametrize("group", [1, 4])
def test_a_nan_stays_in_its_sequence(backend: str, group: int) -> None:
    query, k_cache, v_cache, tables, lengths = random_cache(group=group)
    k_cache[tables[3, 1], 2] = torch.nan
    out = decode_attention(query, k_cache, v_cache, tables, lengths, scale=0.3)
    assert out.isnan().flatten(1).any(1).tolist() == [False, False, False, True, False, False]


@pytest.mark.parametrize("group", [1, 4])
def test_extreme_logits_stay_finite(backend: str, group: int) -> None:
    inputs = random_cache(group=group)
    out = decode_attention(*inputs, scale=1e4)
    assert largest_difference(out, exact_attention(*inputs, scale=1e4)) < 1e-3


@pytest.mark.parametrize(("group", "window"), [(1, None), (4, None), (1, 70), (4, 70)])
def test_a_sequence_does_not_depend_on_its_batch(
    interpreter: None, group: int, window: int | None
) -> None:
    query, k_cache, v_cache, tables, lengths = random_cache(group=group)
    options = {"scale": 0.3, "window": window}
    whole = decode_attention(query, k_cache, v_cache, tables, lengths, **options)
    wider = torch.nn.functional.pad(tables, (0, 30))  # tables for a longer context: more splits
    for b in range(len(lengths)):
        alone = decode_attention(
            query[b : b + 1], k_cache, v_cache, wider[b : b + 1], lengths[b : b + 1], **options
        )
        assert torch.equal(alone[0], whole[b])


def test_no_sequences(backend: str) -> None:
    query, k_cache, v_cache, tables, lengths = random_cache()
    out = decode_attention(query[:0], k_cache, v_cache, tables[:0], lengths[:0], scale=1.0)
    assert out.shape == (0, HEADS, DIM)


def test_a_strided_cache_is_refused() -> None:
    query, k_cache, v_cache, tables, lengths = random_cache()
    with pytest.raises(ValueError, match="contiguous"):
        decode_attention(query, k_cache[:, ::2], v_cache, tables, lengths, scale=1.0)


def test_heads_that_are_no_groups_and_windows_of_nothing_are_refused(backend: str) -> None:
    query, k_cache, v_cache, tables, lengths = random_cache(group=2)
    with pytest.raises(ValueError, match="5 query heads must be a multiple of 3 key-value heads"):
        decode_attention(query[:, :5], k_cache, v_cache, tables, lengths, scale=1.0)
    with pytest.raises(ValueError, match="a window of 0 tokens"):
        decode_attention(query, k_cache, v_cache, tables, lengths, scale=1.0, window=0)


@pytest.mark.parametrize(("group", "window"), [(1, None), (4, 70)])
def test_repeats_bit_for_bit_and_compiles(
    interpreter: None, group: int, window: int | None
) -> None:
    query, k_cache, v_cache, tables, lengths = random_cache(group=group)
    slots = torch.tensor([5, 6, -1, 7, 8, 9])

    def step(query: Tensor, k_cache: Tensor, v_cache: Tensor) -> Tensor:
        append_kv(query[:, :HEADS], query[:, -HEADS:], k_cache, v_cache, slots)
        return decode_attention(query, k_cache, v_cache, tables, lengths, scale=0.3, window=window)

    compiled = torch.compile(step, backend="aot_eager", fullgraph=True)
    caches = [(k_cache.clone(), v_cache.clone()) for _ in range(3)]
    outs = [f(query, *c) for f, c in zip((step, step, compiled), caches, strict=True)]
    for out, cache in zip(outs[1:], caches[1:], strict=True):
        assert torch.equal(out, outs[0])
        assert torch.equal(cache[0], caches[0][0])


@pytest.mark.gpu
@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16, torch.float16])
@pytest.mark.parametrize("dim", [64, 80, 96, 128, 256])
@pytest.mark.parametrize(
    ("group", "window"), [(1, None), (1, 300), (4, None), (7, 100), (40, None)]
)
def test_on_a_gpu(
    dtype: torch.dtype, dim: int, group: int, window: int | None, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.undo()
    monkeypatch.setattr(f"{__name__}.DIM", dim)
    inputs = random_cache((1, 1024, 0, 300, 2048, 17, 256, 257), dtype=dtype, group=group)
    exact = exact_attention(*inputs, scale=dim**-0.5, window=window)
    on_gpu = [x.cuda() for x in inputs]
    slots = torch.arange(len(exact), device="cuda") + 3
    new = on_gpu[0][:, :HEADS].clone()

    def step() -> Tensor:
        append_kv(new, new, on_gpu[1].clone(), on_gpu[2].clone(), slots)
        return decode_attention(*on_gpu, scale=dim**-0.5, window=window)

    step()
    torch.cuda.synchronize()
    graph = torch.cuda.CUDAGraph()
    with torch.cuda.graph(graph):
        out = step()
    for _ in range(20):
        graph.replay()
        assert largest_difference(out.cpu(), exact) < (1e-5 if dtype == torch.float32 else 1.6e-2)
