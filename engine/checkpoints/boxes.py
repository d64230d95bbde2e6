"""A range of a tensor's flattened elements as boxes of the tensor.

A data-parallel rank owns such ranges of optimizer state, which take no notice of rows. A
checkpoint that any layout can read is made of boxes.
"""

import math

Box = tuple[tuple[int, ...], tuple[int, ...]]
"""(offset, shape) within the tensor."""


def boxes(shape: tuple[int, ...], start: int, stop: int) -> list[Box]:
    """Return the fewest boxes that hold elements start to stop, in the order of the elements.

    Of a matrix: the end of one row, whole rows, and the beginning of another.
    """
    if start == stop:
        return []
    if len(shape) == 1:
        return [((start,), (stop - start,))]
    row = math.prod(shape[1:])
    first, last = -(-start // row), stop // row  # whole rows, where first < last
    if first > last:  # within one row
        return _in_row(shape, last, start, stop)
    found = _in_row(shape, first - 1, start, first * row)
    if first < last:
        rest = shape[1:]
        found.append(((first, *(0 for _ in rest)), (last - first, *rest)))
    return found + _in_row(shape, last, last * row, stop)


def _in_row(shape: tuple[int, ...], index: int, start: int, stop: int) -> list[Box]:
    """The boxes of elements that lie in row `index`."""
    before = index * math.prod(shape[1:])
    return [
        ((index, *offset), (1, *size))
        for offset, size in boxes(shape[1:], start - before, stop - before)
    ]


def overlap(a: Box, b: Box) -> Box | None:
    """Return what two boxes of one tensor have in common, None where that is nothing."""
    starts, sizes = [], []
    for at_a, size_a, at_b, size_b in zip(*a, *b, strict=True):
        start, stop = max(at_a, at_b), min(at_a + size_a, at_b + size_b)
        if start >= stop:
            return None
        starts.append(start)
        sizes.append(stop - start)
    return tuple(starts), tuple(sizes)


def within(box: Box, whole: Box) -> tuple[slice, ...]:
    """Return where a box lies in a larger one that holds it, as slices of the larger."""
    pairs = zip(box[0], box[1], whole[0], strict=True)
    return tuple(slice(at - start, at - start + size) for at, size, start in pairs)
