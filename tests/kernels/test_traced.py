"""A function that launches kernels: called directly, an operator only where it is traced."""

import pytest
import torch
from torch import Tensor

from kernels.traced import traced


@traced("trident_test::doubled")
def _doubled(x: Tensor) -> Tensor:
    return 2 * x.detach()


@_doubled.register_fake
def _(x: Tensor) -> Tensor:
    return torch.empty_like(x)


@traced("trident_test::fill", writes=("out",))
def _fill(out: Tensor, again: Tensor | None, number: float) -> None:
    out.detach().numpy()[:] = number  # as a kernel writes: torch does not see it


@traced("trident_test::fill_some", writes=("out", "more"))
def _fill_some(out: Tensor, more: Tensor | None) -> None:
    out.detach().numpy()[:] = 1


def operators(run: object) -> list[str]:
    """Names of our operators that torch dispatches while it runs."""
    with torch.profiler.profile() as profile:
        run()
    return [event.name for event in profile.events() if event.name.startswith("trident_test")]


def test_a_direct_call_dispatches_no_operator() -> None:
    x = torch.arange(3.0)
    assert operators(lambda: _doubled(x)) == []
    assert _doubled(x).tolist() == [0, 2, 4]


def test_a_compiled_call_is_one_operator_of_the_graph() -> None:
    graphs = []

    def backend(graph: torch.fx.GraphModule, inputs: list[Tensor]) -> object:
        graphs.append([str(node.target) for node in graph.graph.nodes])
        return graph.forward

    compiled = torch.compile(lambda x: _doubled(x) + 1, backend=backend, fullgraph=True)
    assert compiled(torch.arange(3.0)).tolist() == [1, 3, 5]
    assert len([name for name in graphs[0] if name.startswith("trident_test")]) == 1


def test_autograd_is_told_of_what_was_written() -> None:
    out = torch.zeros(3)
    version = out._version
    _fill(out, None, 4.0)
    assert out.tolist() == [4, 4, 4]
    assert out._version == version + 1
    _fill_some(out, None)  # an argument that is not there has no version
    assert out._version == version + 2


def test_a_tensor_that_autograd_keeps_may_not_be_written() -> None:
    leaf = torch.ones(3, requires_grad=True)
    kept = leaf * 2
    loss = (kept * kept).sum()
    _fill(kept, None, 4.0)
    with pytest.raises(RuntimeError, match="modified by an inplace operation"):
        loss.backward()
