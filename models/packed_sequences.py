"""Where the sequences of a packed row begin and end, for whatever reads the row: attention, the
head, and the ranks that share its tokens."""

import functools
from dataclasses import dataclass

import torch
from megatron.core.packed_seq_params import PackedSeqParams
from torch import Tensor

from models.context_parallel import ContextShare, join_readings
from models.prefixes import Prefixes, SequenceKeys
from models.rotary import Rotation


@dataclass(kw_only=True)
class PackedSequences(PackedSeqParams):
    """Where the sequences of a packed row begin and end; travels through megatron's layers to the
    attention."""

    qkv_format: str = "thd"
    share: ContextShare | None = None
    """The part of the row that this rank holds; none: all of it."""
    rotation: Rotation | None = None
    """Of the tokens that this rank holds; none: positions are learned."""
    keys: SequenceKeys | None = None
    """Which tokens of the row the keys are, where sequences share prefixes; none: its own."""

    @classmethod
    def of(
        cls,
        cu_seqlens: Tensor,
        max_seqlen: int,
        share: ContextShare | None = None,
        prefixes: Prefixes | None = None,
    ) -> "PackedSequences":
        """Describe sequences from cu_seqlens [B+1] int32 and the longest length, with its prefix
        (known on the host)."""
        keys = None if prefixes is None else prefixes.keys(cu_seqlens)
        return cls(
            cu_seqlens_q=cu_seqlens,
            cu_seqlens_kv=cu_seqlens if keys is None else keys.bounds,
            max_seqlen_q=max_seqlen,
            max_seqlen_kv=max_seqlen,
            share=share,
            keys=keys,
        )

    def held(self, values: Tensor) -> Tensor:
        """Return those of values [T, ...] whose tokens this rank holds: [T / cp, ...], in the order
        in which it holds them."""
        return values if self.share is None else values[self._held]

    def in_row(self, numbers: Tensor) -> Tensor:
        """Return the indices in the row of the tokens that are numbers [n] of those held."""
        return numbers if self.share is None else self._held[numbers]

    def join(self, readings: Tensor) -> Tensor:
        """Return all ranks' readings [..., T / cp] in the order of the row; the reverse of held."""
        return readings if self.share is None else join_readings(readings, self.share)

    @functools.cached_property
    def _held(self) -> Tensor:
        """[T / cp] int64, on the device of the sequences."""
        assert self.share is not None
        return self.share.held(self.cu_seqlens_q.device)

    @functools.cached_property
    def pieces(self) -> list[tuple[int, "PackedSequences"]]:
        """(end of a piece in the row, the sequences as its queries see them), for what this rank
        holds.

        Queries are the sequences' tokens within the piece, keys those up to its end: a sequence
        that began before the piece has more keys than queries, one that ended has no queries.
        """
        assert self.share is not None
        row, found = self.cu_seqlens_q, []
        for piece in self.share.pieces:
            keys = None if self.keys is None else self.keys.within(piece)
            sequences = PackedSequences(
                cu_seqlens_q=row.clamp(piece.start, piece.stop) - piece.start,
                cu_seqlens_kv=row.clamp(max=piece.stop) if keys is None else keys.bounds,
                max_seqlen_q=min(self.max_seqlen_q, len(piece)),
                max_seqlen_kv=min(self.max_seqlen_q, piece.stop),
                keys=keys,
            )
            found.append((piece.stop, sequences))
        return found

    @functools.cached_property
    def padding(self) -> tuple[Tensor, Tensor]:
        """Gather [B, L] and scatter [T] between the row and its sequences padded to length L.

        gather[b, l] is the index in the row of token l of sequence b; scatter[t] that of the row's
        token t in [B x L].

        What lies beyond a sequence's end repeats some valid token: causal attention never reads it
        for a real one.
        """
        starts, lengths = self.cu_seqlens_q[:-1].long(), self.cu_seqlens_q.diff().long()
        num_tokens = int(self.cu_seqlens_q[-1])
        columns = torch.arange(self.max_seqlen_q, device=starts.device)
        gather = (starts[:, None] + columns).clamp(max=num_tokens - 1)  # [B, L]
        owner = torch.repeat_interleave(torch.arange(len(lengths), device=starts.device), lengths)
        tokens = torch.arange(num_tokens, device=starts.device)
        scatter = owner * self.max_seqlen_q + tokens - starts[owner]  # [T]
        return gather, scatter
