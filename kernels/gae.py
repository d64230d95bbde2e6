"""KL-shaped token rewards, advantages and returns of packed sequences, in one launch.

    r_t = -kl_coef * kl_t  + [t is the last response token] * score
    A_t = r_t + gamma * V_{t+1} - V_t + gamma * lam * A_{t+1},   V = A = 0 after the last token
    R_t = A_t + V_t

where t+1 is the next *response* token: positions outside the mask are skipped, not passed through.
Position t of every tensor belongs to the token at t; values[t] is V of the state in which that
token was chosen. (Schulman et al. 2015 eq. 16; InstructGPT eq. 2 for the reward.)
"""

from typing import NamedTuple, get_args

import torch
import triton
import triton.language as tl
from torch import Tensor

from kernels.kl_estimate import KlEstimator, kl_estimate, token_kl
from kernels.launch import next_power_of_2, num_warps_for, uses_triton
from kernels.moments import block_moments, masked_moments
from kernels.precision import accumulation_dtype, triton_dtype
from kernels.traced import traced

# Tokens a program scans at a time; longer sequences go in blocks, right to left, with a carry.
_MAX_BLOCK = 1024


class GaeResult(NamedTuple):
    """What `gae` returns: [T] tensors in fp32, zero outside the response mask."""

    rewards: Tensor
    """[T] reward of each response token, the KL penalty included."""
    advantages: Tensor
    """[T] not whitened: the loss does that as it reads them."""
    returns: Tensor
    """[T] advantages + values: the value function's target."""
    kl: Tensor
    """[T] estimate of log(policy / reference) at each response token, nats."""
    stats: Tensor
    """[B, 3] moments of each sequence's advantages, for `kernels.moments`."""


@triton.jit
def compose(a_first, b_first, a_second, b_second):
    """The map x -> a x + b that applies `first` and then `second`."""
    return a_first * a_second, b_second + a_second * b_first


@triton.jit
def _token_reward(
    t,
    inside,
    last,
    score,
    kl_coef,
    logprobs,
    ref_logprobs,
    values,
    response_mask,
    KIND: tl.constexpr,
    ACC: tl.constexpr,
):
    """(is a response token, its kl, reward and value) at positions t, zeros elsewhere."""
    valid = tl.load(response_mask + t, mask=inside, other=0) != 0
    logprob = tl.load(logprobs + t, mask=valid, other=0.0).to(ACC)
    ref_logprob = tl.load(ref_logprobs + t, mask=valid, other=0.0).to(ACC)
    value = tl.load(values + t, mask=valid, other=0.0).to(ACC)
    kl = token_kl(logprob - ref_logprob, KIND)
    reward = tl.where(t == last, score, 0.0) - kl_coef * kl
    return valid, kl, tl.where(valid, reward, 0.0), value


@triton.jit(do_not_specialize=["num_tokens"])
def _gae_kernel(
    out,  # [4, T] rewards, advantages, returns, kl
    stats,  # [B, 3] count, mean, squared deviations of the advantages
    logprobs,
    ref_logprobs,
    values,
    response_mask,  # [T]
    scores,  # [B]
    cu_seqlens,  # [B+1]
    kl_coef_ptr,  # [] or None: then the number
    kl_coef,
    gamma,
    lam,
    num_tokens,
    KIND: tl.constexpr,
    ACC: tl.constexpr,
    BLOCK: tl.constexpr,
):
    # One program a sequence. With S_t = gamma V_t + gamma lam A_t, what t hands to its left:
    #   response token   S_t = gamma lam S_{t+1} + gamma V_t + gamma lam (r_t - V_t)
    #   other token      S_t = S_{t+1}
    #   A_t = r_t - V_t + S_{t+1}
    # one scan of affine maps without division, right for holes, lam = 0 and gamma lam = 1.
    sequence = tl.program_id(0).to(tl.int64)
    start = tl.load(cu_seqlens + sequence).to(tl.int64)
    end = tl.load(cu_seqlens + sequence + 1).to(tl.int64)
    score = tl.load(scores + sequence).to(ACC)
    if kl_coef_ptr is not None:
        kl_coef = tl.load(kl_coef_ptr)
    kl_coef = tl.cast(kl_coef, ACC)
    gamma = tl.cast(gamma, ACC)
    gamma_lam = gamma * tl.cast(lam, ACC)
    row = tl.cast(num_tokens, tl.int64)
    lane = tl.arange(0, BLOCK)

    last = tl.full((), -1, tl.int64)  # position of the last response token, once seen
    carry = tl.full((), 0.0, ACC)
    count = tl.full((), 0.0, ACC)
    mean = tl.full((), 0.0, ACC)
    squares = tl.full((), 0.0, ACC)
    for offset in range(0, end - start, BLOCK):
        t = end - 1 - offset - lane  # reversed by index: right to left
        inside = t >= start
        response = tl.load(response_mask + t, mask=inside, other=0) != 0
        last = tl.where(last < 0, tl.max(tl.where(response, t, -1)), last)

        # The map of the right neighbour, so that an inclusive scan yields S_{t+1}.
        valid, kl, reward, value = _token_reward(
            t + 1,
            inside & (t + 1 < end),
            last,
            score,
            kl_coef,
            logprobs,
            ref_logprobs,
            values,
            response_mask,
            KIND,
            ACC,
        )
        a = tl.where(valid, gamma_lam, 1.0)
        b = tl.where(valid, gamma * value + gamma_lam * (reward - value), 0.0)
        a, b = tl.associative_scan((a, b), 0, compose)
        handed = b + a * carry
        carry = tl.sum(tl.where(lane == BLOCK - 1, handed, 0.0))

        valid, kl, reward, value = _token_reward(
            t,
            inside,
            last,
            score,
            kl_coef,
            logprobs,
            ref_logprobs,
            values,
            response_mask,
            KIND,
            ACC,
        )
        advantage = tl.where(valid, reward - value + handed, 0.0)
        tl.store(out + t, reward, mask=inside)
        tl.store(out + row + t, advantage, mask=inside)
        tl.store(out + 2 * row + t, advantage + value, mask=inside)
        tl.store(out + 3 * row + t, kl, mask=inside)

        block_count = tl.sum(valid.to(ACC))
        total = count + block_count
        some = tl.maximum(total, 1.0)
        block_mean, block_squares = block_moments(advantage, valid, block_count)
        delta = block_mean - mean
        squares += block_squares + delta * delta * count * block_count / some
        mean += delta * block_count / some
        count = total
    tl.store(stats + 3 * sequence, count)
    tl.store(stats + 3 * sequence + 1, mean)
    tl.store(stats + 3 * sequence + 2, squares)


@traced("trident::gae")
def _gae(
    logprobs: Tensor,
    ref_logprobs: Tensor,
    values: Tensor,
    scores: Tensor,
    cu_seqlens: Tensor,
    response_mask: Tensor,
    kl_coef_tensor: Tensor | None,
    kl_coef: float,
    gamma: float,
    lam: float,
    kl_estimator: str,
) -> tuple[Tensor, Tensor]:
    """([4, T] rewards, advantages, returns and kl; [B, 3] stats)."""
    dtype = accumulation_dtype(values.dtype)
    num_tokens, num_sequences = len(values), len(scores)
    out = torch.empty(4, num_tokens, dtype=dtype, device=values.device)
    stats = torch.empty(num_sequences, 3, dtype=dtype, device=values.device)
    if num_sequences > 0:
        block = min(_MAX_BLOCK, next_power_of_2(num_tokens))
        with torch.cuda.device_of(values):
            _gae_kernel[(num_sequences,)](
                out,
                stats,
                logprobs.contiguous(),
                ref_logprobs.contiguous(),
                values.contiguous(),
                response_mask.contiguous(),
                scores.contiguous(),
                cu_seqlens.contiguous(),
                kl_coef_tensor,
                kl_coef,
                gamma,
                lam,
                num_tokens,
                KIND=kl_estimator,
                ACC=triton_dtype(dtype),
                BLOCK=block,
                num_warps=num_warps_for(2 * block),  # a scan holds twice the values of a map
            )
    return out, stats


@_gae.register_fake
def _(
    logprobs: Tensor,
    ref_logprobs: Tensor,
    values: Tensor,
    scores: Tensor,
    *_: object,
) -> tuple[Tensor, Tensor]:
    dtype = accumulation_dtype(values.dtype)
    return values.new_empty(4, len(values), dtype=dtype), values.new_empty(
        len(scores), 3, dtype=dtype
    )


def gae_reference(
    logprobs: Tensor,
    ref_logprobs: Tensor,
    values: Tensor,
    scores: Tensor,
    cu_seqlens: Tensor,
    response_mask: Tensor,
    *,
    kl_coef: float | Tensor,
    gamma: float = 1.0,
    lam: float = 0.95,
    kl_estimator: KlEstimator = "k1",
) -> GaeResult:
    """`gae` in plain torch: the specification and the CPU path."""
    dtype = accumulation_dtype(values.dtype)
    lengths = cu_seqlens.diff()
    longest = int(lengths.max()) if lengths.numel() else 0
    column = torch.arange(longest, device=values.device)
    inside = column < lengths[:, None]  # [B, longest]
    # Padding repeats token 0 behind a False mask; nothing it holds is read.
    index = torch.where(inside, cu_seqlens[:-1, None] + column, 0)
    mask = response_mask[index] & inside

    kl = kl_estimate(
        torch.where(response_mask, logprobs.to(dtype), 0),
        torch.where(response_mask, ref_logprobs.to(dtype), 0),
        kl_estimator,
    )
    # The last response token is the one that no response token follows.
    followers = mask.flip(1).cumsum(1).flip(1)
    is_last = mask & (followers == 1)
    rewards = -kl_coef * kl[index] + torch.where(is_last, scores.to(dtype)[:, None], 0)
    rewards = torch.where(mask, rewards, 0)
    value = torch.where(mask, values.to(dtype)[index], 0)

    advantages = torch.zeros_like(rewards)
    # What the next response token hands to its left: gamma * V + gamma * lam * A.
    carried = rewards.new_zeros(len(lengths))
    for t in range(longest - 1, -1, -1):
        advantage = rewards[:, t] - value[:, t] + carried
        advantages[:, t] = torch.where(mask[:, t], advantage, 0)
        carried = torch.where(mask[:, t], gamma * (value[:, t] + lam * advantage), carried)

    returns = advantages + value
    return GaeResult(
        rewards=rewards[inside],
        advantages=advantages[inside],
        returns=returns[inside],
        kl=kl,
        stats=masked_moments(advantages, mask),
    )


def gae(
    logprobs: Tensor,
    ref_logprobs: Tensor,
    values: Tensor,
    scores: Tensor,
    cu_seqlens: Tensor,
    response_mask: Tensor,
    *,
    kl_coef: float | Tensor,
    gamma: float = 1.0,
    lam: float = 0.95,
    kl_estimator: KlEstimator = "k1",
) -> GaeResult:
    """Rewards, advantages, returns and KL of packed responses, without gradient.

    logprobs, ref_logprobs, values [T] of the rollout's policy, the reference and the critic;
    scores [B]; cu_seqlens [B+1] int32 with cu_seqlens[B] == T; response_mask [T] bool, holes
    allowed; kl_coef a number or a 0-d tensor. Nothing outside the mask is read into a result.
    """
    if kl_estimator not in get_args(KlEstimator):
        known = ", ".join(get_args(KlEstimator))
        raise ValueError(f"kl_estimator {kl_estimator!r} is none of {known}")
    inputs = (logprobs, ref_logprobs, values, scores, cu_seqlens, response_mask)
    if not uses_triton(values):
        detached = [x.detach() for x in inputs]
        return gae_reference(
            *detached, kl_coef=kl_coef, gamma=gamma, lam=lam, kl_estimator=kl_estimator
        )
    if isinstance(kl_coef, Tensor) and kl_coef.device != values.device:
        kl_coef = float(kl_coef)  # on the host already
    in_tensor, number = (kl_coef, 0.0) if isinstance(kl_coef, Tensor) else (None, kl_coef)
    out, stats = _gae(*inputs, in_tensor, number, gamma, lam, kl_estimator)
    rewards, advantages, returns, kl = out.unbind()
    return GaeResult(rewards, advantages, returns, kl, stats)
