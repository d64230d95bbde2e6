"""A function that launches kernels: an operator of torch while torch.compile traces it.

Called in any other way it runs directly. Dispatching an operator of one tensor takes the host 9 us
(torch 2.13, one idle core of an AMD EPYC), and more with every argument: as long as a small kernel
takes the device. Functions that write into their arguments stay operators
throughout: autograd has to learn that a tensor it keeps is no longer what it was.
"""

from collections.abc import Callable
from typing import Any

import torch


class Traced:
    """Calls `function(*args)`, as the operator `name` where it is being traced.

    The function writes into none of its arguments and has a fake by `register_fake`. Gradients do
    not flow through it; autograd functions are around it.
    """

    def __init__(self, name: str, function: Callable[..., Any]) -> None:
        self._function = function
        self._operator = torch.library.custom_op(name, function, mutates_args=())
        self.register_fake = self._operator.register_fake

    def __call__(self, *args: object) -> Any:
        if not torch.compiler.is_compiling():
            return self._function(*args)
        with torch.no_grad():
            return self._operator(*args)


def traced(name: str) -> Callable[[Callable[..., Any]], Traced]:
    """Decorator that makes a function `Traced` under the name of an operator."""
    return lambda function: Traced(name, function)
