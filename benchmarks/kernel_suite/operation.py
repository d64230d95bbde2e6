"""An operation of the benchmark: its inputs, its exact results, its least cost, who computes it.

A provider is a plain function of the operation's arguments. `bind` makes it a call that runs
forward, or forward and backward, for every provider in the same way.
"""

from collections.abc import Callable, Mapping, Sequence
from dataclasses import dataclass
from typing import Any, Literal

import torch
from torch import Tensor

Mode = Literal["forward", "forward+backward"]
BOTH_MODES: tuple[Mode, ...] = ("forward", "forward+backward")
NUM_SAMPLED_ROWS = 64

Size = dict[str, int]
Inputs = dict[str, Any]
"""Arguments by name; "upstream" holds the gradients of the outputs that are differentiated."""
Results = dict[str, Tensor]
"""Outputs by name, and gradients as "<argument>_grad"."""


@dataclass(frozen=True)
class Expected:
    """A result in fp64, and how far from it a provider may be to count as a rival.

    The tolerances let a bf16 computation pass and no wrong formula; the errors themselves are
    reported.
    """

    values: Tensor | Callable[[Results], Tensor]
    tolerance: float
    index: Tensor | None = None
    """Rows of the result that `values` are; None for all."""
    is_relative: bool = False
    """Error is |difference| / |values| (Frobenius), else the largest absolute difference."""

    def error(self, results: Results, name: str) -> float:
        """Error of a provider's result; NaN if it is one."""
        result = results[name].detach()
        result = result if self.index is None else result[self.index]
        values = self.values(results) if callable(self.values) else self.values
        difference = result.double() - values
        if self.is_relative:
            return (difference.norm() / values.norm().clamp(min=1e-30)).item()
        return difference.abs().max().item()


@dataclass(frozen=True)
class Cost:
    """The least that any implementation has to do."""

    num_bytes: int = 0
    """Read and written in device memory."""
    flops: int = 0
    """Of matrix products."""


@dataclass(frozen=True)
class Provider:
    """Who computes an operation, and how to call it."""

    name: str
    load: Callable[[], Callable[..., Tensor | tuple[Tensor, ...]]]
    """Imports what is needed and returns the function; an ImportError says what is missing."""
    arguments: tuple[str, ...] = ()
    """What the function takes, where it is not the operation's arguments."""
    modes: tuple[Mode, ...] = BOTH_MODES
    needs_gpu: bool = False
    is_bound: bool = False
    """A yardstick that does only the unavoidable part: not checked, and no rival."""


@dataclass(frozen=True, kw_only=True)
class Operation:
    """What is computed. Sizes by device type, the first of each for a quick look."""

    name: str
    sizes: Mapping[str, Sequence[Size]]
    inputs: Callable[[Size, torch.device], Inputs]
    arguments: tuple[str, ...]
    outputs: tuple[str, ...]
    exact: Callable[[Inputs], dict[str, Expected]]
    cost: Callable[[Inputs, Mode], Cost]
    providers: tuple[Provider, ...]
    gradients: tuple[str, ...] = ()
    """Arguments differentiated in "forward+backward"."""
    modes: tuple[Mode, ...] = BOTH_MODES


def bind(
    operation: Operation, provider: Provider, inputs: Inputs, mode: Mode
) -> Callable[[], Results]:
    """The provider's call on these inputs. Raises ImportError where its package is missing."""
    function = provider.load()
    arguments = [inputs[name] for name in provider.arguments or operation.arguments]

    def outputs() -> Results:
        results = function(*arguments)
        results = results if isinstance(results, tuple) else (results,)
        return dict(zip(operation.outputs, results, strict=True))

    def forward() -> Results:
        with torch.no_grad():
            return outputs()

    def forward_and_backward() -> Results:
        results = outputs()
        upstream = {name: g.to(results[name].dtype) for name, g in inputs["upstream"].items()}
        leaves = {f"{name}_grad": inputs[name] for name in operation.gradients}
        roots = [results[name] for name in upstream]
        grads = torch.autograd.grad(roots, list(leaves.values()), list(upstream.values()))
        return results | dict(zip(leaves, grads, strict=True))

    return forward if mode == "forward" else forward_and_backward


def errors(expected: Mapping[str, Expected], results: Results) -> dict[str, float]:
    """Error of every result that has an exact value and that this mode computes."""
    return {name: e.error(results, name) for name, e in expected.items() if name in results}


def passes(expected: Mapping[str, Expected], found: Mapping[str, float]) -> bool:
    """True when every error is within its tolerance; NaN is not."""
    return all(found[name] <= expected[name].tolerance for name in found)


def sampled_rows(num_rows: int, device: torch.device) -> Tensor:
    """Up to 64 row numbers, the first and the last but one among them."""
    # Liger's selective log-softmax leaves out the last row, so nobody is asked for it.
    last = max(0, num_rows - 2)
    return torch.linspace(0, last, min(NUM_SAMPLED_ROWS, num_rows), device=device).long()


def weighted_sum(outputs: Mapping[str, Tensor], upstream: Mapping[str, Tensor]) -> Tensor:
    """Scalar whose gradients are those that the upstream gradients ask for, in fp64."""
    return torch.stack([(outputs[name] * g.double()).sum() for name, g in upstream.items()]).sum()


def compiled(function: Callable[..., Any]) -> Callable[[], Callable[..., Any]]:
    """A provider's `load` that gives torch.compile of a function."""
    return lambda: torch.compile(function, dynamic=False)


def plain(function: Callable[..., Any]) -> Callable[[], Callable[..., Any]]:
    """A provider's `load` that gives the function itself."""
    return lambda: function
