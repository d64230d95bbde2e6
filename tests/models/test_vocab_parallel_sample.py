"""Sampling from vocabulary shards on gloo ranks gives what one rank gives."""

from pathlib import Path

import pytest
import torch
import torch.distributed as dist
import torch.multiprocessing as mp

from models.vocab_parallel import vocab_parallel_sample

OPTIONS = [
    {"temperature": 1.0},
    {"temperature": 0.7, "num_valid_vocab": 60},  # the last shard is padding alone
    {"temperature": 0.0},
    {"temperature": 1.0, "top_k": 5},
    {"temperature": 1.0, "top_p": 0.8, "num_valid_vocab": 95},
]
TP = 3


def sample_on(rank: int, tp: int, group: dist.ProcessGroup | None) -> list:
    logits = 3 * torch.randn(8, 96, generator=torch.Generator().manual_seed(0))
    key = {"seed": 7, "sample_index": torch.arange(8), "position": torch.arange(8) % 3}
    shard = logits.chunk(tp, dim=1)[rank]
    return [vocab_parallel_sample(shard, group=group, **key, **options) for options in OPTIONS]


def run_rank(rank: int, folder: str) -> None:
    dist.init_process_group("gloo", init_method=f"file://{folder}/ranks", rank=rank, world_size=TP)
    torch.save([tuple(x) for x in sample_on(rank, TP, dist.group.WORLD)], f"{folder}/{rank}.pt")
    dist.destroy_process_group()


def test_ranks_draw_what_one_rank_draws(tmp_path: Path) -> None:
    mp.spawn(run_rank, (str(tmp_path),), nprocs=TP)
    ranks = [torch.load(tmp_path / f"{rank}.pt") for rank in range(TP)]
    for i, alone in enumerate(sample_on(0, 1, None)):
        for name, x, *on_ranks in zip(alone._fields, alone, *(rank[i] for rank in ranks),
                                      strict=True):  # fmt: skip
            assert all(torch.equal(y, on_ranks[0]) for y in on_ranks), "the ranks disagree"
            tolerance = 0 if name == "tokens" else 2e-6
            assert (x - on_ranks[0]).abs().max() <= tolerance


def test_values_out_of_range_are_named() -> None:
    key = {"sample_index": torch.arange(2), "position": torch.arange(2)}
    with pytest.raises(ValueError, match="top_p"):
        vocab_parallel_sample(
            torch.zeros(2, 4), group=None, temperature=1.0, top_p=2.0, seed=0, **key
        )
