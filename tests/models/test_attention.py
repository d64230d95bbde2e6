import importlib
from types import SimpleNamespace
from typing import Any

import pytest
import torch
from megatron.core.transformer.enums import AttnMaskType
from torch import Tensor
from torch._subclasses.fake_tensor import FakeTensorMode

from engine.ranks.device import make_deterministic
from models import attention, prefixes
from models.attention import (
    _cudnn_attention,
    _suits_cudnn,
    attention_backend,
    packed_attention,
)
from models.form import Form
from models.layers import LayerConfig
from models.packed_sequences import PackedSequences
from models.prefixes import Prefixes

TORCH = "torch varlen (FlashAttention 2), cuDNN for equal lengths"
SCALE = 0.4
EVEN = (7, 8, 6)  # little padding: one call where calls are dear
UNEVEN = (1, 29, 2, 3, 1)  # go one by one
EMPTY = (4, 0, 5)


def packed(lengths: tuple[int, ...]) -> PackedSequences:
    bounds = torch.tensor([0, *lengths]).cumsum(0).int()
    return PackedSequences.of(bounds, max(lengths))


def draw(num_tokens: int, seed: int = 0, group: int = 1) -> tuple[Tensor, Tensor, Tensor]:
    """query of 3 x group heads, key and value of 3."""
    generator = torch.Generator().manual_seed(seed)
    return tuple(
        torch.randn(num_tokens, heads, 8, generator=generator, requires_grad=True)
        for heads in (3 * group, 3, 3)
    )


def naive(
    query: Tensor,
    key: Tensor,
    value: Tensor,
    cu_queries: Tensor,
    cu_keys: Tensor,
    window: int | None = None,
) -> Tensor:
    """The formula over the whole row: a softmax of what a token may see, in fp64."""
    shared_by = torch.arange(query.shape[1]) // (query.shape[1] // key.shape[1])
    key, value = key[:, shared_by], value[:, shared_by]
    num_queries, num_keys = len(query), len(key)
    query_ids = torch.bucketize(torch.arange(num_queries), cu_queries[1:], right=True)
    key_ids = torch.bucketize(torch.arange(num_keys), cu_keys[1:], right=True)
    # Places count from the end of a sequence, whose last query is its last key.
    query_place = torch.arange(num_queries) - cu_queries[1:][query_ids]
    key_place = torch.arange(num_keys) - cu_keys[1:][key_ids]
    sees = (query_ids[:, None] == key_ids) & (key_place <= query_place[:, None])
    if window is not None:
        sees &= key_place > query_place[:, None] - window
    logits = SCALE * torch.einsum("qhd,khd->hqk", query.double(), key.double())
    weights = logits.masked_fill(~sees, -torch.inf).softmax(-1)
    return torch.einsum("hqk,khd->qhd", weights, value.double()).float()


@pytest.mark.parametrize("lengths", [EVEN, UNEVEN, EMPTY, (5,), (1, 1, 1)])
def test_attention_is_the_naive_one(lengths: tuple[int, ...]):
    sequences = packed(lengths)
    inputs = draw(sum(lengths))
    out = packed_attention(*inputs, sequences, SCALE)
    expected = naive(*inputs, sequences.cu_seqlens_q, sequences.cu_seqlens_q)
    torch.testing.assert_close(out, expected, rtol=1e-5, atol=1e-6)
    weight = torch.randn(out.shape, generator=torch.Generator().manual_seed(1))
    found = torch.autograd.grad((out * weight).sum(), inputs)
    reference = torch.autograd.grad((expected * weight).sum(), inputs)
    for ours, theirs in zip(found, reference, strict=True):
        torch.testing.assert_close(ours, theirs, rtol=1e-4, atol=1e-5)


@pytest.mark.parametrize("window", [None, 1, 3, 7, 30])
@pytest.mark.parametrize("group", [1, 2, 7])
@pytest.mark.parametrize("lengths", [EVEN, UNEVEN, EMPTY, (8, 8), (60, 50)])
def test_groups_and_windows_are_the_naive_ones(
    lengths: tuple[int, ...], group: int, window: int | None
):
    sequences = packed(lengths)
    inputs = draw(sum(lengths), group=group)
    out = packed_attention(*inputs, sequences, SCALE, window)
    expected = naive(*inputs, sequences.cu_seqlens_q, sequences.cu_seqlens_q, window)
    torch.testing.assert_close(out, expected, rtol=1e-5, atol=2e-6)
    weight = torch.randn(out.shape, generator=torch.Generator().manual_seed(1))
    found = torch.autograd.grad((out * weight).sum(), inputs)
    reference = torch.autograd.grad((expected * weight).sum(), inputs)
    for ours, theirs in zip(found, reference, strict=True):
        torch.testing.assert_close(ours, theirs, rtol=1e-4, atol=1e-5)


def test_a_window_longer_than_all_sequences_changes_no_bit():
    for lengths in (EVEN, UNEVEN):
        inputs = draw(sum(lengths), group=2)
        whole = packed_attention(*inputs, packed(lengths), SCALE)
        wide = packed_attention(*inputs, packed(lengths), SCALE, max(lengths))
        assert torch.equal(wide, whole)


@pytest.mark.parametrize("group", [1, 4])
def test_a_layer_sees_through_its_own_window(group: int):
    inputs, sequences = draw(sum(UNEVEN), group=group), packed(UNEVEN)
    for form, windows in (
        (Form(), [None, None]),
        (Form(window=4), [4, 4]),
        (Form(window=4, windowed_layers="every second"), [None, 4]),
    ):
        dimensions = {"num_layers": 2, "hidden_size": 24, "num_attention_heads": 3}
        config = LayerConfig(**dimensions, kv_channels=8, form=form)
        for number, window in enumerate(windows, start=1):
            layer = attention.PackedAttention(config, number, AttnMaskType.causal, "self", SCALE)
            expected = packed_attention(*inputs, sequences, SCALE, window)
            assert torch.equal(layer(*inputs, packed_seq_params=sequences), expected.flatten(1))


def test_padded_attention_matches_sequences_one_by_one():
    inputs = draw(sum(EVEN))
    padded = attention._padded_attention(*inputs, packed(EVEN), SCALE, None)
    torch.testing.assert_close(
        padded, packed_attention(*inputs, packed(EVEN), SCALE), rtol=1e-5, atol=1e-6
    )


def test_equal_sequences_take_one_call_and_others_take_theirs(monkeypatch):
    calls = []
    plain = torch.nn.functional.scaled_dot_product_attention

    def count(*arguments, **named):
        calls.append(arguments[0].shape)
        return plain(*arguments, **named)

    monkeypatch.setattr(torch.nn.functional, "scaled_dot_product_attention", count)
    packed_attention(*draw(24), packed((8, 8, 8)), SCALE)
    assert calls == [(3, 3, 8, 8)]  # [sequences, heads, longest, dim]
    calls.clear()
    packed_attention(*draw(sum(EVEN)), packed(EVEN), SCALE)
    assert calls == [(3, 3, 8, 8)]  # short ones of like lengths are padded
    for lengths in ((60, 50), UNEVEN):
        calls.clear()
        packed_attention(*draw(sum(lengths)), packed(lengths), SCALE)
        assert [shape[2] for shape in calls] == list(lengths)
        assert {len(shape) for shape in calls} == {4}  # or torch computes the matrix of scores


def test_a_sequence_says_the_same_alone_and_packed():
    inputs = draw(sum(EVEN))
    together = packed_attention(*inputs, packed(EVEN), SCALE)
    for part in range(3):
        alone = [x.split(EVEN)[part] for x in inputs]
        out = packed_attention(*alone, packed((EVEN[part],)), SCALE)
        torch.testing.assert_close(out, together.split(EVEN)[part], rtol=1e-5, atol=1e-6)


@pytest.mark.parametrize(("group", "window"), [(1, None), (2, None), (1, 3), (2, 3), (2, 8)])
def test_queries_are_the_last_tokens_where_there_are_more_keys(group: int, window: int | None):
    num_queries, num_keys = (2, 4, 1), (6, 4, 9)
    sequences = packed(num_queries)
    sequences.cu_seqlens_kv = torch.tensor([0, *num_keys]).cumsum(0).int()
    sequences.max_seqlen_kv = max(num_keys)
    query, _, _ = draw(sum(num_queries), group=group)
    _, key, value = draw(sum(num_keys), seed=1)
    out = packed_attention(query, key, value, sequences, SCALE, window)
    expected = naive(query, key, value, sequences.cu_seqlens_q, sequences.cu_seqlens_kv, window)
    torch.testing.assert_close(out, expected, rtol=1e-5, atol=1e-6)


def test_nothing_is_seen_of_what_comes_later_or_is_of_others():
    query, key, value = draw(sum(EVEN))
    before = packed_attention(query, key, value, packed(EVEN), SCALE)
    with torch.no_grad():
        key[10:] += 5  # from the fourth token of the second sequence on
        value[10:] -= 5
    after = packed_attention(query, key, value, packed(EVEN), SCALE)
    assert torch.equal(before[:10], after[:10])
    assert not torch.isclose(before[10:15], after[10:15]).any()


def packages(monkeypatch: pytest.MonkeyPatch, found: dict[str, Any]) -> None:
    """Have these modules import so, or raise so, and no other."""

    def import_module(name: str) -> Any:
        module = found.get(name, ModuleNotFoundError(f"No module named {name!r}", name=name))
        if isinstance(module, Exception):
            raise module
        return module

    monkeypatch.setattr(importlib, "import_module", import_module)


def test_the_newest_flash_attention_that_is_installed_is_taken(monkeypatch):
    old, new = SimpleNamespace(flash_attn_varlen_func=2), SimpleNamespace(flash_attn_varlen_func=4)
    packages(monkeypatch, {})
    assert attention._find_flash_attention() == (TORCH, None)
    packages(monkeypatch, {"flash_attn": old})
    assert attention._find_flash_attention() == ("flash-attn 2", 2)
    packages(monkeypatch, {"flash_attn": old, "flash_attn.cute": new})
    assert attention._find_flash_attention() == ("flash-attn 4", 4)


@pytest.mark.parametrize(
    "error",
    [
        ImportError("undefined symbol"),
        ModuleNotFoundError("No module named 'cutlass'", name="cutlass"),
        AttributeError("module 'cutlass.cute' has no attribute 'Pointer'"),
        TypeError("unexpected keyword"),
        RuntimeError("no CUDA driver"),
    ],
    ids=lambda error: type(error).__name__,
)
def test_a_flash_attention_that_does_not_import_is_named(error: Exception, monkeypatch):
    packages(monkeypatch, {"flash_attn.cute": error})
    name, function = attention._find_flash_attention()
    assert function is None
    said = f"flash-attn 4 does not import: {type(error).__name__}: {error}"
    assert name == f"{TORCH}; {said}"


def test_the_backend_is_that_of_the_device_and_the_dtype(monkeypatch):
    monkeypatch.setattr(attention, "_flash_attention", "flash-attn 4")
    assert attention_backend(torch.device("cuda", 1), torch.bfloat16) == "flash-attn 4"
    assert attention_backend(torch.device("cuda", 1), torch.float32) == "torch SDPA"
    assert attention_backend(torch.device("cpu"), torch.bfloat16) == "torch SDPA"


@pytest.mark.skipif(torch.cuda.is_available(), reason="a GPU runs it")
@pytest.mark.parametrize(("heads", "window"), [(3, None), (1, None), (3, 2), (1, 2)])
def test_torch_takes_our_call_of_its_flash_attention(heads, window, monkeypatch):
    monkeypatch.setattr(attention, "_flash_attn_varlen", None)
    with FakeTensorMode(), torch.no_grad():  # shapes on a GPU that is not there
        query, key = (
            torch.empty(sum(EMPTY), n, 64, device="cuda:0", dtype=torch.bfloat16)
            for n in (3, heads)
        )
        bounds = torch.empty(len(EMPTY) + 1, device="cuda:0", dtype=torch.int32)
        out = packed_attention(query, key, key, PackedSequences.of(bounds, 5), SCALE, window)
    assert (out.shape, out.dtype, out.device.type) == (query.shape, query.dtype, "cuda")


@pytest.mark.skipif(torch.cuda.is_available(), reason="a GPU runs it")
def test_torchs_flash_attention_takes_prefixes_and_asks_the_device_for_nothing(monkeypatch):
    monkeypatch.setattr(attention, "_flash_attn_varlen", None)
    real, whole, _ = shared_and_whole()
    assert real.keys is not None
    num_keys, num_tokens = real.keys.prefixes.num_keys, int(real.cu_seqlens_q[-1])
    with FakeTensorMode(), torch.no_grad():  # numbers of a tensor that is not there are an error
        query, key = (
            torch.empty(num_tokens, n, 64, device="cuda:0", dtype=torch.bfloat16) for n in (3, 1)
        )
        bounds, lengths = (
            torch.empty(len(real.cu_seqlens_q) - n, device="cuda:0", dtype=torch.int32)
            for n in (0, 1)
        )
        there = Prefixes(starts=lengths, lengths=lengths, num_keys=num_keys)
        sequences = PackedSequences.of(bounds, whole.max_seqlen_q, None, there)
        assert sequences.keys is not None and len(sequences.keys.index) == num_keys
        out = packed_attention(query, key, key, sequences, SCALE)
    assert (out.shape, out.dtype, out.device.type) == (query.shape, query.dtype, "cuda")


def test_flash_attention_is_told_of_a_window_that_hides_something(monkeypatch):
    calls = []

    def flash(query: Tensor, key: Tensor, value: Tensor, **named: Any) -> Tensor:
        calls.append(named)
        return query

    monkeypatch.setattr(attention, "_takes_flash", lambda device, dtype: True)
    monkeypatch.setattr(attention, "_flash_attn_varlen", flash)
    for window in (None, 1, 6, 8):
        packed_attention(*draw(sum(EVEN)), packed(EVEN), SCALE, window)
    assert [call.get("window_size") for call in calls] == [None, (0, 0), (5, 0), None]
    assert all(call["causal"] for call in calls)


@pytest.mark.parametrize("window", [None, 100])
def test_cudnn_is_not_asked_for_a_window(window: int | None, monkeypatch):
    calls = []
    monkeypatch.setattr(attention, "_takes_flash", lambda device, dtype: True)
    monkeypatch.setattr(attention, "_flash_attn_varlen", None)
    for name in ("_cudnn_attention", "_varlen_attention"):
        monkeypatch.setattr(attention, name, lambda *_, name=name: calls.append(name))
    packed_attention(*draw(256), packed((128, 128)), SCALE, window)
    assert calls == ["_cudnn_attention" if window is None else "_varlen_attention"]


@pytest.mark.parametrize(
    ("lengths", "suits"),
    [
        ((256, 256), True),
        ((1024,), True),
        ((256, 128), False),
        ((200, 200), False),  # a plan for every length that chance makes equal
        ((256, 0), False),
    ],
)
def test_cudnn_takes_rows_of_one_round_length(lengths: tuple[int, ...], suits: bool):
    sequences = packed(lengths)
    assert _suits_cudnn(sequences, sum(lengths)) == suits
    # Queries may be the last of more keys.
    sequences.cu_seqlens_kv = sequences.cu_seqlens_q.clone()
    assert not _suits_cudnn(sequences, sum(lengths))


@pytest.mark.parametrize("heads", [3, 1])
def test_cudnn_attention_is_the_naive_one(heads: int):
    query, key, value = (torch.randn(256, n, 64) for n in (3, heads, heads))
    sequences = packed((128, 128))
    out = _cudnn_attention(query, key, value, 128, SCALE)  # on a CPU by the second choice
    expected = naive(query, key, value, sequences.cu_seqlens_q, sequences.cu_seqlens_q)
    torch.testing.assert_close(out, expected, rtol=1e-4, atol=1e-5)


GROUPS = [(5, (3, 1, 9)), (1, (1, 1)), (4, (2,)), (12, (1, 30, 2, 2))]
"""(tokens of a prefix, own tokens of the sequences that go on from it)."""


def shared_and_whole() -> tuple[PackedSequences, PackedSequences, Tensor]:
    """A row whose sequences share prefixes, one where each is whole, and [T_whole] int64: where in
    the first row the tokens of the second lie. A sequence of padding follows."""
    starts, lengths, own, copies, start = [], [], [], [], 0
    for prefix, rests in GROUPS:
        end = start + prefix
        for number, rest in enumerate(rests):
            starts.append(start)
            lengths.append(prefix if number else 0)
            own.append(rest + (0 if number else prefix))
            copies += [*range(start, start + prefix), *range(end, end + rest)]
            end += rest
        start = end
    copies += range(start, start + 3)
    cu_seqlens = torch.tensor([0, *own, 3]).cumsum(0).int()
    prefixes = Prefixes(
        starts=torch.tensor([*starts, 0]).int(),
        lengths=torch.tensor([*lengths, 0]).int(),
        num_keys=len(copies),
    )
    whole = packed((*(prefix + rest for prefix, rests in GROUPS for rest in rests), 3))
    shared = PackedSequences.of(cu_seqlens, whole.max_seqlen_q, None, prefixes)
    return shared, whole, torch.tensor(copies)


@pytest.mark.parametrize("call", [-(10**9), 10**9], ids=["one by one", "a group at once"])
@pytest.mark.parametrize("window", [None, 1, 3, 7, 30])
@pytest.mark.parametrize("group", [1, 2])
def test_sequences_that_share_a_prefix_attend_as_whole_ones(
    group: int, window: int | None, call: int, monkeypatch
):
    monkeypatch.setattr(prefixes, "_CALL", call)
    shared, whole, copies = shared_and_whole()
    inputs = [x.double() for x in draw(int(shared.cu_seqlens_q[-1]), group=group)]
    out = packed_attention(*inputs, shared, SCALE, window)
    expected = packed_attention(*(x[copies] for x in inputs), whole, SCALE, window)
    torch.testing.assert_close(out[copies], expected, rtol=0, atol=1e-13)
    # Every token's gradient is the sum over its copies.
    weight = torch.randn(expected.shape, generator=torch.Generator().manual_seed(1)).double()
    summed = torch.zeros_like(out).index_add_(0, copies, weight)
    found = torch.autograd.grad((out * summed).sum(), inputs)
    reference = torch.autograd.grad((expected * weight).sum(), inputs)
    for ours, theirs in zip(found, reference, strict=True):
        torch.testing.assert_close(ours, theirs, rtol=0, atol=1e-12)


def test_a_group_of_short_sequences_takes_one_call(monkeypatch):
    calls = []
    plain = torch.nn.functional.scaled_dot_product_attention

    def count(*arguments, **named):
        calls.append(arguments[0].shape[2])
        return plain(*arguments, **named)

    monkeypatch.setattr(torch.nn.functional, "scaled_dot_product_attention", count)
    shared, _, _ = shared_and_whole()
    inputs = draw(int(shared.cu_seqlens_q[-1]))
    packed_attention(*inputs, shared, SCALE)
    assert calls == [*(prefix + sum(rests) for prefix, rests in GROUPS), 3]
    calls.clear()
    monkeypatch.setattr(prefixes, "_CALL", -(10**9))
    shared, _, _ = shared_and_whole()
    packed_attention(*inputs, shared, SCALE)
    assert calls == shared.cu_seqlens_q.diff().tolist()


def test_flash_attention_is_given_the_keys_of_prefixes(monkeypatch):
    calls = []

    def flash(query: Tensor, key: Tensor, value: Tensor, **named: Any) -> Tensor:
        calls.append((len(query), len(key), named))
        return query

    monkeypatch.setattr(attention, "_takes_flash", lambda device, dtype: True)
    monkeypatch.setattr(attention, "_flash_attn_varlen", flash)
    monkeypatch.setattr(prefixes, "_CALL", -(10**9))
    shared, whole, copies = shared_and_whole()
    packed_attention(*draw(int(shared.cu_seqlens_q[-1])), shared, SCALE)
    ((num_queries, num_keys, named),) = calls
    assert (num_queries, num_keys) == (int(shared.cu_seqlens_q[-1]), len(copies))
    assert torch.equal(named["cu_seqlens_q"], shared.cu_seqlens_q)
    assert torch.equal(named["cu_seqlens_k"], whole.cu_seqlens_q)
    assert named["max_seqlen_k"] == whole.max_seqlen_q


@pytest.mark.gpu
@pytest.mark.parametrize("dtype", [torch.bfloat16, torch.float32])
@pytest.mark.parametrize(("group", "window"), [(1, None), (4, None), (1, 100), (4, 5)])
@pytest.mark.parametrize("lengths", [EVEN, UNEVEN, EMPTY, (700, 1, 1300), (256,) * 3, (1024,)])
def test_attention_of_a_gpu_is_the_naive_one(
    lengths: tuple[int, ...], group: int, window: int | None, dtype: torch.dtype
):
    generator = torch.Generator().manual_seed(0)
    shapes = [(sum(lengths), heads, 64) for heads in (3 * group, 3, 3)]
    exact = [torch.randn(shape, generator=generator).bfloat16().float() for shape in shapes]
    exact = [x.requires_grad_() for x in exact]
    sequences = packed(lengths)
    expected = naive(*exact, sequences.cu_seqlens_q, sequences.cu_seqlens_q, window)
    weight = torch.randn(shapes[0], generator=generator)
    reference = torch.autograd.grad((expected * weight).sum(), exact)

    inputs = [x.detach().cuda().to(dtype).requires_grad_() for x in exact]
    bounds = sequences.cu_seqlens_q.cuda()
    out = packed_attention(*inputs, PackedSequences.of(bounds, max(lengths)), SCALE, window)
    torch.testing.assert_close(out.float().cpu(), expected, rtol=2e-2, atol=2e-2)
    found = torch.autograd.grad((out * weight.cuda()).sum(), inputs)
    for ours, theirs in zip(found, reference, strict=True):
        torch.testing.assert_close(ours.float().cpu(), theirs, rtol=3e-2, atol=5e-2)


@pytest.mark.gpu
@pytest.mark.parametrize("lengths", [(2000, 1, 1500), (1024, 1024)])
@pytest.mark.parametrize(("kv_heads", "window"), [(8, None), (2, None), (2, 700)])
def test_deterministic_gradients_have_the_same_bits_every_time(
    monkeypatch, lengths, kv_heads, window
):
    monkeypatch.setenv("CUBLAS_WORKSPACE_CONFIG", ":4096:8")  # and put back after the test
    monkeypatch.setenv("NCCL_ALGO", "Ring")
    # Many blocks of keys add to a query's gradient.
    inputs = [
        torch.randn(sum(lengths), n, 64, device="cuda", dtype=torch.bfloat16, requires_grad=True)
        for n in (8, kv_heads, kv_heads)
    ]
    sequences = PackedSequences.of(torch.tensor([0, *lengths]).cumsum(0).int().cuda(), max(lengths))
    make_deterministic()
    try:
        runs = [
            torch.autograd.grad(packed_attention(*inputs, sequences, SCALE, window).sum(), inputs)
            for _ in range(5)
        ]
    finally:
        torch.use_deterministic_algorithms(False)
    assert all(torch.equal(a, b) for run in runs[1:] for a, b in zip(run, runs[0], strict=True))


@pytest.mark.gpu
@pytest.mark.parametrize("dtype", [torch.bfloat16, torch.float32])
@pytest.mark.parametrize(("group", "window"), [(1, None), (4, None), (1, 100), (4, 5)])
def test_prefixes_on_a_gpu_are_those_of_a_cpu(group: int, window: int | None, dtype: torch.dtype):
    shared, _, _ = shared_and_whole()
    num_tokens = int(shared.cu_seqlens_q[-1])
    generator = torch.Generator().manual_seed(0)
    shapes = [(num_tokens, heads, 64) for heads in (3 * group, 3, 3)]
    exact = [torch.randn(shape, generator=generator).bfloat16().float() for shape in shapes]
    exact = [x.requires_grad_() for x in exact]
    expected = packed_attention(*exact, shared, SCALE, window)
    weight = torch.randn(shapes[0], generator=generator)
    reference = torch.autograd.grad((expected * weight).sum(), exact)

    inputs = [x.detach().cuda().to(dtype).requires_grad_() for x in exact]
    assert shared.keys is not None
    prefixes = shared.keys.prefixes.moved(lambda x: x.cuda())
    there = PackedSequences.of(shared.cu_seqlens_q.cuda(), shared.max_seqlen_q, None, prefixes)
    out = packed_attention(*inputs, there, SCALE, window)
    found = torch.autograd.grad((out * weight.cuda()).sum(), inputs)
    torch.testing.assert_close(out.float().cpu(), expected, rtol=2e-2, atol=2e-2)
    for ours, theirs in zip(found, reference, strict=True):
        torch.testing.assert_close(ours.float().cpu(), theirs, rtol=3e-2, atol=5e-2)
