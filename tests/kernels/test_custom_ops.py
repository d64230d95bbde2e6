"""Every kernel is an operator that torch.compile can trace: schema, fake shapes, symbolic sizes."""

import pytest
import torch
from torch import Tensor

import kernels.append_kv
import kernels.decode_attention
import kernels.full_kl
import kernels.gae
import kernels.gated
import kernels.layer_norm
import kernels.policy_loss
import kernels.ranking_loss
import kernels.rotate
import kernels.row_gradient
import kernels.row_merge
import kernels.row_state
import kernels.sample
import kernels.value_loss  # noqa: F401  they register their operators
from kernels.gae import gae
from kernels.kl_estimate import kl_estimate
from kernels.logprobs import logprobs
from kernels.moments import merge_moments
from kernels.sample import sample
from kernels.value_loss import value_loss

SPEC = (19, 0, 0.7)  # num_valid_vocab, first_column, temperature
CU_SEQLENS = torch.tensor([0, 2, 6], dtype=torch.int32)
MASK = torch.tensor([True, False, True, True, True, False])


def floats(*shape: int) -> Tensor:
    return torch.randn(shape)


def arguments() -> dict[str, tuple]:
    """Small arguments of every operator."""
    logits, ref_logits, labels = floats(3, 20), floats(3, 20), torch.tensor([0, -100, 18])
    policy, value = ([floats(6) for _ in range(3)] for _ in range(2))
    cache, query = floats(2, 4, 8, 2, 4), floats(3, 2, 4)
    tables, lengths = torch.zeros(3, 2, dtype=torch.int32), torch.tensor([0, 3, 9]).int()
    key = torch.arange(3), torch.arange(3)
    statistics, weight = torch.rand(2, 3), floats(20)
    return {
        "row_state": (logits, labels, *SPEC, -100, True),
        "row_results": (logits, labels, torch.rand(3, 4), floats(3), floats(3), 19, 0.7, -100),
        "merge_row_states": (torch.rand(2, 3, 4), labels, torch.rand(3, 4), floats(3), floats(3),
                             -100),
        "row_gradient_into": (floats(3, 20), logits, labels, torch.rand(3, 4), floats(3), None,
                              *SPEC, -100),
        "kl_state": (logits, ref_logits, 19, 0.7),
        "kl_gradient": (logits, ref_logits, torch.rand(3, 5), floats(3), 19, 0.7, True),
        "gae": (*policy, floats(2), CU_SEQLENS, MASK, None, 0.1, 1.0, 0.95, "k1"),
        "policy_metrics": (floats(3, 6), MASK, torch.tensor(4)),
        "value_loss": (*value, MASK, torch.tensor(4), 0.2),
        "ranking_loss": (floats(6), torch.arange(6), CU_SEQLENS),
        "sample_state": (logits, *key, None, 0.7, None, 3, 0, 19),
        "merge_sample_states": (torch.zeros(2, 3, 4, dtype=torch.int32),),
        "merge_samples": (torch.zeros(2, 3, 4, dtype=torch.int32),),
        "append_kv": (query, query, cache[0].clone(), cache[1].clone(), torch.tensor([0, -1, 9])),
        "decode_attention": (floats(3, 6, 4), cache[0].clone(), cache[1].clone(), tables, lengths,
                             0.5, 7),
        "rotate": (floats(3, 2, 3, 8), floats(3, 2, 8), floats(3, 1, 2), floats(3, 1, 2), True),
        "gated": (logits, weight, "silu"),
        "gated_backward": (floats(3, 10), logits, None, "gelu"),
        "layer_norm": (logits, weight, weight, 1e-5),
        "layer_norm_backward": (logits, ref_logits, statistics, weight),
    }  # fmt: skip


@pytest.mark.parametrize("name", arguments())
def test_operator_tells_torch_the_truth(interpreter: None, name: str) -> None:
    # Their autograd functions are around them, not in them: no autograd registration to check.
    tests = ("test_schema", "test_faketensor", "test_aot_dispatch_dynamic")
    operator = getattr(torch.ops.trident, name).default
    torch.library.opcheck(operator, arguments()[name], test_utils=tests)


def test_every_operator_is_checked() -> None:
    names = {
        name.removeprefix("trident::").split(".")[0]
        for name in torch._C._dispatch_get_all_op_names()
        if name.startswith("trident::")
    }
    assert names == set(arguments())


def ppo_step(logits: Tensor, labels: Tensor, values: Tensor, scores: Tensor) -> tuple[Tensor, ...]:
    """Loss and next tokens of a small PPO step on packed tokens, through most kernels."""
    new, entropy = logprobs(logits, labels, temperature=0.7, with_entropy=True)
    old, ref = new.detach() + 0.1, new.detach() - 0.1
    result = gae(old, ref, values, scores, CU_SEQLENS, MASK, kl_coef=0.1)
    policy = -((new - old).exp() * (result.advantages - merge_moments(result.stats)[1]))[MASK]
    value = value_loss(values, values.detach() - 0.1, result.returns, MASK, MASK.sum())
    drawn = sample(logits.detach(), temperature=1.0, seed=1, sample_index=labels, position=labels)
    loss = policy.mean() + value.loss - 0.01 * entropy.sum() + kl_estimate(new, ref, "k3").sum()
    return loss, drawn.tokens, drawn.logprobs


@pytest.mark.parametrize("dynamic", [False, True])
def test_a_ppo_step_compiles_into_one_graph(interpreter: None, dynamic: bool) -> None:
    logits, values = floats(6, 20).requires_grad_(), floats(6).requires_grad_()
    rest = torch.randint(0, 20, (6,)), values, floats(2)
    compiled = torch.compile(ppo_step, fullgraph=True, backend="aot_eager", dynamic=dynamic)
    results = [f(logits, *rest) for f in (compiled, ppo_step)]
    grads = [torch.autograd.grad(loss, (logits, values)) for loss, *_ in results]
    for a, b in zip((*results[0], *grads[0]), (*results[1], *grads[1]), strict=True):
        assert torch.allclose(a, b, rtol=1e-6, atol=1e-7)
