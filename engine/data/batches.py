"""Packed micro-batches: which examples a step takes, which rank takes which, how they are laid out.

Everything is a pure function of the step number and the lengths, so every rank computes the same
plan without talking. A run resumes from its step number. The step's global batch does not
depend on dp.
"""

import bisect
import dataclasses
import functools
import heapq
import math
from collections.abc import Sequence
from dataclasses import dataclass
from typing import Protocol

import numpy as np
import torch
from torch import Tensor

from engine.data.examples import TRAINED, Example, Shape, Unit, begins_alike, sequences_of
from models.prefixes import Prefixes


@dataclass(frozen=True, kw_only=True, eq=False)
class PackedBatch:
    """One micro-batch on one rank: T tokens of B sequences laid end to end.

    Position t of mask and of per-token fields belongs to the token at t, predicted from t-1. When T
    had to be rounded up, the last sequence is padding: token 0, masked, in no unit, with sequence
    id -1.
    """

    tokens: Tensor
    """[T] int64."""
    positions: Tensor
    """[T] int64: from 0 in every sequence, its prefix included."""
    cu_seqlens: Tensor
    """[B+1] int32: sequence b is tokens[cu_seqlens[b] : cu_seqlens[b+1]], behind its prefix."""
    mask: Tensor
    """[T] bool: the token is predicted (the response_mask)."""
    targets: Tensor
    """[R] int64: the positions where mask is True, known without asking the device."""
    sequence_ids: Tensor
    """[B] int64: the sequence's number in the step's global batch; -1 for padding."""
    cu_units: Tensor
    """[U+1] int32: unit u is the sequences cu_units[u] : cu_units[u+1]; padding is in none."""
    fields: dict[str, Tensor]
    """Further values, [T] or [B] each, 0 for padding; float32, int64 or bool."""
    max_seqlen: int
    """Tokens of the longest sequence, its prefix included."""
    num_sequences: int
    """Sequences that are not padding: B or B - 1; 0 in a micro-batch that only keeps step."""
    prefixes: Prefixes | None = None
    """The prompts of sequences behind the first of their unit, which holds it; none: each sequence
    holds its own. A prompt's last token is then before several, and mask of no use."""

    def to(self, device: torch.device | str) -> "PackedBatch":
        """Return the batch on `device`; to a GPU through pinned memory, without waiting."""
        is_cuda = torch.device(device).type == "cuda"

        def move(tensor: Tensor) -> Tensor:
            source = tensor.pin_memory() if is_cuda else tensor
            return source.to(device, non_blocking=is_cuda)

        return dataclasses.replace(
            self,
            tokens=move(self.tokens),
            positions=move(self.positions),
            cu_seqlens=move(self.cu_seqlens),
            mask=move(self.mask),
            targets=move(self.targets),
            sequence_ids=move(self.sequence_ids),
            cu_units=move(self.cu_units),
            fields={name: move(value) for name, value in self.fields.items()},
            prefixes=self.prefixes and self.prefixes.moved(move),
        )


class Units(Protocol):
    """What has units as items: a list of examples or of comparisons, a token file's sequences."""

    def __len__(self) -> int: ...

    def __getitem__(self, index: int, /) -> Unit: ...


def shapes_of(units: Units, index: int) -> list[Shape]:
    """Return the shapes of a unit's sequences; where the units know them, none is read."""
    known = getattr(units, "shapes", None)
    if known is not None:
        return known(index)
    return [(len(each.tokens), each.num_given) for each in sequences_of(units[index])]


def lengths_of(shapes: Sequence[Sequence[Shape]], *, share_prompts: bool = False) -> list[int]:
    """Return the tokens that pack lays out of each unit, from the shapes of its sequences."""
    lengths = [sum(num_tokens for num_tokens, _ in unit) for unit in shapes]
    if not share_prompts:
        return lengths
    return [
        length - sum(prompt_length for _, prompt_length in unit[1:])
        for length, unit in zip(lengths, shapes, strict=True)
    ]


@dataclass(frozen=True)
class Chosen:
    """Some of the units, in the order of their indices; each is read when it is asked for."""

    units: Units
    indices: Sequence[int]

    def __len__(self) -> int:
        return len(self.indices)

    def __getitem__(self, index: int) -> Unit:
        return self.units[self.indices[index]]

    def shapes(self, index: int) -> list[Shape]:
        """Return the shapes of a unit's sequences; see shapes_of."""
        return shapes_of(self.units, self.indices[index])


class EpochOrder:
    """Which examples each step's global batch holds: all once an epoch, in a new order each time.

    The epochs follow one another without a gap, so that every batch has `batch_size` examples and
    the one at a boundary takes from both epochs. Stateless: the step number is the whole position
    in the data.
    """

    def __init__(self, num_examples: int, batch_size: int, seed: int) -> None:
        if num_examples < 1 or batch_size < 1:
            raise ValueError(
                f"{num_examples} examples in batches of {batch_size}: both must be >= 1"
            )
        self.num_examples = num_examples
        self.batch_size = batch_size
        self.seed = seed

    @property
    def steps_per_epoch(self) -> int:
        """Steps in which every example is seen."""
        return self.num_steps(1)

    def num_steps(self, epochs: float) -> int:
        """Return the steps after which `epochs` epochs are complete."""
        return math.ceil(epochs * self.num_examples / self.batch_size)

    def epoch(self, step: int) -> float:
        """Return the epochs that are complete before `step`."""
        return step * self.batch_size / self.num_examples

    def indices(self, step: int) -> list[int]:
        """Return the `batch_size` examples of this step, counted from 0."""
        start, end = step * self.batch_size, (step + 1) * self.batch_size
        found: list[int] = []
        while start < end:
            epoch, first = divmod(start, self.num_examples)
            last = min(self.num_examples, first + end - start)
            found += _permutation(self.num_examples, self.seed, epoch)[first:last].tolist()
            start += last - first
        return found


def pack(
    units: Sequence[Unit],
    *,
    multiple_of: int,
    sequence_ids: Sequence[int] | None = None,
    share_prompts: bool = False,
) -> PackedBatch:
    """Lay the units' sequences end to end, T rounded up to `multiple_of` by one masked sequence.

    All sequences must have the same fields. `sequence_ids` counts from 0 where it is not given.
    With share_prompts the prompt of a unit's sequences is laid out once, with the first of them: it
    must be the same for all, and each must have tokens behind it.
    """
    sequences = [sequence for unit in units for sequence in sequences_of(unit)]
    if not sequences:
        raise ValueError("a micro-batch needs at least one sequence")
    ids = list(range(len(sequences)) if sequence_ids is None else sequence_ids)
    skipped = [0] * len(sequences)
    if share_prompts:
        skipped = [count for unit in units for count in _shared_lengths(sequences_of(unit))]
    num_tokens = sum(len(sequence.tokens) for sequence in sequences) - sum(skipped)
    if num_padding := -num_tokens % multiple_of:
        sequences.append(_padding(sequences[0], num_padding))
        ids.append(-1)
        skipped.append(0)
    return _join(sequences, ids, [len(sequences_of(unit)) for unit in units], skipped)


def deal(lengths: Sequence[int], dp: int) -> list[list[int]]:
    """Return the indices that each of dp ranks takes, in order; together they take each index once.

    The ranks' tokens are balanced, the longest going first, to the rank with the fewest tokens; the
    answer is the same whoever asks.
    """
    dealt: list[list[int]] = [[] for _ in range(dp)]
    loads = [(0, rank) for rank in range(dp)]
    for index in sorted(range(len(lengths)), key=lambda index: (-lengths[index], index)):
        tokens, rank = loads[0]
        dealt[rank].append(index)
        heapq.heapreplace(loads, (tokens + lengths[index], rank))
    return [sorted(indices) for indices in dealt]


def spread(loads: Sequence[int]) -> float:
    """Return how uneven the ranks' loads are: the most over the mean. 1 is even, and what is above
    it the others wait for."""
    return max(loads) * len(loads) / sum(loads)


def split_by_tokens(lengths: Sequence[int], budget: int) -> list[list[int]]:
    """Return groups of indices of at most `budget` tokens; a longer sequence is alone in its group.

    Best fit, longest first, which needs at most 11/9 of the fewest groups possible (Johnson 1974).
    """
    groups: list[list[int]] = []
    open_groups: list[tuple[int, int]] = []  # (tokens of room, group), fullest first
    for index in sorted(range(len(lengths)), key=lambda index: (-lengths[index], index)):
        fitting = bisect.bisect_left(open_groups, (lengths[index], -1))
        if fitting == len(open_groups):
            room, group = budget, len(groups)
            groups.append([])
        else:
            room, group = open_groups.pop(fitting)
        groups[group].append(index)
        if room > lengths[index]:
            bisect.insort(open_groups, (room - lengths[index], group))
    return sorted(sorted(group) for group in groups)


@dataclass(frozen=True, kw_only=True)
class Cut:
    """How a layout cuts a step's global batch into the micro-batches of one rank."""

    dp: int = 1
    dp_rank: int = 0
    multiple_of: int = 1
    """Every micro-batch has a multiple of so many tokens, the last of them padding."""
    count_multiple: int = 1
    """Every rank has a multiple of so many micro-batches; interleaved pipelines ask for that."""
    is_even: bool = False
    """Tokens are spread over all micro-batches, for pipelines, which pad to the longest; otherwise
    there are few and full ones."""


def micro_batches(
    units: Units, cut: Cut, budget: int, *, share_prompts: bool = False
) -> list[PackedBatch]:
    """Return this rank's part of a step's units, in micro-batches of at most `budget` tokens.

    A unit stays in one micro-batch, and one that is over the budget has its own. All dp ranks get
    the same number of them; what is missing is filled with masked ones. Where the units know their
    shapes, only this rank's are read. share_prompts: as pack, and the tokens are counted so.
    """
    if not len(units):
        raise ValueError("a step's global batch needs at least one example")
    shapes = [shapes_of(units, index) for index in range(len(units))]
    lengths = lengths_of(shapes, share_prompts=share_prompts)
    first_ids = np.cumsum([0] + [len(unit) for unit in shapes])
    # Rounded down, so that the padding does not lift a micro-batch over the budget.
    budget = max(budget // cut.multiple_of, 1) * cut.multiple_of
    splits = []
    for dealt in deal(lengths, cut.dp):
        groups = split_by_tokens([lengths[index] for index in dealt], budget)
        splits.append([[dealt[number] for number in group] for group in groups])
    most = max(len(split) for split in splits)
    count = math.ceil(most / cut.count_multiple) * cut.count_multiple

    mine = splits[cut.dp_rank]
    if cut.is_even:
        mine = _evened(mine, lengths, count, budget)
    batches = []
    for group in mine:
        ids = [n for index in group for n in range(first_ids[index], first_ids[index + 1])]
        members = [units[index] for index in group]
        batches.append(
            pack(
                members,
                multiple_of=cut.multiple_of,
                sequence_ids=ids,
                share_prompts=share_prompts,
            )
        )
    if len(batches) == count:
        return batches
    filler = _join([_padding(sequences_of(units[0])[0], cut.multiple_of)], [-1], [], [0])
    return batches + [filler] * (count - len(batches))


def _evened(
    groups: list[list[int]], lengths: Sequence[int], count: int, budget: int
) -> list[list[int]]:
    """Deal the indices of the groups to `count` groups anew, by tokens; groups without any are left
    out. The groups as they were, where one would have more than the largest has now, or several
    units beyond the budget: a unit over it does not let others share its room."""
    indices = sorted(index for group in groups for index in group)
    dealt = deal([lengths[index] for index in indices], count)
    evened = [[indices[number] for number in numbers] for numbers in dealt if numbers]

    def largest(groups: list[list[int]]) -> int:
        return max((sum(lengths[index] for index in group) for group in groups), default=0)

    several = [group for group in evened if len(group) > 1]
    is_better = largest(evened) <= largest(groups) and largest(several) <= budget
    return evened if is_better else groups


@functools.lru_cache(maxsize=8)
def _permutation(num_examples: int, seed: int, epoch: int) -> np.ndarray:
    return np.random.default_rng([seed, epoch]).permutation(num_examples)


def _padding(like: Example, length: int) -> Example:
    """Return a sequence of `length` tokens 0, none predicted, with the fields of `like` at 0."""
    fields: dict[str, np.ndarray] = {}
    for name, value in like.fields.items():
        array = np.asarray(value)
        fields[name] = np.zeros(length if array.ndim else (), dtype=array.dtype)
    return Example(tokens=np.zeros(length, dtype=np.int64), prompt_length=length, fields=fields)


def _shared_lengths(sequences: Sequence[Example]) -> list[int]:
    """Return how many of each sequence's first tokens lie in the unit's first one: its prompt's."""
    first, *others = sequences
    if others and not begins_alike(sequences):
        raise ValueError("the sequences of a unit share no prompt, or one ends with it")
    return [0, *(first.prompt_length for _ in others)]


def _join(
    sequences: list[Example], ids: list[int], unit_sizes: list[int], skipped: list[int]
) -> PackedBatch:
    """skipped: how many of each sequence's first tokens are left to the first of its unit."""
    prefix_lengths = np.array(skipped)
    lengths = np.array([len(sequence.tokens) for sequence in sequences]) - prefix_lengths
    cu_seqlens = np.concatenate([[0], np.cumsum(lengths)])
    positions = np.arange(cu_seqlens[-1]) + np.repeat(prefix_lengths - cu_seqlens[:-1], lengths)
    prompt_lengths = np.array([sequence.prompt_length for sequence in sequences])
    parts = [each.tokens[start:] for each, start in zip(sequences, skipped, strict=True)]
    tokens = np.concatenate(parts, dtype=np.int64)
    mask = positions >= np.repeat(prompt_lengths, lengths)
    if TRAINED in sequences[0].fields:
        mask &= _join_field(sequences, TRAINED, skipped).numpy()
    return PackedBatch(
        tokens=torch.from_numpy(tokens),
        positions=torch.from_numpy(positions),
        cu_seqlens=torch.from_numpy(cu_seqlens.astype(np.int32)),
        mask=torch.from_numpy(mask),
        targets=torch.from_numpy(np.flatnonzero(mask)),
        sequence_ids=torch.tensor(ids, dtype=torch.int64),
        cu_units=torch.from_numpy(np.cumsum([0, *unit_sizes], dtype=np.int32)),
        fields={name: _join_field(sequences, name, skipped) for name in sequences[0].fields},
        max_seqlen=int((lengths + prefix_lengths).max()),
        num_sequences=sum(unit_sizes),
        prefixes=_prefixes(cu_seqlens, prefix_lengths, unit_sizes) if any(skipped) else None,
    )


def _prefixes(cu_seqlens: np.ndarray, lengths: np.ndarray, unit_sizes: list[int]) -> Prefixes:
    first = np.repeat(np.cumsum([0, *unit_sizes[:-1]]), unit_sizes)  # sequence of each one's unit
    starts = np.zeros(len(lengths), np.int32)  # padding is in no unit
    starts[: len(first)] = cu_seqlens[first]
    return Prefixes(
        starts=torch.from_numpy(starts),
        lengths=torch.from_numpy(lengths.astype(np.int32)),
        num_keys=int(cu_seqlens[-1] + lengths.sum()),
    )


def _join_field(sequences: list[Example], name: str, skipped: list[int]) -> Tensor:
    """Return the field as [T] where the examples have an array, [B] where they have a number."""
    arrays = [np.asarray(sequence.fields[name]) for sequence in sequences]
    for sequence, array in zip(sequences, arrays, strict=True):
        if array.ndim and array.shape != sequence.tokens.shape:
            raise ValueError(f"field {name} has shape {array.shape}, not {sequence.tokens.shape}")
    joined = np.concatenate(
        [
            array[start:] if array.ndim else array[None]
            for array, start in zip(arrays, skipped, strict=True)
        ]
    )
    if joined.dtype.kind == "f":
        joined = joined.astype(np.float32)
    elif joined.dtype.kind in "iu":
        joined = joined.astype(np.int64)
    return torch.from_numpy(joined)
