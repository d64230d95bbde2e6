"""Rewards, advantages and returns of packed sequences against a loop over their tokens."""

import pytest
import torch
from hypothesis import given, settings
from hypothesis import strategies as st
from torch import Tensor

from kernels import gae as gae_module
from kernels.gae import GaeResult, compose, gae, gae_reference
from kernels.moments import merge_moments
from tests.kernels.oracle import largest_difference

LENGTHS = (1, 7, 0, 64, 33, 65)


@pytest.fixture(autouse=True)
def small_blocks(monkeypatch: pytest.MonkeyPatch) -> None:
    """Blocks of 32 tokens, so that sequences span several and hand a carry on."""
    monkeypatch.setattr(gae_module, "_MAX_BLOCK", 32)


def cumulative(lengths: tuple[int, ...]) -> Tensor:
    return torch.tensor((0, *lengths)).cumsum(0).to(torch.int32)


def random_rollout(lengths: tuple[int, ...], *, density: float = 0.7) -> tuple[Tensor, ...]:
    """logprobs, ref_logprobs, values, scores, cu_seqlens and a response mask with holes."""
    num_tokens = sum(lengths)
    logprobs, ref_logprobs, values = torch.randn(3, num_tokens)
    mask = torch.rand(num_tokens) < density
    return logprobs, ref_logprobs, values, torch.randn(len(lengths)), cumulative(lengths), mask


def exact_gae(
    rollout: tuple[Tensor, ...], kl_coef: float, gamma: float, lam: float, kind: str
) -> Tensor:
    """[4, T] fp64 rewards, advantages, returns and kl, one response token at a time."""
    logprobs, ref_logprobs, values, scores = (x.double() for x in rollout[:4])
    cu_seqlens, mask = rollout[4:]
    out = torch.zeros(4, len(mask), dtype=torch.float64)
    for b, score in enumerate(scores):
        next_value = next_advantage = 0.0
        is_last = True
        for t in reversed(range(cu_seqlens[b], cu_seqlens[b + 1])):
            if not mask[t]:
                continue
            r = logprobs[t] - ref_logprobs[t]
            kl = {"k1": r, "k2": r * r / 2, "k3": torch.expm1(-r) + r}[kind]
            reward = -kl_coef * kl + (score if is_last else 0.0)
            delta = reward + gamma * next_value - values[t]
            next_advantage = delta + gamma * lam * next_advantage
            next_value, is_last = values[t], False
            out[:, t] = torch.stack((reward, next_advantage, next_advantage + next_value, kl))
    return out


def assert_close(result: GaeResult, exact: Tensor) -> None:
    for got, want in zip(result[:4], exact, strict=True):
        assert got.dtype == torch.float32
        largest = want.abs().max() if want.numel() else 0
        assert largest_difference(got, want) <= 1e-5 * (1 + largest)


@pytest.mark.parametrize(("gamma", "lam"), [(1.0, 0.95), (0.99, 0.0), (1.0, 1.0), (0.0, 0.5)])
def test_matches_the_loop(backend: str, gamma: float, lam: float) -> None:
    rollout = random_rollout(LENGTHS)
    result = gae(*rollout, kl_coef=0.1, gamma=gamma, lam=lam)
    assert_close(result, exact_gae(rollout, 0.1, gamma, lam, "k1"))


@pytest.mark.parametrize("kind", ["k2", "k3"])
def test_other_kl_estimates(backend: str, kind: str) -> None:
    rollout = random_rollout(LENGTHS)
    result = gae(*rollout, kl_coef=0.1, kl_estimator=kind)
    assert_close(result, exact_gae(rollout, 0.1, 1.0, 0.95, kind))
    assert result.kl.min() >= 0


def test_k3_of_nearly_equal_policies_is_not_negative(backend: str) -> None:
    rollout = list(random_rollout((50,), density=1.0))
    rollout[1] = rollout[0] + 1e-4 * torch.randn(50)
    result = gae(*rollout, kl_coef=0.1, kl_estimator="k3")
    exact = exact_gae(tuple(rollout), 0.1, 1.0, 0.95, "k3")[3]
    assert result.kl.min() >= 0
    assert largest_difference(result.kl, exact) < 1e-12


@settings(max_examples=10, deadline=None)
@given(lengths=st.lists(st.integers(0, 40), max_size=5), density=st.sampled_from([0.0, 0.5, 1.0]))
def test_any_packing_matches_the_loop(lengths: list[int], density: float) -> None:
    rollout = random_rollout(tuple(lengths), density=density)
    exact = exact_gae(rollout, 0.2, 0.99, 0.9, "k1")
    assert_close(gae_reference(*rollout, kl_coef=0.2, gamma=0.99, lam=0.9), exact)
    with pytest.MonkeyPatch.context() as patch:
        patch.setenv("TRITON_INTERPRET", "1")
        patch.setattr(gae_module, "_MAX_BLOCK", 16)
        assert_close(gae(*rollout, kl_coef=0.2, gamma=0.99, lam=0.9), exact)


def test_a_packed_sequence_is_the_sequence_alone(backend: str) -> None:
    rollout = random_rollout(LENGTHS)
    packed = gae(*rollout, kl_coef=0.1)
    cu_seqlens = rollout[4].tolist()
    for b, (start, end) in enumerate(zip(cu_seqlens, cu_seqlens[1:], strict=False)):
        tokens = [x[start:end] for x in (*rollout[:3], rollout[5])]
        alone = gae(*tokens[:3], rollout[3][b : b + 1], cumulative((end - start,)), tokens[3],
                    kl_coef=0.1)  # fmt: skip
        for whole, part in zip(packed[:4], alone[:4], strict=True):
            assert torch.equal(whole[start:end], part)


def test_last_response_token_carries_the_score(backend: str) -> None:
    zeros = torch.zeros(6)
    mask = torch.tensor([False, True, False, True, False, False])  # 0 and 4, 5 are not the response
    result = gae(zeros, zeros, zeros, torch.tensor([2.0]), cumulative((6,)), mask, kl_coef=0.1,
                 gamma=0.5, lam=1.0)  # fmt: skip
    assert result.rewards.tolist() == [0, 0, 0, 2, 0, 0]
    # A hole is no step of time: one discount from token 3 to token 1.
    assert result.returns.tolist() == [0, 1, 0, 2, 0, 0]


def test_without_discount_returns_are_sums_of_rewards_to_come(backend: str) -> None:
    rollout = random_rollout((40,), density=1.0)
    result = gae(*rollout, kl_coef=0.1, gamma=1.0, lam=1.0)
    to_come = result.rewards.flip(0).cumsum(0).flip(0)
    assert largest_difference(result.returns, to_come) < 1e-5


def test_lambda_0_is_the_one_step_error(backend: str) -> None:
    rollout = random_rollout((40,), density=1.0)
    result = gae(*rollout, kl_coef=0.1, gamma=0.9, lam=0.0)
    values = rollout[2]
    next_values = torch.cat((values[1:], torch.zeros(1)))
    assert largest_difference(result.advantages, result.rewards + 0.9 * next_values - values) < 1e-5


def test_nothing_outside_the_mask_is_read_or_written(backend: str) -> None:
    rollout = random_rollout(LENGTHS)
    clean = gae(*rollout, kl_coef=0.1)
    mask = rollout[5]
    dirty = [torch.where(mask, x, torch.nan) for x in rollout[:3]]
    for a, b in zip(clean, gae(*dirty, *rollout[3:], kl_coef=0.1), strict=True):
        assert torch.equal(a, b)
    assert all((x[~mask] == 0).all() for x in clean[:4])


def test_nan_stays_in_its_sequence(backend: str) -> None:
    rollout = random_rollout((20, 20, 20), density=1.0)
    rollout[0][30] = torch.nan
    result = gae(*rollout, kl_coef=0.1)
    assert result.advantages[20:31].isnan().all()
    assert result.advantages[:20].isfinite().all()
    assert result.advantages[31:].isfinite().all()
    assert result.stats.isfinite().all(1).tolist() == [True, False, True]


def test_all_masked_and_nothing_at_all(backend: str) -> None:
    result = gae(*random_rollout((5, 3), density=0.0), kl_coef=0.1)
    assert all((x == 0).all() for x in result)
    result = gae(*random_rollout(()), kl_coef=0.1)
    assert [len(x) for x in result] == [0, 0, 0, 0, 0]


def test_stats_merge_to_the_moments_of_all_advantages(backend: str) -> None:
    rollout = random_rollout(LENGTHS)
    result = gae(*rollout, kl_coef=0.1)
    count, mean, squares = merge_moments(result.stats)
    advantages = result.advantages[rollout[5]].double()
    assert count == len(advantages)
    assert mean == pytest.approx(advantages.mean().item(), abs=1e-5)
    assert squares == pytest.approx(
        advantages.var(unbiased=False).item() * len(advantages), rel=1e-5
    )


def test_inputs_may_be_strided(backend: str) -> None:
    rollout = random_rollout(LENGTHS)
    strided = [torch.stack((x, x), dim=1)[:, 0] for x in rollout]
    for a, b in zip(gae(*rollout, kl_coef=0.1), gae(*strided, kl_coef=0.1), strict=True):
        assert torch.equal(a, b)


def test_coefficient_may_be_a_tensor(backend: str) -> None:
    rollout = random_rollout(LENGTHS)
    number, tensor = (gae(*rollout, kl_coef=coef) for coef in (0.25, torch.tensor(0.25)))
    assert all(torch.equal(a, b) for a, b in zip(number, tensor, strict=True))


def test_repeats_bit_for_bit_and_takes_no_gradient(backend: str) -> None:
    rollout = [x.requires_grad_() if x.is_floating_point() else x for x in random_rollout(LENGTHS)]
    first, second = (gae(*rollout, kl_coef=0.1) for _ in range(2))
    assert all(torch.equal(a, b) for a, b in zip(first, second, strict=True))
    assert not any(x.requires_grad for x in first)


def test_the_scan_combines_associatively() -> None:
    # The interpreter scans serially, and would not notice a combination that is not associative.
    maps = torch.randn(3, 2, 50, dtype=torch.float64)
    first, second, third = ((a, b) for a, b in maps)
    left = compose.fn(*compose.fn(*first, *second), *third)
    right = compose.fn(*first, *compose.fn(*second, *third))
    x = torch.randn(50, dtype=torch.float64)
    in_turn = x
    for a, b in maps:
        in_turn = a * in_turn + b
    for a, b in (left, right):
        assert largest_difference(a * x + b, in_turn) < 1e-12


def test_unknown_estimator_is_named() -> None:
    with pytest.raises(ValueError, match="k4"):
        gae(*random_rollout((3,)), kl_coef=0.1, kl_estimator="k4")


def test_compiles_without_a_graph_break(interpreter: None) -> None:
    rollout = random_rollout((5, 9))
    compiled = torch.compile(lambda *x: gae(*x, kl_coef=0.1).advantages, backend="aot_eager",
                             fullgraph=True)  # fmt: skip
    assert torch.equal(compiled(*rollout), gae(*rollout, kl_coef=0.1).advantages)


@pytest.mark.gpu
@pytest.mark.parametrize("lengths", [(1024,) * 512, (1, 70000, 3, 2048, 0, 1025)])
def test_on_a_gpu(lengths: tuple[int, ...], monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.undo()
    rollout = random_rollout(lengths)
    exact = gae_reference(
        *(x.double() if x.is_floating_point() else x for x in rollout), kl_coef=0.1
    )
    on_gpu = [x.cuda() for x in rollout]
    gae(*on_gpu, kl_coef=0.1)
    torch.cuda.set_sync_debug_mode("error")
    results = [gae(*on_gpu, kl_coef=0.1) for _ in range(20)]
    torch.cuda.set_sync_debug_mode("default")
    for result in results[1:]:
        assert all(torch.equal(a, b) for a, b in zip(result, results[0], strict=True))
    for got, want in zip(results[0][:4], exact[:4], strict=True):
        assert largest_difference(got.cpu(), want) < 1e-4 * (1 + want.abs().max())
