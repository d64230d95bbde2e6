"""What a call asks of a GPU: how many kernels, and that torch adds none of its own."""

from collections import Counter

import pytest
import torch
from torch import Tensor
from torch.utils._python_dispatch import TorchDispatchMode

from kernels import gae as gae_module
from kernels import policy_loss, row_gradient, row_merge, row_state, sample_state, value_loss
from kernels import sample as sample_module
from kernels.gae import gae
from kernels.joins import Joins, write_joined_results
from kernels.linear_logprobs import linear_logprobs_loss
from kernels.logprobs import logprobs
from kernels.moments import Whitening
from kernels.policy_loss import policy_metrics, policy_token_losses
from kernels.row_state import RowSpec, empty_results
from kernels.sample import sample

MASK = torch.arange(12) % 3 > 0
CU_SEQLENS = torch.tensor([0, 5, 12], dtype=torch.int32)
WITHOUT_WORK = {"empty", "new_empty", "empty_like", "detach", "unbind", "select", "slice",
                "promote_types", "view", "t", "expand",
                "alias"}  # fmt: skip


class Launches:
    """Stands for a kernel: counts its launches and runs nothing."""

    def __init__(self, name: str, counts: Counter) -> None:
        self.name, self.counts = name, counts

    def __getitem__(self, grid: tuple[int, ...]) -> object:
        def launch(*args: object, **options: object) -> None:
            self.counts[self.name] += 1

        return launch


class TorchWork(TorchDispatchMode):
    """Counts torch's own operations on memory."""

    def __init__(self, counts: Counter) -> None:
        super().__init__()
        self.counts = counts

    def __torch_dispatch__(self, func, types, args=(), kwargs=None):  # noqa: ANN001
        name = func.__name__.split(".")[0]
        if name not in WITHOUT_WORK:
            self.counts[name] += 1
        return func(*args, **(kwargs or {}))


@pytest.fixture
def counts(interpreter: None, monkeypatch: pytest.MonkeyPatch) -> Counter:
    """Launches and torch's operations, by name; no kernel runs."""
    counts: Counter = Counter()
    modules = (gae_module, policy_loss, row_gradient, row_merge, row_state, sample_module,
               sample_state, value_loss)  # fmt: skip
    for module in modules:
        for name in [name for name in vars(module) if name.endswith("_kernel")]:
            monkeypatch.setattr(module, name, Launches(name, counts))
    return counts


def tokens(*, with_gradient: bool = False) -> list[Tensor]:
    return [torch.randn(12).requires_grad_(with_gradient and i == 0) for i in range(3)]


@pytest.mark.parametrize("kl_coef", [0.1, torch.tensor(0.1)])
def test_gae_is_one_launch(counts: Counter, kl_coef: float | Tensor) -> None:
    inputs = (*tokens(), torch.randn(2))
    with TorchWork(counts):
        gae(*inputs, CU_SEQLENS, MASK, kl_coef=kl_coef)
    assert counts == {"_gae_kernel": 1}


def test_the_policy_loss_is_one_launch_and_its_metrics_two(counts: Counter) -> None:
    count, whitening = torch.tensor(8), Whitening(torch.zeros(()), torch.ones(()))
    policy, rows = tuple(tokens()), torch.arange(12)
    with TorchWork(counts):
        *_, terms = policy_token_losses(policy, rows, count, whitening=whitening)
    assert counts == {"_token_losses_kernel": 1}
    counts.clear()
    with TorchWork(counts):
        policy_metrics(terms, MASK, count)
    assert counts == {"_metrics_kernel": 1, "_reduce_kernel": 1}


def test_the_value_loss_is_one_launch_and_one_reduction(counts: Counter) -> None:
    value, count = tokens(with_gradient=True), torch.tensor(8)
    with TorchWork(counts):
        result = value_loss.value_loss(*value, MASK, count)
    assert counts == {"_loss_kernel": 1, "_reduce_kernel": 1}
    counts.clear()
    one = torch.ones(())
    with TorchWork(counts):
        torch.autograd.grad(result.loss, value[0], one)
    assert counts == {"mul": 1}  # by what comes from above


@pytest.mark.parametrize("seed", [1, torch.tensor(1)])
@pytest.mark.parametrize("width", [100, 5000])
def test_a_sample_is_one_read_and_one_merge(
    counts: Counter, width: int, seed: int | Tensor
) -> None:
    logits, index = torch.randn(3, width), torch.arange(3)
    with TorchWork(counts):
        sample(logits, temperature=0.7, seed=seed, sample_index=index, position=index)
    assert counts == {"_sample_kernel": 1, "_merge_kernel": 1}


@pytest.mark.parametrize("with_entropy", [False, True])
def test_logprobs_are_one_launch_each_way(counts: Counter, with_entropy: bool) -> None:
    logits, labels = torch.randn(12, 100).requires_grad_(), torch.arange(12)
    with TorchWork(counts):
        outputs = logprobs(logits, labels, with_entropy=with_entropy)
    assert counts == {"_row_state_kernel": 1}
    counts.clear()
    grads = [torch.ones(()).expand(12) for output in outputs if output is not None]
    with TorchWork(counts):
        torch.autograd.grad(outputs[: len(grads)], logits, grads)
    assert counts == {"_row_gradient_kernel": 1}


def test_shards_are_merged_in_one_launch(counts: Counter) -> None:
    joins = Joins(gather_states=lambda state: state.new_empty(2, *state.shape))
    logits, labels, spec = torch.randn(12, 100), torch.arange(12), RowSpec(num_valid_vocab=200)
    results = empty_results(12, logits, with_entropy=True)
    with TorchWork(counts):
        write_joined_results(results, logits, labels, spec, joins)
    assert counts == {"_row_state_kernel": 1, "_merge_kernel": 1}


@pytest.mark.parametrize("loss", ["likelihood", "policy"])
def test_a_chunk_of_the_head_is_three_products_and_the_row_kernels(
    counts: Counter, loss: str
) -> None:
    hidden, weight = torch.randn(12, 8).requires_grad_(), torch.randn(50, 8).requires_grad_()
    slope, old, advantages = torch.tensor(-0.1), torch.randn(12), torch.randn(12)
    token_losses = {
        "likelihood": lambda x, rows: (x * slope, slope.expand(len(x))),
        "policy": lambda x, rows: policy_token_losses((x, old, advantages), rows, slope),
    }

    def counted(num_chunks: int) -> Counter:
        counts.clear()
        rows = torch.arange(12)  # given, so that nothing is compacted
        with TorchWork(counts):
            linear_logprobs_loss(
                hidden,
                weight,
                rows,
                token_losses[loss],
                row_index=rows,
                workspace_bytes=4 * 50 * (12 // num_chunks),
            )
        return counts.copy()

    per_chunk = counted(4) - counted(3)
    small = {"mul"} if loss == "likelihood" else {"_token_losses_kernel"}
    # index_select and index_copy_ are of the rows picked here.
    rows_picked = {"index_select", "index_copy_"}
    assert set(per_chunk) == {"_row_state_kernel", "_row_gradient_kernel"} | small | rows_picked | {
        "mm", "addmm_"
    }  # fmt: skip
    assert per_chunk.total() == 3 + 2 + 1 + 2
