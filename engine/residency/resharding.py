"""Which rank sends which part of a network's weights to which, when they fill a second layout.

A pure function of the two layouts and the network's tensors: every rank finds its own messages, in
the order in which the other side of each has them, without asking anyone. Imports neither torch nor
megatron.
"""

import math
from collections.abc import Sequence
from dataclasses import dataclass, field

from engine.settings.layout import ParallelLayout

Slices = tuple[slice, ...]


@dataclass(frozen=True, kw_only=True)
class WholeTensor:
    """A parameter of the network, all ranks' parts together."""

    name: str
    """With the number of its layer in the model."""
    shape: tuple[int, ...]
    cut: int | None
    """The dimension that tensor parallelism cuts into even parts; none: every rank has all of
    it."""
    stage: int
    """The pipeline stage that holds it in the layout that sends."""
    element_bytes: int


@dataclass(frozen=True, kw_only=True)
class Message:
    """A part of a tensor on its way; a rank's own part is one to itself."""

    name: str
    peer: int
    """The rank at the other end."""
    source_slices: Slices
    """Where the part lies in the sender's share of the tensor."""
    target_slices: Slices
    """Where it goes in the receiver's."""


@dataclass(kw_only=True)
class Round:
    """What a rank sends and receives at one time. Both sides of a pair have their messages in one
    order, so they match without tags."""

    sends: list[Message] = field(default_factory=list)
    """To other ranks."""
    receives: list[Message] = field(default_factory=list)
    """From other ranks and from itself."""


@dataclass(frozen=True)
class _Piece:
    """A part of a tensor that goes from one share of it to another."""

    tensor: WholeTensor
    source_tp: int | None  # none: all tensor-parallel ranks have it
    source_slices: Slices
    target_slices: Slices
    number: int  # the round among those in which its stage sends


@dataclass(frozen=True, kw_only=True)
class Resharding:
    """Two layouts of the same ranks; the second has no pipeline, and neither context parallelism.

    A rank takes what it holds itself, and the ranks that lack a part ask the replicas that hold it
    in turn. Each starts with the tensors of its own stage and goes round the pipeline, so that all
    stages send at any time.
    """

    source: ParallelLayout
    target: ParallelLayout
    world_size: int
    round_bytes: int
    """What a rank receives in a round at the most, or one tensor's part: what comes and goes on the
    way takes no more memory than that."""

    def stage_of_layer(self, layer: int, num_layers: int) -> int:
        """Return the stage that holds a layer, counted from 0, in the source: chunks of layers are
        dealt to stages in turn."""
        chunk_layers = num_layers // (self.source.pp * self.source.virtual_pp)
        return layer // chunk_layers % self.source.pp

    def share(self, tensor: WholeTensor, layout: ParallelLayout) -> tuple[int, ...]:
        """Return the shape of a rank's part of a tensor in one of the layouts."""
        sizes = list(tensor.shape)
        if tensor.cut is not None:
            sizes[tensor.cut] //= layout.tp
        return tuple(sizes)

    def rounds(self, tensors: Sequence[WholeTensor], rank: int) -> list[Round]:
        """Return what a rank sends and receives; all ranks have as many rounds.

        `tensors` are those of the network, in one order on every rank.
        """
        pieces = [self._pieces(tensors, tp_rank) for tp_rank in range(self.target.tp)]
        stage_rounds = 1 + max(piece.number for each in pieces for piece in each)
        rounds = [Round() for _ in range(self.source.pp * stage_rounds)]

        def round_of(piece: _Piece, receiver: int) -> Round:
            turn = (piece.tensor.stage - self._stage(receiver)) % self.source.pp
            return rounds[turn * stage_rounds + piece.number]

        tp_rank, stage = rank % self.source.tp, self._stage(rank)
        senders: dict[tuple[int, int | None], dict[int, int]] = {}
        for piece in pieces[rank % self.target.tp]:
            holders = (piece.tensor.stage, piece.source_tp)
            if holders not in senders:
                senders[holders] = self._senders(*holders, tp_rank)
            round_of(piece, rank).receives.append(_message(piece, senders[holders][rank]))
        asked = {held: self._senders(stage, held, tp_rank) for held in (tp_rank, None)}
        mine = [
            [p for p in each if p.tensor.stage == stage and p.source_tp in asked] for each in pieces
        ]
        for receiver in range(self.world_size):
            for piece in mine[receiver % self.target.tp]:
                if asked[piece.source_tp].get(receiver) == rank != receiver:
                    round_of(piece, receiver).sends.append(_message(piece, receiver))
        return rounds

    def _stage(self, rank: int) -> int:
        # megatron deals ranks to tensor parallelism first, then to replicas, then to stages.
        return rank // (self.world_size // self.source.pp)

    def _senders(self, stage: int, source_tp: int | None, tp_rank: int) -> dict[int, int]:
        """Return who sends a part that the ranks of a stage at one place in tensor parallelism
        hold, by receiver. Of what all places hold, each serves the ranks of its own: tp_rank."""
        tp, first = self.source.tp, stage * (self.world_size // self.source.pp)
        dp = self.source.dp(self.world_size)
        holds = tp_rank if source_tp is None else source_tp
        receivers = [
            rank
            for rank in range(self.world_size)
            if (rank % tp == holds if source_tp is None else self._meets(source_tp, rank))
        ]
        is_held = [self._stage(r) == stage and r % tp == holds for r in receivers]
        senders = {r: r for r, has in zip(receivers, is_held, strict=True) if has}
        asking = [r for r, has in zip(receivers, is_held, strict=True) if not has]
        return senders | {r: first + n % dp * tp + holds for n, r in enumerate(asking)}

    def _meets(self, source_tp: int, rank: int) -> bool:
        """Whether a rank's shares in the target have something of a place's in the source."""
        begin, end = rank % self.target.tp, rank % self.target.tp + 1
        source, target = self.source.tp, self.target.tp
        return begin * source < (source_tp + 1) * target and end * source > source_tp * target

    def _pieces(self, tensors: Sequence[WholeTensor], target_tp: int) -> list[_Piece]:
        """Return what the ranks of one place in the target's tensor parallelism receive: the
        tensors as they come, each from its beginning."""
        found: list[_Piece] = []
        filled = [(0, 0)] * self.source.pp  # by stage: the round, and its bytes so far
        for tensor in tensors:
            for source_tp, source_part, target_part in self._cuts(tensor, target_tp):
                share = list(tensor.shape)
                if tensor.cut is not None:
                    share[tensor.cut] = target_part.stop - target_part.start
                part_bytes = math.prod(share) * tensor.element_bytes
                number, num_bytes = filled[tensor.stage]
                if num_bytes and num_bytes + part_bytes > self.round_bytes:
                    number, num_bytes = number + 1, 0
                filled[tensor.stage] = (number, num_bytes + part_bytes)
                sides = (_slices(tensor, source_part), _slices(tensor, target_part))
                found.append(_Piece(tensor, source_tp, *sides, number))
        return found

    def _cuts(self, tensor: WholeTensor, target_tp: int) -> list[tuple[int | None, slice, slice]]:
        """Return the parts of the source that meet a rank's share in the target: for each who has
        it, and where along the cut it lies in both."""
        if tensor.cut is None:
            return [(None, slice(None), slice(None))]
        size = tensor.shape[tensor.cut]
        given, taken = size // self.source.tp, size // self.target.tp
        begin, end = target_tp * taken, (target_tp + 1) * taken
        cuts: list[tuple[int | None, slice, slice]] = []
        for source_tp in range(begin // given, -(-end // given)):
            first, last = max(begin, source_tp * given), min(end, (source_tp + 1) * given)
            there = slice(first - source_tp * given, last - source_tp * given)
            cuts.append((source_tp, there, slice(first - begin, last - begin)))
        return cuts


def _slices(tensor: WholeTensor, along_cut: slice) -> Slices:
    dimensions = range(len(tensor.shape))
    return tuple(along_cut if dimension == tensor.cut else slice(None) for dimension in dimensions)


def _message(piece: _Piece, peer: int) -> Message:
    return Message(
        name=piece.tensor.name,
        peer=peer,
        source_slices=piece.source_slices,
        target_slices=piece.target_slices,
    )
