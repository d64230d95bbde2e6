"""A function that launches kernels: an operator of torch while torch.compile traces it.

Called in any other way it runs directly. Dispatching an operator of one tensor takes the host 9 us
(torch 2.13, one idle core of an AMD EPYC), and more with every argument: as long as a small kernel
takes the device. Where a function writes into an argument, autograd is told of it either way: a
tensor it keeps may no longer be what it was.
"""

import inspect
from collections.abc import Callable
from typing import Any

import torch


class Traced:
    """Calls `function(*args)`, as the operator `name` where it is being traced.

    The function writes into the arguments of the names `writes` alone and has a fake by
    `register_fake`, unless it returns nothing. Gradients do not flow through it; autograd functions
    are around it.
    """

    def __init__(
        self, name: str, function: Callable[..., Any], writes: tuple[str, ...] = ()
    ) -> None:
        self._function = function
        self._operator = torch.library.custom_op(name, function, mutates_args=writes)
        self.register_fake = self._operator.register_fake
        names = list(inspect.signature(function).parameters)
        self._written = [names.index(argument) for argument in writes]

    def __call__(self, *args: Any) -> Any:
        if torch.compiler.is_compiling():
            with torch.no_grad():
                return self._operator(*args)
        result = self._function(*args)
        for position in self._written:
            if args[position] is not None:
                torch.autograd.graph.increment_version(args[position])
        return result


def traced(name: str, *, writes: tuple[str, ...] = ()) -> Callable[[Callable[..., Any]], Traced]:
    """Decorator that makes a function `Traced` under the name of an operator."""
    return lambda function: Traced(name, function, writes)
