"""What joins the shards of a vocabulary, and a row's results over all of it from one shard.

Whoever holds the shards says how they are joined: there are no collectives in kernels/.
"""

from collections.abc import Callable
from dataclasses import dataclass

from torch import Tensor

from kernels.row_merge import write_merged_results
from kernels.row_state import RowResults, RowSpec, row_state, write_row_results


def _itself(tensor: Tensor) -> Tensor:
    """The tensor: what joining the shards of a whole vocabulary comes to."""
    return tensor


def _at_once(tensor: Tensor) -> Callable[[], Tensor]:
    return lambda: tensor


@dataclass(frozen=True, kw_only=True)
class Joins:
    """What joins the shards of a vocabulary; the default is the whole vocabulary on one device."""

    gather_states: Callable[[Tensor], Tensor] | None = None
    """State [T, 4] of this shard to those of all shards [shards, T, 4]; None for a single one."""
    gather_hidden: Callable[[Tensor], Tensor] = _itself
    """This rank's rows of the hidden states to all rows."""
    start_reduction: Callable[[Tensor], Callable[[], Tensor]] = _at_once
    """Begins to sum the hidden states' gradient over shards; the returned call waits for it."""


ONE_SHARD = Joins()


def write_joined_results(
    results: RowResults, logits: Tensor, labels: Tensor, spec: RowSpec, joins: Joins
) -> None:
    """Write the rows' results over the whole vocabulary from one shard of it, [T, V_local]."""
    if joins.gather_states is None:
        write_row_results(results, logits, labels, spec)
    else:
        states = joins.gather_states(row_state(logits, labels, spec))
        write_merged_results(results, states, labels, spec)
