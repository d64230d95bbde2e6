"""Sequences of a packed row that begin alike: their common beginning is computed once.

The row holds what each sequence has for itself, and the first of those that begin alike their
prefix as well:

    [ prefix  rest 1 ][ rest 2 ][ rest 3 ]    three sequences in a row

Positions count a sequence's prefix, and its keys are those of the prefix, wherever that lies, and
its own. So no sequence sees another's rest, and each gives what it would give if it lay there as a
whole.
"""

import dataclasses
import functools
from collections.abc import Callable, Sequence
from dataclasses import dataclass
from typing import Any

import torch
import torch.nn.functional as F
from torch import Tensor

_CALL, _COPY = 5000, 90
"""What a call, and a prefix's token with its gradient, cost a CPU in pairs of tokens; measured with
prefixes of 16 to 200 tokens, 2 to 20 sequences of 8 to 80, and 8 heads of 32."""


@dataclass(frozen=True, kw_only=True, eq=False)
class Prefixes:
    """Which of a row's sequences go on from a prefix that lies before them in the row.

    That is the beginning of the last sequence before them which has all its tokens itself.
    """

    starts: Tensor
    """[B] int32: where a sequence's prefix begins in the row."""
    lengths: Tensor
    """[B] int32: its tokens; 0 where the sequence has all its tokens itself."""
    num_keys: int
    """Tokens of all sequences, each with its prefix, known without asking the device."""

    def moved(self, move: Callable[[Tensor], Tensor]) -> "Prefixes":
        """Return the same on another device; move: takes a tensor there."""
        return dataclasses.replace(self, starts=move(self.starts), lengths=move(self.lengths))

    def padded(self, num_sequences: int, num_tokens: int) -> "Prefixes":
        """Return the same for a row with so many more sequences, which have all their tokens
        themselves, so many."""
        return Prefixes(
            starts=F.pad(self.starts, (0, num_sequences)),
            lengths=F.pad(self.lengths, (0, num_sequences)),
            num_keys=self.num_keys + num_tokens,
        )

    def keys(self, cu_seqlens: Tensor) -> "SequenceKeys":
        """Return the keys of all the row's tokens; cu_seqlens [B+1] int32: their sequences."""
        counts = cu_seqlens.diff() + self.lengths
        return SequenceKeys(self, cu_seqlens, counts, self.num_keys)


@dataclass(frozen=True, eq=False)
class SequenceKeys:
    """Which tokens of a row the keys of its sequences are, one sequence after the other."""

    prefixes: Prefixes
    cu_seqlens: Tensor
    """[B+1] int32: the sequences' own tokens in the row."""
    counts: Tensor
    """[B] int32: the keys of each, its prefix first."""
    num_keys: int | None
    """Sum of the counts; None: unknown on the host, as that of a piece of the row is."""
    _sees: dict[int | None, list[Tensor | None]] = dataclasses.field(default_factory=dict)

    def within(self, piece: range) -> "SequenceKeys":
        """Return the keys of the tokens in a piece of the row: those before the piece's end, and
        none of a sequence without a token in it."""
        own = self.cu_seqlens.clamp(max=piece.stop).diff()
        has_tokens = self.cu_seqlens.clamp(piece.start, piece.stop).diff() > 0
        counts = (own + self.prefixes.lengths) * has_tokens
        return SequenceKeys(self.prefixes, self.cu_seqlens, counts, None)

    @property
    def is_of_row(self) -> bool:
        """True where they are those of all the row's tokens."""
        return self.num_keys is not None

    @functools.cached_property
    def bounds(self) -> Tensor:
        """[B+1] int32: where the keys of each begin and end, as cu_seqlens has it of tokens."""
        return F.pad(self.counts.cumsum(0), (1, 0)).int()

    @functools.cached_property
    def index(self) -> Tensor:
        """[T_kv] int64: the token of the row that a key is."""
        numbers = torch.arange(len(self.counts), device=self.counts.device)
        owner = torch.repeat_interleave(numbers, self.counts.long(), output_size=self.num_keys)
        starts, lengths = self.prefixes.starts, self.prefixes.lengths
        first, start, length, own = (
            values.index_select(0, owner).long()
            for values in (self.bounds, starts, lengths, self.cu_seqlens)
        )
        number = torch.arange(len(owner), device=owner.device) - first
        return number + torch.where(number < length, start, own - length)

    @functools.cached_property
    def _by_token(self) -> Tensor:
        """[T_kv] int64: the keys ordered by their token, those of one token as they come."""
        return torch.argsort(self.index, stable=True)

    def gather(self, key: Tensor, value: Tensor) -> tuple[Tensor, Tensor]:
        """Return key and value [T, heads, dim] of the row's tokens at the keys [T_kv, heads, dim].

        The gradient of a token is the sum of its keys', in the order of the sequences and in fp32:
        the same bits every time, on a GPU too, where additions by index come in any order.
        """
        return _Gather.apply(key, value, self.index, self._by_token)

    def groups(self, window: int | None) -> tuple[list[int], list[Tensor | None]]:
        """Return of the groups of sequences that share a prefix their tokens in the row, and what
        these see of one another, as group_sees; asks the device, once.

        window: how many tokens a token sees, itself among them; None for all.
        """
        own, prefixes = self._groups
        if window not in self._sees:
            self._sees[window] = [
                group_sees(*group, window, self.counts.device)
                for group in zip(own, prefixes, strict=True)
            ]
        return [sum(lengths) for lengths in own], self._sees[window]

    @functools.cached_property
    def suits_groups(self) -> bool:
        """True where a CPU computes a group in one call faster than its sequences one by one.

        The call computes what tokens of different sequences would say to one another in vain. One
        by one costs a call each, and a copy of the prefix.
        """
        in_vain = spared = 0
        for own, prefixes in zip(*self._groups, strict=True):
            if len(own) > 1:
                in_vain += (sum(own) - prefixes[1]) ** 2
                spared += sum(_CALL + _COPY * prefix for prefix in prefixes[1:])
        return in_vain < spared

    @functools.cached_property
    def _groups(self) -> tuple[list[list[int]], list[list[int]]]:
        """(own tokens of each sequence of each group, tokens of its prefix)."""
        own: list[list[int]] = []
        prefixes: list[list[int]] = []
        lengths = self.cu_seqlens.diff().tolist()
        for length, prefix in zip(lengths, self.prefixes.lengths.tolist(), strict=True):
            if prefix == 0:
                own.append([])
                prefixes.append([])
            own[-1].append(length)
            prefixes[-1].append(prefix)
        return own, prefixes


def group_sees(
    own: Sequence[int], prefixes: Sequence[int], window: int | None, device: torch.device
) -> Tensor | None:
    """Return [N, N] bool, token by token of a group that shares a prefix: is the second one seen;
    None: all up to itself are.

    own: the sequences' tokens in the row, N in all; prefixes: those that they go on from.
    """
    if len(own) == 1 and (window is None or window >= own[0]):
        return None
    lengths = torch.tensor(own, device=device)
    length = torch.tensor(prefixes, device=device).repeat_interleave(lengths)
    number = torch.arange(len(length), device=device)
    first = (lengths.cumsum(0) - lengths).repeat_interleave(lengths)  # of its sequence
    sees = (number <= number[:, None]) & ((number < length[:, None]) | (first == first[:, None]))
    if window is None:
        return sees
    position = number - first + length
    return sees & (position > position[:, None] - window)


class _Gather(torch.autograd.Function):
    @staticmethod
    def forward(
        ctx: Any, key: Tensor, value: Tensor, index: Tensor, by_token: Tensor
    ) -> tuple[Tensor, Tensor]:
        ctx.save_for_backward(index, by_token)
        ctx.num_tokens = len(key)
        return key.index_select(0, index), value.index_select(0, index)

    @staticmethod
    def backward(
        ctx: Any, key_grad: Tensor, value_grad: Tensor
    ) -> tuple[Tensor, Tensor, None, None]:
        index, by_token = ctx.saved_tensors
        tokens = torch.arange(ctx.num_tokens + 1, device=index.device)
        offsets = torch.searchsorted(
            index.index_select(0, by_token), tokens
        )  # [T+1], of each token's keys

        def total(grad: Tensor) -> Tensor:
            summed = torch.promote_types(grad.dtype, torch.float32)
            ordered = grad.index_select(0, by_token).to(summed)
            sums = torch.segment_reduce(ordered, "sum", offsets=offsets, axis=0, unsafe=True)
            return sums.to(grad.dtype)

        return total(key_grad), total(value_grad), None, None
