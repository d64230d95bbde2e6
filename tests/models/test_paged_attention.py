import math

import pytest
import torch

from models.attention import packed_attention
from models.packed_sequences import PackedSequences
from models.paged_attention import PagedCache, PagedSequences

HEADS, DIM, BLOCK = 2, 8, 4


def causal(query, key, value, scale, window=None):
    """Plain attention of one sequence in fp64."""
    q, k, v = (x.double().transpose(0, 1) for x in (query, key, value))
    k, v = (x.repeat_interleave(len(q) // len(x), 0) for x in (k, v))
    scores = scale * q @ k.transpose(1, 2)
    ahead = k.shape[1] - q.shape[1]
    hidden = torch.ones(scores.shape[1:], dtype=torch.bool).triu(ahead + 1)
    if window is not None:
        hidden |= torch.ones_like(hidden).tril(ahead - window)
    return (scores.masked_fill(hidden, -torch.inf).softmax(-1) @ v).transpose(0, 1)


@pytest.mark.parametrize("query_lengths", [(3, 1, 5), (7, 2, 9), (1, 1, 1)])
def test_queries_are_the_last_tokens_of_their_sequences(query_lengths):
    torch.manual_seed(0)
    key_lengths = (7, 2, 9)
    sequences = PackedSequences.of(
        torch.tensor([0, *query_lengths]).cumsum(0).int(), max(query_lengths)
    )
    sequences.cu_seqlens_kv = torch.tensor([0, *key_lengths]).cumsum(0).int()
    sequences.max_seqlen_kv = max(key_lengths)
    query = torch.randn(sum(query_lengths), HEADS, DIM)
    key, value = torch.randn(2, sum(key_lengths), HEADS, DIM)
    out = packed_attention(query, key, value, sequences, 0.3)
    expected = torch.cat(
        [
            causal(q, k, v, 0.3)
            for q, k, v in zip(
                query.split(query_lengths),
                key.split(key_lengths),
                value.split(key_lengths),
                strict=True,
            )
        ]
    )
    assert (out - expected).abs().max() < 1e-5


@pytest.mark.parametrize(("group", "window"), [(1, None), (3, None), (1, 4), (3, 4)])
def test_a_step_of_decoding_rows_and_chunks_attends_to_all_tokens_so_far(group, window):
    torch.manual_seed(0)
    shape = (8, BLOCK, HEADS, DIM)
    lanes = [torch.empty(4 * math.prod(shape), dtype=torch.uint8) for _ in range(2)]
    cache = PagedCache([5], shape, blocks_per_sequence=3, dtype=torch.float32, lanes=lanes)
    blocks = {"decoding": [6, 1], "continued": [3, 0, 7], "new": [2]}
    old = {"decoding": 5, "continued": 6, "new": 0}
    new = {"decoding": 1, "continued": 4, "new": 3}
    keys, values = cache.layer(5)
    every = {}
    for name, held in blocks.items():
        every[name] = torch.randn(2 + group, old[name] + new[name], HEADS, DIM)  # key, value, query
        for token in range(old[name]):
            keys[held[token // BLOCK], token % BLOCK] = every[name][0, token]
            values[held[token // BLOCK], token % BLOCK] = every[name][1, token]

    def queries(drawn: torch.Tensor) -> torch.Tensor:
        """[T, group x HEADS, DIM], the heads of a group side by side."""
        return drawn[2:].permute(1, 2, 0, 3).flatten(1, 2)

    def slots(name: str, start: int) -> list[int]:
        tokens = range(start, old[name] + new[name])
        return [blocks[name][t // BLOCK] * BLOCK + t % BLOCK for t in tokens]

    prompts = PackedSequences.of(torch.tensor([0, 4, 7], dtype=torch.int32), 4)
    prompts.cu_seqlens_kv, prompts.max_seqlen_kv = torch.tensor([0, 10, 13], dtype=torch.int32), 10
    order = ("decoding", "continued", "new")
    paged = PagedSequences(
        cache=cache,
        # An idle row after the decoding one.
        slots=torch.tensor([*slots("decoding", 5), -1, *slots("continued", 6), *slots("new", 0)]),
        block_tables=torch.tensor([[6, 1, 0], [0, 0, 0]], dtype=torch.int32),
        context_lengths=torch.tensor([6, 0], dtype=torch.int32),
        prompts=prompts,
        prompt_slots=torch.tensor(slots("continued", 0) + slots("new", 0)),
    )
    fresh = [every[name][:, old[name] :] for name in order]
    idle = torch.randn(2 + group, 1, HEADS, DIM)
    row = torch.cat([fresh[0], idle, *fresh[1:]], 1)
    out = paged.attend(5, queries(row), row[0], row[1], 0.3, window)
    expected = [
        causal(queries(every[n])[old[n] :], every[n][0], every[n][1], 0.3, window) for n in order
    ]
    assert (out[:1] - expected[0]).abs().max() < 1e-5
    assert (out[1] == 0).all()
    assert (out[2:] - torch.cat(expected[1:])).abs().max() < 1e-5
    assert torch.equal(keys[7, 0], every["continued"][0, 8])
    assert (keys[4:6] == 0).all()  # blocks of nobody
    # Another layer's window over the same step.
    wider = paged.attend(5, queries(row), row[0], row[1], 0.3, 5)
    expected = [causal(queries(every[n])[old[n] :], *every[n][:2], 0.3, 5) for n in order]
    assert (wider[:1] - expected[0]).abs().max() < 1e-5
    assert (wider[2:] - torch.cat(expected[1:])).abs().max() < 1e-5
