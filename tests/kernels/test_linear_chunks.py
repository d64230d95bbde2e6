"""The head's matrix products: rows in chunks, gradients that add up, and where they go."""

from collections.abc import Callable

import pytest
import torch
from torch import Tensor
from torch._subclasses.fake_tensor import FakeTensorMode
from torch.utils._python_dispatch import TorchDispatchMode

from kernels.joins import Joins
from kernels.linear_chunks import Chunks, Gradients, LinearSpec, add_matmul, deliver, matmul
from kernels.row_state import RowSpec
from tests.kernels.oracle import largest_difference

WIDTH = 97
ROWS = RowSpec(num_valid_vocab=WIDTH, with_entropy=False)


def cut(num_rows: int = 11, dtype: torch.dtype = torch.float32, **spec: object) -> Chunks:
    """Random rows [T, 40] beside a head [97, 40], with room for four rows of logits."""
    hidden, weight = (torch.randn(n, 40).to(dtype) for n in (num_rows, WIDTH))
    options = {"rows": ROWS, "workspace_bytes": 4 * WIDTH * 4, **spec}
    return Chunks(hidden, weight, torch.arange(num_rows), LinearSpec(**options))


def test_every_row_is_in_one_chunk_and_its_logits_are_the_product() -> None:
    chunks = cut()
    assert [chunk for chunk, _ in chunks] == [slice(0, 4), slice(4, 8), slice(8, 11)]
    for chunk, hidden in chunks:
        assert hidden.equal(chunks.hidden[chunk])
        want = chunks.hidden[chunk] @ chunks.weight.T
        assert largest_difference(chunks.logits(hidden), want) < 1e-5


def test_only_the_rows_of_the_index_are_computed() -> None:
    index = torch.tensor([9, 0, 3, 4, 7])
    chunks = cut(row_index=index)
    assert chunks.num_rows == 5
    assert chunks.labels.equal(index)  # a row's label is its number here
    assert torch.cat([hidden for _, hidden in chunks]).equal(chunks.hidden[index])


def test_dz_lies_over_the_front_of_each_row_of_logits() -> None:
    chunks = cut(dtype=torch.bfloat16)
    logits = chunks.logits(chunks.hidden[:4])
    over = chunks.memory_of_dz(logits)
    assert over.shape == logits.shape and over.dtype == torch.bfloat16
    assert over.data_ptr() == logits.data_ptr()
    assert over[1].data_ptr() == logits[1].data_ptr()


@pytest.mark.parametrize("index", [None, [9, 0, 3, 4, 7]])
def test_gradients_add_up_over_chunks(index: list[int] | None) -> None:
    started: list[int] = []

    def start(total: Tensor) -> Callable[[], Tensor]:
        started.append(int(total.ne(0).any(1).sum()))
        return lambda: 2 * total

    rows = None if index is None else torch.tensor(index)
    chunks = cut(row_index=rows, joins=Joins(start_reduction=start))
    gradients = Gradients(chunks, total=None, needs=(True, True))
    dz = torch.randn(chunks.num_rows, WIDTH)
    for chunk, hidden in chunks:
        gradients.add(dz[chunk], chunk, hidden)
    assert started == [chunks.num_rows], "once, when the last chunk is in"
    picked = slice(None) if rows is None else rows
    want = torch.zeros(11, 40)
    want[picked] = 2 * dz @ chunks.weight
    assert largest_difference(gradients.hidden_result(), want) < 1e-4
    assert largest_difference(gradients.weight_result(), dz.T @ chunks.hidden[picked]) < 1e-4


def test_without_rows_gradients_are_zeros_and_the_other_shards_are_met() -> None:
    met: list[Tensor] = []

    def start(total: Tensor) -> Callable[[], Tensor]:
        met.append(total)
        return lambda: total

    chunks = cut(row_index=torch.empty(0, dtype=torch.int64), joins=Joins(start_reduction=start))
    gradients = Gradients(chunks, total=None, needs=(True, True))
    assert list(chunks) == []
    assert gradients.hidden_result().eq(0).all()
    assert gradients.weight_result().eq(0).all()
    assert len(met) == 1


def test_a_gradient_that_nobody_needs_is_not_made() -> None:
    chunks = cut()
    gradients = Gradients(chunks, total=None, needs=(False, False))
    for chunk, hidden in chunks:
        gradients.add(torch.randn(len(hidden), WIDTH), chunk, hidden)
    assert gradients.hidden_result() is None
    assert gradients.weight_result() is None


def test_the_weights_gradient_goes_to_main_grad_or_to_autograd() -> None:
    weight, total = torch.randn(3, 4).bfloat16(), torch.randn(3, 4)
    assert deliver(None, weight, LinearSpec(rows=ROWS)) is None
    assert deliver(total, weight, LinearSpec(rows=ROWS)).equal(total.bfloat16())
    main_grad = torch.ones(3, 4)
    spec = LinearSpec(rows=ROWS, main_grad=main_grad)
    assert deliver(total, weight, spec) is None
    assert torch.allclose(main_grad, 1 + total)
    hooked = LinearSpec(rows=ROWS, main_grad=main_grad, returns_zero_weight_grad=True)
    assert deliver(total, weight, hooked, torch.tensor(0.5)).eq(0).all()
    assert torch.allclose(main_grad, 1 + 1.5 * total)


def test_products_of_half_precision_are_not_rounded_on_a_cpu_either() -> None:
    a, b = torch.randn(5, 300).bfloat16(), torch.randn(300, 6).bfloat16()
    exact = a.double() @ b.double()
    assert largest_difference(matmul(a, b, torch.empty(5, 6)), exact) < 1e-4
    total = torch.ones(5, 6)
    add_matmul(total, a, b)
    assert largest_difference(total, 1 + exact) < 1e-4


class Recorder(TorchDispatchMode):
    """The operators that ran, with their overloads."""

    def __init__(self) -> None:
        super().__init__()
        self.names: list[str] = []

    def __torch_dispatch__(self, operator, types, args=(), kwargs=None):
        self.names.append(str(operator))
        return operator(*args, **(kwargs or {}))


@pytest.mark.skipif(torch.cuda.is_available(), reason="a GPU runs it")
@pytest.mark.parametrize("dtype", [torch.float16, torch.bfloat16])
def test_a_gpu_sums_products_of_half_precision_in_fp32(dtype: torch.dtype) -> None:
    with FakeTensorMode(), Recorder() as recorder:  # shapes on a GPU that is not there
        hidden, weight = (torch.empty(n, 40, dtype=dtype, device="cuda:0") for n in (12, WIDTH))
        out = torch.empty(12, WIDTH, device="cuda:0")
        assert matmul(hidden, weight.t(), out).dtype == torch.float32
    # The operands go in as they are, and nothing is rounded to their precision on its way out.
    assert recorder.names[-1] == "aten.mm.dtype_out"
    assert not any("_to_copy" in name for name in recorder.names)
    assert "dtype_out" in torch.ops.aten.addmm.overloads()  # what add_matmul calls there
