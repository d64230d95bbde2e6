import math
import warnings
from collections.abc import Callable
from typing import Any

import numpy as np
import pytest
import torch
from torch.utils._python_dispatch import TorchDispatchMode

from engine.data.batches import PackedBatch, pack
from engine.data.examples import Example
from engine.errors import UserError
from engine.losses import NegativeLogLikelihood
from engine.ranks.parallel import Parallel
from engine.ranks.start import start_parallel
from engine.settings.adam import AdamConfig
from engine.settings.layout import ParallelLayout
from engine.training.network import Network
from engine.training.optimizer import Optimizer, StepResult
from engine.training.passes import forward_backward
from tests.tiny import random_network


@pytest.fixture
def parallel() -> Parallel:
    return start_parallel(ParallelLayout(), seed=1)


def batch() -> PackedBatch:
    tokens = np.random.default_rng(0).integers(0, 100, 40)
    return pack([Example(tokens=tokens, prompt_length=1)], multiple_of=1)


def take_step(optimizer: Optimizer, position: int, *, scale: float = 1.0) -> StepResult:
    optimizer.zero_gradients()
    here = batch().to(optimizer.network.parallel.device)
    forward_backward(optimizer.network, [here], NegativeLogLikelihood(39), scale=scale)
    return optimizer.step(position)


def weights(network: Network) -> dict[str, torch.Tensor]:
    return {name: p.detach().clone() for name, p in network.modules[0].named_parameters()}


def masters(optimizer: Optimizer) -> list[torch.Tensor]:
    return [master for _, _, master in optimizer.owned_masters()]


def rates(parallel: Parallel, config: AdamConfig, positions: list[int]) -> list[float]:
    optimizer = Optimizer(random_network("language", parallel), config, total_steps=100)
    return [take_step(optimizer, position).lr for position in positions]


def test_cosine_falls_from_lr_to_a_tenth(parallel: Parallel):
    # lr(t) = 0.1 + 0.9 (1 + cos(pi t / 100)) / 2
    found = rates(parallel, AdamConfig(lr=1.0), [0, 25, 50, 100, 200])
    quarter = 0.1 + 0.45 * (1 + math.cos(math.pi / 4))
    assert found == pytest.approx([1.0, quarter, 0.55, 0.1, 0.1])


def test_warmup_rises_from_a_tenth_over_ten(parallel: Parallel):
    config = AdamConfig(lr=2.0, schedule="constant", warmup=10)
    found = rates(parallel, config, [0, 1, 5, 10, 11, 100])
    assert found == pytest.approx([0.2, 0.38, 1.1, 2.0, 2.0, 2.0])


def test_constant_schedule_has_no_warmup_by_default(parallel: Parallel):
    assert rates(parallel, AdamConfig(lr=0.5, schedule="constant"), [0, 7, 99]) == [0.5] * 3


def test_steps_are_adams(parallel: Parallel):
    network = random_network("language", parallel)
    optimizer = Optimizer(network, AdamConfig(lr=1e-3, clip_norm=1e9), total_steps=100)
    plain = {name: w.clone().requires_grad_() for name, w in weights(network).items()}
    adam = torch.optim.Adam(plain.values(), lr=1e-3, betas=(0.9, 0.95), eps=1e-8)
    for step in range(3):
        lr = take_step(optimizer, step).lr
        for name, parameter in network.modules[0].named_parameters():
            plain[name].grad = parameter.main_grad.clone()
        adam.param_groups[0]["lr"] = lr
        adam.step()
    for name, weight in weights(network).items():
        torch.testing.assert_close(weight, plain[name].detach(), rtol=1e-5, atol=1e-6)


def test_gradients_are_clipped_to_a_global_norm(parallel: Parallel):
    norms = {}
    for clip_norm in (1e9, 0.01):
        network = random_network("language", parallel)
        optimizer = Optimizer(network, AdamConfig(lr=1e-3, clip_norm=clip_norm), total_steps=9)
        norms[clip_norm] = take_step(optimizer, 0).grad_norm
        (inner,) = optimizer._distributed()
        # Adam's first moment is a tenth of the gradient that it was given.
        moments = [state["exp_avg"] for state in inner.optimizer.state.values()]
        applied = 10 * torch.cat([moment.flatten() for moment in moments]).norm()
        assert applied == pytest.approx(min(clip_norm, norms[clip_norm]), rel=1e-3)
    assert norms[1e9] == norms[0.01] > 0.1  # what is reported is the norm before clipping


def test_reported_norm_is_the_gradients(parallel: Parallel):
    optimizer = Optimizer(random_network("language", parallel), AdamConfig(), total_steps=9)
    optimizer.zero_gradients()
    forward_backward(optimizer.network, [batch()], NegativeLogLikelihood(39))
    parameters = optimizer.network.modules[0].parameters()
    expected = torch.cat([p.main_grad.flatten() for p in parameters]).norm().item()
    assert optimizer.step(0).grad_norm == pytest.approx(expected, rel=1e-5)


def test_weight_decay_takes_from_matrices_only(parallel: Parallel):
    network = random_network("language", parallel)
    before = weights(network)
    config = AdamConfig(lr=0.1, weight_decay=0.5, schedule="constant")
    take_step(Optimizer(network, config, total_steps=9), 0, scale=0.0)
    for name, weight in weights(network).items():
        kept = 0.95 if before[name].ndim == 2 else 1.0
        torch.testing.assert_close(weight, kept * before[name])


def test_zeroed_gradients_hold_nothing_of_the_step_before(parallel: Parallel):
    optimizer = Optimizer(random_network("language", parallel), AdamConfig(), total_steps=9)
    first = take_step(optimizer, 0)
    optimizer.zero_gradients()
    assert all((p.main_grad == 0).all() for p in optimizer.network.modules[0].parameters())
    assert first.grad_norm > 0


@pytest.mark.parametrize("dtype", ["bf16", "fp16"])
def test_masters_are_fp32_and_move_by_less_than_the_weights_can(dtype: str, parallel: Parallel):
    network = random_network("language", parallel, dtype=dtype)
    optimizer = Optimizer(network, AdamConfig(lr=1e-6, schedule="constant"), total_steps=99)
    before = [master.clone() for master in masters(optimizer)]
    weights_before = weights(network)
    for step in range(3):
        assert not take_step(optimizer, step).was_skipped
    for parameter, bounds, master in optimizer.owned_masters():
        assert master.dtype is torch.float32
        rounded = master.to(network.dtype)
        assert torch.equal(parameter.detach().flatten()[bounds], rounded)
    moves = torch.cat([(a - b).abs() for a, b in zip(masters(optimizer), before, strict=True)])
    assert 0 < moves.max() <= 3.1e-6
    same = [torch.equal(w, weights_before[name]) for name, w in weights(network).items()]
    assert any(same)  # the norms' scales around 1 cannot move so little


def test_fp16_overflow_skips_the_step_and_halves_the_scale(parallel: Parallel):
    network = random_network("language", parallel, dtype="fp16")
    optimizer = Optimizer(network, AdamConfig(lr=1e-3), total_steps=9)
    scale = optimizer.megatron.get_loss_scale().item()
    assert scale == 2.0**16
    before = weights(network)
    for _ in range(2):  # megatron's scaler forgives one overflow (hysteresis 2)
        result = take_step(optimizer, 0, scale=1e38)
        assert result.was_skipped
    assert all(torch.equal(w, before[name]) for name, w in weights(network).items())
    assert optimizer.megatron.get_loss_scale().item() == scale / 2
    result = take_step(optimizer, 0)
    assert not result.was_skipped
    assert math.isfinite(result.grad_norm)
    assert not torch.equal(
        weights(network)["embedding.word_embeddings.weight"],
        before["embedding.word_embeddings.weight"],
    )


def test_loss_scale_leaves_no_trace_in_the_norm(parallel: Parallel):
    found = {}
    for dtype in ("fp32", "fp16"):
        network = random_network("language", parallel, dtype=dtype)
        optimizer = Optimizer(network, AdamConfig(), total_steps=9)
        found[dtype] = take_step(optimizer, 0).grad_norm
    assert found["fp16"] == pytest.approx(found["fp32"], rel=0.02)


def test_masters_adopt_weights_that_were_loaded(parallel: Parallel):
    network = random_network("language", parallel, dtype="bf16")
    optimizer = Optimizer(network, AdamConfig(), total_steps=9)
    with torch.no_grad():
        for parameter in network.modules[0].parameters():
            parameter.fill_(0.5)
    optimizer.adopt_weights()
    assert all((master == 0.5).all() for master in masters(optimizer))


def test_weights_follow_masters_that_were_changed(parallel: Parallel):
    network = random_network("language", parallel, dtype="bf16")
    optimizer = Optimizer(network, AdamConfig(), total_steps=9)
    for master in masters(optimizer):
        master.fill_(0.25)
    optimizer.sync_weights()
    assert all((weight == 0.25).all() for weight in weights(network).values())


def num_tensors(value: Any) -> int:
    """The tensors in a list of lists."""
    return sum(map(num_tensors, value)) if isinstance(value, list) else torch.is_tensor(value)


class HostReads(TorchDispatchMode):
    """Counts the numbers and tensors that the host reads from the device."""

    def __init__(self, monkeypatch: pytest.MonkeyPatch) -> None:
        super().__init__()
        self.count = 0
        # Of CPU tensors these reach no dispatcher. torch.tensor reads the tensors in a list.
        for owner, name in ((torch.Tensor, "tolist"), (torch.Tensor, "cpu"), (torch, "tensor")):
            monkeypatch.setattr(owner, name, self._counting(getattr(owner, name)))

    def _counting(self, plain: Callable) -> Callable:
        def read(value: Any, *arguments: Any, **named: Any) -> Any:
            self.count += num_tensors(value)
            return plain(value, *arguments, **named)

        return read

    def __torch_dispatch__(self, func, types, args=(), kwargs=None):
        reads = (torch.ops.aten._local_scalar_dense, torch.ops.aten.equal, torch.ops.aten.nonzero)
        self.count += func.overloadpacket in reads
        return func(*args, **(kwargs or {}))


@pytest.mark.parametrize("dtype", ["fp32", "bf16", "fp16"])
@pytest.mark.parametrize("clip_norm", [1e9, 1e-3])
def test_a_step_reads_one_number_of_the_device_once(
    dtype: str, clip_norm: float, parallel: Parallel, monkeypatch: pytest.MonkeyPatch
):
    network = random_network("language", parallel, dtype=dtype)
    optimizer = Optimizer(network, AdamConfig(clip_norm=clip_norm), total_steps=9)
    optimizer.zero_gradients()
    forward_backward(network, [batch()], NegativeLogLikelihood(39))
    assert len(masters(optimizer)) > 40
    with HostReads(monkeypatch) as reads:
        assert not optimizer.step(0).was_skipped
    assert reads.count == 1


@pytest.mark.gpu
@pytest.mark.parametrize("dtype", ["fp32", "bf16", "fp16"])
def test_a_step_waits_for_a_gpu_once(dtype: str, parallel: Parallel):
    network = random_network("language", parallel, dtype=dtype)
    optimizer = Optimizer(network, AdamConfig(clip_norm=1e-3), total_steps=9)
    take_step(optimizer, 0)  # Adam's state is there, the first time's waits are over
    optimizer.zero_gradients()
    forward_backward(network, [batch().to(parallel.device)], NegativeLogLikelihood(39))
    torch.cuda.set_sync_debug_mode("warn")
    try:
        with warnings.catch_warnings(record=True) as seen:
            warnings.simplefilter("always")
            optimizer.step(1)
    finally:
        torch.cuda.set_sync_debug_mode("default")
    assert len([w for w in seen if "synchroniz" in str(w.message)]) == 1


def test_host_reads_are_seen(parallel: Parallel, monkeypatch: pytest.MonkeyPatch):
    with HostReads(monkeypatch) as reads:
        a, b = torch.ones(()), torch.ones(())
        for read in (lambda: float(a), lambda: bool(a), lambda: torch.stack([a, b]).tolist()):
            read()
        torch.tensor([[a, b]])
    assert reads.count == 1 + 1 + 1 + 2


@pytest.mark.parametrize("dtype", ["fp32", "bf16"])
def test_fused_adam_agrees_with_torchs_plain_one(dtype: str, parallel: Parallel):
    found: dict[bool, list[torch.Tensor]] = {True: [], False: []}
    for fused in found:
        network = random_network("language", parallel, dtype=dtype)
        config = AdamConfig(lr=1e-3, weight_decay=0.1, epsilon=1e-6)
        optimizer = Optimizer(network, config, total_steps=9)
        (inner,) = optimizer._distributed()
        assert all(group["fused"] for group in inner.optimizer.param_groups)
        for group in inner.optimizer.param_groups:
            group["fused"] = fused
        for step in range(3):
            take_step(optimizer, step)
            found[fused].append(torch.cat([m.flatten() for m in masters(optimizer)]))
    # The first step is of the same gradients; those of the next ones differ by a rounding, of which
    # Adam makes more where a gradient is nothing else (attention's key biases).
    for ours, theirs, atol in zip(found[True], found[False], (2e-7, 2e-5, 2e-5), strict=True):
        scale = 1 if dtype == "fp32" else 10  # bf16 weights may round to the other side
        torch.testing.assert_close(ours, theirs, rtol=1e-6, atol=atol * scale)


def test_counts_of_steps_lie_beside_the_masters_and_are_counted_apart(parallel: Parallel):
    optimizer = Optimizer(random_network("language", parallel), AdamConfig(), total_steps=9)
    optimizer.prepare_state()
    take_step(optimizer, 0)
    state = optimizer.counts()
    other = Optimizer(random_network("language", parallel), AdamConfig(), total_steps=9)
    other.prepare_state()
    (inner,) = other._distributed()
    counts = {"total": 0, "in_a_row": 0, "num_searching": 0, "num_taken": 1, "since_taken": 0}
    assert state == {"step": 1.0, "skipped": counts}
    other.load_counts(state)
    assert all(group["fused"] for group in inner.optimizer.param_groups)
    take_step(other, 1)
    for master, adam in inner.optimizer.state.items():
        assert adam["step"].device == master.device
        assert adam["step"].item() == 2


def test_fp16_steps_count_against_the_run_at_the_smallest_scale_only(parallel: Parallel):
    network = random_network("language", parallel, dtype="fp16")
    optimizer = Optimizer(network, AdamConfig(max_skipped_steps=3), total_steps=9)
    num_steps = 0
    while not optimizer.skipped.is_stuck and num_steps < 99:
        assert take_step(optimizer, 0, scale=1e38).was_skipped
        num_steps += 1
    # One is forgiven, 16 halve 2^16 to 1, and the three after them have no scale to blame.
    assert num_steps == 1 + 16 + 3
    assert optimizer.skipped.total == num_steps


def test_learning_rate_must_be_positive(parallel: Parallel):
    network = random_network("language", parallel)
    for lr in (0.0, -1.0):
        with pytest.raises(UserError, match="lr must be positive"):
            Optimizer(network, AdamConfig(lr=lr), total_steps=9)
