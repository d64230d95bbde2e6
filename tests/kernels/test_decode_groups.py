"""What decode attention reads in place on the CPU, what it gathers, and that both are right."""

import pytest
import torch
from torch import Tensor
from torch.utils._python_dispatch import TorchDispatchMode

from kernels.decode_attention import decode_attention
from kernels.decode_groups import Gather, View, decode_groups
from tests.kernels.oracle import largest_difference

HEADS, DIM, BLOCK_SIZE = 3, 20, 8
RUN = 5  # blocks of an extent


class Calls(TorchDispatchMode):
    """Names the operations that run."""

    def __init__(self) -> None:
        super().__init__()
        self.names: list[str] = []

    def __torch_dispatch__(self, function, types, args=(), kwargs=None):
        self.names.append(function.overloadpacket.__name__)
        return function(*args, **(kwargs or {}))


def batch(
    starts: list[int],
    lengths: list[int],
    num_blocks: int = 40,
    dtype: torch.dtype = torch.float32,
    group: int = 1,
) -> tuple[Tensor, ...]:
    """query, k_cache, v_cache, block_tables of runs from the blocks `starts` on, lengths."""
    torch.manual_seed(0)
    cache = torch.randn(2, num_blocks, BLOCK_SIZE, HEADS, DIM).to(dtype)
    tables = torch.tensor(starts, dtype=torch.int32)[:, None] + torch.arange(RUN, dtype=torch.int32)
    query = torch.randn(len(starts), group * HEADS, DIM).to(dtype)
    return query, *cache.unbind(), tables, torch.tensor(lengths, dtype=torch.int32)


def groups_of(inputs: tuple[Tensor, ...], window: int | None = None) -> list[View | Gather]:
    _, k_cache, _, tables, lengths = inputs
    return decode_groups(k_cache, tables, lengths, window).groups


def check(inputs: tuple[Tensor, ...], tolerance: float = 2e-6, window: int | None = None) -> None:
    """Compare with fp64, one sequence at a time."""
    query, k_cache, v_cache, tables, lengths = inputs
    out = decode_attention(*inputs, scale=0.3, window=window)
    for b, length in enumerate(lengths.tolist()):
        if length == 0:
            assert (out[b] == 0).all()
            continue
        blocks = tables[b, : -(-length // BLOCK_SIZE)].long()
        seen = slice(0 if window is None else max(0, length - window), length)
        keys, values = (
            x[blocks].flatten(0, 1)[seen].double().repeat_interleave(query.shape[1] // HEADS, 1)
            for x in (k_cache, v_cache)
        )
        weights = (torch.einsum("hd,nhd->hn", query[b].double(), keys) * 0.3).softmax(1)
        exact = torch.einsum("hn,nhd->hd", weights, values)
        assert largest_difference(out[b], exact) <= tolerance * max(1.0, float(values.abs().max()))


def test_runs_of_one_length_are_one_view_and_nothing_is_copied():
    inputs = batch([5, 10, 15, 20], [33] * 4)
    (view,) = groups_of(inputs)
    assert isinstance(view, View)
    assert (view.num_rows, view.length, view.bias) == (4, 33, None)
    for cache in inputs[1:3]:
        rows = view.of(cache)
        assert rows.untyped_storage().data_ptr() == cache.untyped_storage().data_ptr()
        assert torch.equal(rows[2, :, 7], cache[15, 7])
    with Calls() as calls:
        decode_attention(*inputs, scale=0.3)
    assert not {"index_select", "index", "cat", "clone", "copy_"} & set(calls.names)
    assert sum("attention" in name for name in calls.names) == 1
    check(inputs)


@pytest.mark.parametrize(("dtype", "tolerance"), [(torch.float32, 2e-6), (torch.bfloat16, 1.6e-2)])
def test_like_lengths_share_a_view_and_unlike_ones_do_not(dtype, tolerance, monkeypatch):
    monkeypatch.setattr("kernels.decode_groups._CALL_TOKENS", 6)
    inputs = batch([0, 5, 10, 15, 20], [33, 32, 34, 9, 10], dtype=dtype)
    first, second = groups_of(inputs)
    assert (first.num_rows, first.length) == (3, 34)  # 1 + 2 tokens in vain
    assert first.bias[:, 0, 0].isinf().sum(1).tolist() == [1, 2, 0]
    assert (second.num_rows, second.length) == (2, 10)
    check(inputs, tolerance)


def test_rows_in_any_order_with_idle_ones_and_scattered_ones_between():
    inputs = batch([20, 0, 10, 30, 5], [12, 40, 17, 0, 40])
    inputs[3][2] = torch.tensor([36, 31, 38, 2, 3])
    groups = groups_of(inputs)
    assert [type(group) for group in groups] == [View, View, Gather]
    assert [group.num_rows for group in groups] == [2, 1, 1]
    check(inputs)


def test_a_gap_parts_views():
    assert [g.num_rows for g in groups_of(batch([0, 5, 15, 20], [20] * 4))] == [2, 2]
    # Distances that are equal, whatever they are, do not.
    assert [g.num_rows for g in groups_of(batch([0, 7, 14, 21], [20] * 4))] == [4]


def test_blocks_that_are_no_run_are_gathered():
    inputs = batch([0, 5, 10], [33] * 3)
    inputs[3][:] = inputs[3].flip(1)
    assert [type(group) for group in groups_of(inputs)] == [Gather]
    check(inputs)
    inputs = batch([0, 5, 10], [33] * 3)
    inputs[3][1, 0] = 30  # a prompt's first block is another's
    assert [type(group) for group in groups_of(inputs)] == [View, Gather]
    check(inputs)


def test_entries_beyond_the_context_do_not_matter():
    inputs = batch([0, 5, 10], [16, 16, 16])
    inputs[3][:, 2:] = 0
    (view,) = groups_of(inputs)
    assert (view.num_rows, view.length) == (3, 16)


@pytest.mark.parametrize(
    ("starts", "lengths", "num_blocks"),
    [
        ([0, 1, 2], [16, 8, 8], 40),  # the first reaches over the second
        ([0, 1], [16, 8], 40),
        ([0, 5, 8], [40, 24, 40], 40),  # the second would reach over the third
        ([0, 5, 8], [40, 24, 0], 8),  # beyond the cache
        ([3, 3], [30, 30], 40),  # the same blocks
    ],
)
def test_no_view_reaches_into_the_next_run_or_beyond_the_cache(starts, lengths, num_blocks):
    inputs = batch(starts, lengths, num_blocks)
    ends = {s: s * BLOCK_SIZE + n for s, n in zip(starts, lengths, strict=True) if n}
    for view in groups_of(inputs):
        last = view.start + (view.num_rows - 1) * view.stride
        assert last + view.length == ends[last // BLOCK_SIZE]
    check(inputs)


def test_a_group_reads_its_keys_in_place_and_once():
    inputs = batch([5, 10, 15, 20], [33] * 4, group=4)
    with Calls() as calls:
        decode_attention(*inputs, scale=0.3)
    # torch's attention of one call; no key is repeated for the queries that share it.
    assert not {"index_select", "index", "cat", "clone", "copy_", "repeat_interleave"} & set(
        calls.names
    )
    assert sum("attention" in name for name in calls.names) == 1
    check(inputs)


def test_blocks_before_the_window_are_not_read():
    inputs = batch([0, 5, 10, 15], [33, 34, 35, 35], group=2)
    (view,) = groups_of(inputs, window=12)  # from tokens 21 to 23 on: past two blocks
    assert (view.num_rows, view.start, view.length) == (4, 2 * BLOCK_SIZE, 35 - 2 * BLOCK_SIZE)
    assert (view.bias == 0).sum(-1).flatten().tolist() == [12] * 4
    check(inputs, window=12)
    # A window of exactly the blocks that are left needs no mask.
    (view,) = groups_of(batch([0, 5], [32, 32]), window=16)
    assert (view.start, view.length, view.bias) == (16, 16, None)


@pytest.mark.parametrize("window", [1, 8, 9, 20, 39, 40])
def test_windows_over_runs_and_scattered_blocks_are_right(window: int):
    inputs = batch([20, 0, 10, 30, 5], [12, 40, 17, 0, 40], group=3)
    inputs[3][2] = torch.tensor([36, 31, 38, 2, 3])
    inputs[3][4] = torch.tensor([7, 26, 27, 28, 29])  # a run behind its first block
    gathered = [g.num_rows for g in groups_of(inputs, window) if isinstance(g, Gather)]
    assert sum(gathered) == (window > 1) + (window > 32)  # a window of one block is a run
    check(inputs, window=window)


def test_a_nan_stays_in_its_run():
    query, k_cache, v_cache, tables, lengths = batch([0, 5, 10, 15], [38, 40, 39, 36])
    k_cache[5, 2], v_cache[15, 1] = torch.nan, torch.nan
    out = decode_attention(query, k_cache, v_cache, tables, lengths, scale=0.3)
    assert out.isnan().flatten(1).any(1).tolist() == [False, True, False, True]


def test_a_cache_may_begin_anywhere_in_its_memory():
    query, k_cache, v_cache, tables, lengths = batch([0, 5, 10], [33, 33, 33])
    memory = torch.randn(2 * k_cache.numel() + 7)
    keys = memory[7 : 7 + k_cache.numel()].view(k_cache.shape)
    values = memory[7 + k_cache.numel() :].view(v_cache.shape)
    check((query, keys, values, tables, lengths))
