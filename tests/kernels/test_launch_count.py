"""What a call asks of a GPU: how many kernels, and that torch adds none of its own."""

from collections import Counter

import pytest
import torch
from torch import Tensor
from torch.utils._python_dispatch import TorchDispatchMode

from kernels import gae as gae_module
from kernels import ppo_loss as ppo_module
from kernels import sample as sample_module
from kernels.gae import gae
from kernels.moments import Whitening
from kernels.ppo_loss import ppo_loss
from kernels.sample import sample

MASK = torch.arange(12) % 3 > 0
CU_SEQLENS = torch.tensor([0, 5, 12], dtype=torch.int32)
WITHOUT_WORK = {"empty", "new_empty", "empty_like", "detach", "unbind", "select", "slice",
                "promote_types"}  # fmt: skip


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
    for module in (gae_module, ppo_module, sample_module):
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


def test_both_ppo_losses_are_one_launch_and_one_reduction(counts: Counter) -> None:
    policy, value = tokens(with_gradient=True), tokens(with_gradient=True)
    count, whitening = torch.tensor(8), Whitening(torch.zeros(()), torch.ones(()))
    with TorchWork(counts):
        results = ppo_loss(policy, value, MASK, count, whitening=whitening)
    assert counts == {"_ppo_kernel": 1, "_reduce_kernel": 1}
    counts.clear()
    grads = torch.ones(()), torch.ones(())
    with TorchWork(counts):
        torch.autograd.grad([r.loss for r in results], (policy[0], value[0]), grads)
    assert counts == {"mul": 2}  # by what comes from above


@pytest.mark.parametrize("seed", [1, torch.tensor(1)])
@pytest.mark.parametrize("width", [100, 5000])
def test_a_sample_is_one_read_and_one_merge(
    counts: Counter, width: int, seed: int | Tensor
) -> None:
    logits, index = torch.randn(3, width), torch.arange(3)
    with TorchWork(counts):
        sample(logits, temperature=0.7, seed=seed, sample_index=index, position=index)
    assert counts == {"_sample_kernel": 1, "_merge_kernel": 1}
