from dataclasses import dataclass

import pytest
import torch

from models.attention import packed_attention
from models.context_parallel import ContextShare, gather_row, join_readings
from models.packed_sequences import PackedSequences
from models.prefixes import Prefixes
from tests.ranks import run_ranks

LENGTHS = (5, 17, 1, 9)  # of 32 tokens; no end of a sequence is the end of a piece
CU_SEQLENS = torch.tensor([0, *torch.tensor(LENGTHS).cumsum(0)], dtype=torch.int32)


@dataclass(frozen=True)
class Place:
    """A rank of a group that says who it is and nothing more."""

    cp: int
    place: int

    def size(self) -> int:
        return self.cp

    def rank(self) -> int:
        return self.place


def shares(cp: int) -> list[ContextShare]:
    return [ContextShare(group=Place(cp, rank), num_tokens=32) for rank in range(cp)]  # type: ignore


@pytest.mark.parametrize("cp", [1, 2, 4])
def test_ranks_hold_each_token_once_and_see_as_many_keys(cp: int):
    held = [share.held(torch.device("cpu")) for share in shares(cp)]
    assert torch.equal(torch.cat(held).sort().values, torch.arange(32))
    num_keys = [int((tokens + 1).sum()) for tokens in held]  # of one sequence as long as the row
    assert len(set(num_keys)) == 1


@pytest.mark.parametrize("window", [None, 6])
@pytest.mark.parametrize("cp", [2, 4])
def test_queries_of_a_piece_see_the_keys_of_their_sequences(cp: int, window: int | None):
    generator = torch.Generator().manual_seed(0)
    query, key, value = (torch.randn(32, n, 8, generator=generator) for n in (4, 2, 2))
    whole = PackedSequences.of(CU_SEQLENS, max(LENGTHS))
    expected = packed_attention(query, key, value, whole, 0.3, window)
    for share in shares(cp):
        sequences = PackedSequences.of(CU_SEQLENS, max(LENGTHS), share)
        for piece, (end, seen) in zip(share.pieces, sequences.pieces, strict=True):
            assert end == piece.stop
            queries = query[piece.start : piece.stop]
            found = packed_attention(queries, key[:end], value[:end], seen, 0.3, window)
            torch.testing.assert_close(found, expected[piece.start : piece.stop])
            assert seen.max_seqlen_q >= seen.cu_seqlens_q.diff().max()
            assert seen.max_seqlen_kv >= seen.cu_seqlens_kv.diff().max()


@pytest.mark.parametrize("window", [None, 6])
@pytest.mark.parametrize("cp", [2, 4])
def test_queries_of_a_piece_see_the_prefix_that_their_sequence_goes_on_from(
    cp: int, window: int | None
):
    generator = torch.Generator().manual_seed(0)
    query, key, value = (torch.randn(32, n, 8, generator=generator) for n in (4, 2, 2))
    # The 17 tokens of the second sequence and the last's 9 go on from the first's 3 first.
    prefixes = Prefixes(
        starts=torch.zeros(4, dtype=torch.int32),
        lengths=torch.tensor([0, 3, 3, 3], dtype=torch.int32),
        num_keys=41,
    )
    whole = PackedSequences.of(CU_SEQLENS, 20, None, prefixes)
    expected = packed_attention(query, key, value, whole, 0.3, window)
    for share in shares(cp):
        sequences = PackedSequences.of(CU_SEQLENS, 20, share, prefixes)
        for piece, (end, seen) in zip(share.pieces, sequences.pieces, strict=True):
            queries = query[piece.start : piece.stop]
            found = packed_attention(queries, key[:end], value[:end], seen, 0.3, window)
            torch.testing.assert_close(found, expected[piece.start : piece.stop])
            assert seen.max_seqlen_kv >= seen.cu_seqlens_kv.diff().max()


def gather_on_a_rank() -> list[torch.Tensor]:
    """Rows of (position, 10 x position) gathered, and the gradients of both ways to use them.

    Readings have the tokens in their last dimension.
    """
    share = ContextShare(group=torch.distributed.group.WORLD, num_tokens=8)
    held = share.held(torch.device("cpu")).double()
    found = []
    for gather in (gather_row, lambda x, share: join_readings(x.T, share).T):
        mine = torch.stack([held, 10 * held], 1).requires_grad_()
        row = gather(mine, share)
        weights = torch.arange(16.0, dtype=torch.float64).view(8, 2) * (share.group.rank() + 1)
        (gradient,) = torch.autograd.grad((row * weights).sum(), mine)
        found += [row.detach(), gradient]
    return found


@pytest.mark.slow  # test_layout_invariance.py stands on the same, and is not
def test_rows_are_gathered_in_order_and_gradients_go_back():
    positions = torch.arange(8.0, dtype=torch.float64)
    row = torch.stack([positions, 10 * positions], 1)
    weights = torch.arange(16.0, dtype=torch.float64).view(8, 2)
    ranks = zip(run_ranks(gather_on_a_rank, 2), ([0, 1, 6, 7], [2, 3, 4, 5]), strict=True)
    for rank, (found, held) in enumerate(ranks):
        assert torch.equal(found[0], row)
        assert torch.equal(found[1], 3 * weights[held])  # both ranks' weights, 1 and 2 times
        assert torch.equal(found[2], row)
        assert torch.equal(found[3], (rank + 1) * weights[held])
