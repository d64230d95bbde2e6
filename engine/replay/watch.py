"""The first module of a network whose output is not finite, and the first operation of its backward
pass: hooks on a network, for a step that is looked into. They wait for the device at every module.
"""

import contextlib
import itertools
import math
import re
import warnings
from collections.abc import Callable, Iterator
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import torch
from torch import Tensor

from engine.training.diagnosis import layer_named
from engine.training.network import Network

_ROOT = Path(__file__).parents[2]
_FRAME = re.compile(r'File "([^"]+)", line (\d+), in (\w+)')


@dataclass(frozen=True)
class Finding:
    """The first spot where numbers were not finite, in the order of time on this rank."""

    spot: str
    """A module and its kind, or an operation and the line that called it."""
    term: str
    """The loss whose pass it was in."""
    numbers: str
    """How many of them, and the largest that is finite."""
    rows: tuple[int, ...] = ()
    """Which rows of the first such tensor, of `num_rows`; a module's are tokens."""
    num_rows: int = 0

    def __str__(self) -> str:
        """Return it as a clause."""
        return f"{self.spot}, for {self.term}: {self.numbers}"


class PassWatch:
    """Watches the passes of a network on this rank: `with watch.watching(): ...`."""

    def __init__(self, network: Network) -> None:
        self.network = network
        self.term = "loss"
        """The loss whose micro-batch is under way; the one who runs it says so."""
        self.forward: Finding | None = None
        self.backward: Finding | None = None
        self._seen: set[Any] = set()  # operations that have a hook, kept so that ids stay theirs

    @contextlib.contextmanager
    def watching(self) -> Iterator[None]:
        """Run a block in which passes are watched; where each operation was called is known."""
        handles = []
        for module in self.network.modules:
            for name, part in module.named_modules():
                spot = f"{layer_named(module, name) or 'the head'} ({type(part).__name__})"
                handles.append(part.register_forward_pre_hook(self._entering(spot)))
                handles.append(part.register_forward_hook(self._leaving(spot, part is module)))
        try:
            with warnings.catch_warnings():
                warnings.filterwarnings("ignore", message="Anomaly Detection has been enabled")
                anomalies = torch.autograd.detect_anomaly(check_nan=False)  # infinities matter too
            with anomalies:
                yield
        finally:
            for handle in handles:
                handle.remove()
            self._seen.clear()

    def follow(self, *outputs: Any) -> None:
        """PassWatch the backward pass of tensors: every operation that they were made by."""
        waiting = [t.grad_fn for t in _tensors(outputs) if t.grad_fn is not None]
        while waiting:
            node: Any = waiting.pop()
            if node in self._seen:
                continue
            self._seen.add(node)
            if not hasattr(node, "variable"):  # AccumulateGrad makes nothing of its own
                node.register_hook(self._passing(node, self.term))
            waiting += [inner for inner, _ in node.next_functions if inner is not None]

    def _entering(self, spot: str) -> Callable[..., None]:
        def hook(module: torch.nn.Module, arguments: tuple) -> None:
            self._look(f"what enters {spot}", arguments)

        return hook

    def _leaving(self, spot: str, is_whole: bool) -> Callable[..., None]:
        def hook(module: torch.nn.Module, arguments: tuple, output: Any) -> None:
            self._look(spot, output)
            if is_whole and torch.is_grad_enabled():
                self.follow(output)

        return hook

    def _passing(self, node: Any, term: str) -> Callable[..., None]:
        def hook(made: tuple, taken: tuple) -> None:
            if self.backward is None and (numbers := _described(made)):
                self.backward = Finding(f"{node.name()}{_caller(node)}", term, numbers)

        return hook

    def _look(self, spot: str, values: Any) -> None:
        if self.forward is None and (numbers := _described(values)):
            rows, num_rows = _broken_rows(values)
            self.forward = Finding(spot, self.term, numbers, rows, num_rows)


def _described(values: Any) -> str:
    """Return how many of the numbers in nested tensors are not finite; "" where all are."""
    tensors = [t.detach() for t in _tensors(values) if t.is_floating_point()]
    num_broken = sum(int((~t.isfinite()).sum()) for t in tensors)
    if not num_broken:
        return ""
    num_all = sum(t.numel() for t in tensors)
    sizes = [t[t.isfinite()].abs().double() for t in tensors]
    largest = max((float(s.max()) for s in sizes if len(s)), default=math.nan)
    return f"{num_broken} of {num_all} numbers are not finite, the largest other is {largest:.4g}"


def _broken_rows(values: Any) -> tuple[tuple[int, ...], int]:
    """Return the rows with a number that is not finite, and how many there are, of the first tensor
    that has one: by its first dimension that is no 1. None of a vector: a bias has no tokens."""
    for tensor in _tensors(values):
        is_broken = ~torch.atleast_1d(tensor.detach().squeeze()).isfinite()
        if is_broken.any():
            if tensor.dim() < 2:
                break
            rows = is_broken.reshape(len(is_broken), -1).any(1).nonzero().flatten()
            return tuple(rows.tolist()), len(is_broken)
    return (), 0


def _tensors(values: Any) -> Iterator[Tensor]:
    if isinstance(values, Tensor):
        yield values
    elif isinstance(values, list | tuple):
        yield from itertools.chain.from_iterable(map(_tensors, values))


def _caller(node: Any) -> str:
    """Return " of FILE:LINE, in FUNCTION", the innermost of ours that called an operation."""
    frames = _FRAME.findall("".join(node.metadata.get("traceback_", [])))
    ours = [f for f in frames if Path(f[0]).is_relative_to(_ROOT) and "site-packages" not in f[0]]
    for path, line, function in reversed(ours or frames):
        shown = Path(path).relative_to(_ROOT) if ours else Path(path).name
        return f" of {shown}:{line}, in {function}"
    return ""
