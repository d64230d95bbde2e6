"""What one rank has seen amiss is told to all, and ends the run on all of them alike."""

import socket
from collections.abc import Sequence

import torch
import torch.distributed as dist

from engine.errors import UserError, cut
from engine.ranks.parallel import Parallel

_MAX_NAMED = 3  # parameters of a line, and lines of an error; our choices
_MAX_LINES = 8


def rank_in_words(parallel: Parallel) -> str:
    """Return this rank's number, node and device."""
    device: object = parallel.device
    if parallel.device.type == "cuda":
        device = f"{device} ({torch.cuda.get_device_name(parallel.device)})"
    return f"rank {parallel.rank} (node {socket.gethostname()}, device {device})"


def some_of(names: Sequence[str]) -> str:
    """Return the first names of many, and how many others there are."""
    shown = ", ".join(cut(name, 120) for name in names[:_MAX_NAMED])
    others = len(names) - _MAX_NAMED
    return f"{shown} and {others} others" if others > 0 else shown


def end_if_seen(lines: Sequence[str], parallel: Parallel, what: str, remedy: str) -> None:
    """Raise UserError with the lines of all ranks, on all of them alike, where one has any; all
    ranks call together. One all-reduce of a number where none has."""
    is_seen = torch.tensor(float(bool(lines)), device=parallel.device)
    dist.all_reduce(is_seen, dist.ReduceOp.MAX)
    if not is_seen.item():  # sync: in a step that is checked
        return
    told: list[list[str]] = [[] for _ in range(dist.get_world_size())]
    dist.all_gather_object(told, list(lines))
    found = list(dict.fromkeys(line for part in told for line in part))
    more = len(found) - _MAX_LINES
    shown = [*found[:_MAX_LINES], *([f"and {more} more"] if more > 0 else [])]
    raise UserError("\n".join([what, *(f"  {line}" for line in shown), remedy]))
