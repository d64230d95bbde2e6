"""Sampling from vocabulary shards on gloo ranks gives what one rank gives."""

import pytest
import torch
import torch.distributed as dist

from models.vocab_parallel import vocab_parallel_sample
from tests.ranks import run_ranks

TP = 2
OPTIONS = [
    {"temperature": 1.0},
    {"temperature": 0.7, "num_valid_vocab": 40},  # the last shard is padding alone
    {"temperature": 0.0},
    {"temperature": 1.0, "top_k": 5},
    {"temperature": 1.0, "top_p": 0.8, "num_valid_vocab": 95},
]


def sample_shard(rank: int, tp: int, group: dist.ProcessGroup | None) -> list[dict]:
    """The samples of every option from one rank's columns."""
    logits = 3 * torch.randn(8, 96, generator=torch.Generator().manual_seed(0))
    key = {"seed": 7, "sample_index": torch.arange(8), "position": torch.arange(8) % 3}
    shard = logits.chunk(tp, dim=1)[rank]
    return [
        vocab_parallel_sample(shard, group=group, **key, **options)._asdict() for options in OPTIONS
    ]


def sample_on_rank() -> list[dict]:
    return sample_shard(dist.get_rank(), TP, dist.group.WORLD)


def test_ranks_draw_what_one_rank_draws() -> None:
    ranks = run_ranks(sample_on_rank, TP)
    for alone, *on_ranks in zip(sample_shard(0, 1, None), *ranks, strict=True):
        assert torch.equal(on_ranks[0]["tokens"], alone["tokens"])
        for name, want in alone.items():
            assert all(torch.equal(x[name], on_ranks[0][name]) for x in on_ranks)
            assert (on_ranks[0][name] - want).abs().max() < 2e-6


def sample_from_uneven_shards() -> str:
    key = {"seed": 0, "sample_index": torch.arange(2), "position": torch.arange(2)}
    with pytest.raises(ValueError, match="multiple of 8") as caught:
        vocab_parallel_sample(torch.zeros(2, 20), group=dist.group.WORLD, temperature=1.0, **key)
    return str(caught.value)


def test_shards_that_would_cut_a_group_are_refused_on_every_rank() -> None:
    for message in run_ranks(sample_from_uneven_shards, TP):
        assert "a rank of 2 holds 20 columns" in message


def test_values_out_of_range_are_named() -> None:
    key = {"seed": 0, "sample_index": torch.arange(2), "position": torch.arange(2)}
    with pytest.raises(ValueError, match="top_p"):
        vocab_parallel_sample(torch.zeros(2, 4), group=None, temperature=1.0, top_p=2.0, **key)
