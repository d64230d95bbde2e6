"""Log-probs from hidden states and the head, in two passes and in one."""

import gc
import itertools
from collections.abc import Callable
from operator import itemgetter

import pytest
import torch

from kernels import launch, row_blocks
from kernels.launch import LaunchConfig
from kernels.linear_logprobs import (
    ProportionalLoss,
    linear_logprobs,
    linear_logprobs_loss,
)
from kernels.policy_loss import policy_token_losses
from tests.kernels.oracle import exact_logprobs, largest_difference, relative_difference

OPTIONS = {"temperature": 0.7, "num_valid_vocab": 83}
WIDTH = 97
THREE_CHUNKS = 4 * WIDTH * 4
"""Workspaces that cut 9 to 12 rows of fp32 logits into three chunks."""


def head(
    num_rows: int = 12, dtype: torch.dtype = torch.float32
) -> tuple[torch.Tensor, torch.Tensor, torch.Tensor]:
    """Hidden states [T, 40], weight [97, 40], and labels [T] of which two are ignored."""
    hidden = torch.randn(num_rows, 40).to(dtype).requires_grad_()
    weight = (0.3 * torch.randn(WIDTH, 40)).to(dtype).requires_grad_()
    labels = torch.randint(0, 83, (num_rows,))
    labels[2:4] = -100
    return hidden, weight, labels


def exact(
    hidden: torch.Tensor, weight: torch.Tensor, labels: torch.Tensor, upstream: torch.Tensor
) -> tuple[torch.Tensor, ...]:
    """fp64 log-prob, entropy and gradients of hidden and weight under upstream [2, T]."""
    leaves = [x.detach().double().requires_grad_() for x in (hidden, weight)]
    outputs = exact_logprobs(leaves[0] @ leaves[1].t(), labels, **OPTIONS)
    return *outputs, *torch.autograd.grad(outputs, leaves, list(upstream.double()))


@pytest.mark.parametrize("num_chunks", [1, 3])
@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16])
def test_matches_fp64_on_the_same_rounded_inputs(
    backend: str, dtype: torch.dtype, num_chunks: int
) -> None:
    hidden, weight, labels = head(dtype=dtype)
    workspace = THREE_CHUNKS if num_chunks == 3 else 2**20
    outputs = linear_logprobs(
        hidden, weight, labels, with_entropy=True, workspace_bytes=workspace, **OPTIONS
    )
    upstream = torch.randn(2, 12)
    grads = torch.autograd.grad(outputs, (hidden, weight), list(upstream))
    want = exact(hidden, weight, labels, upstream)
    largest = (hidden.double() @ weight.double().t()).abs().max().item() / 0.7
    assert largest_difference(outputs[0], want[0]) < 2e-6 * largest + 1e-6
    assert largest_difference(outputs[1], want[1]) < 2e-5
    # The interpreter truncates to bf16 where a GPU rounds.
    tolerance = 1e-5 if dtype == torch.float32 else 8e-3
    for got, expected in zip(grads, want[2:], strict=True):
        assert got.dtype == dtype
        assert relative_difference(got, expected) < tolerance


def test_ignored_rows_and_rows_left_out_are_zero(backend: str) -> None:
    hidden, weight, labels = head()
    with torch.no_grad():
        hidden[2:4] = torch.nan
    row_index = torch.tensor([0, 2, 7, 11])  # row 2 is ignored as well
    logprob, _ = linear_logprobs(hidden, weight, labels, row_index=row_index, **OPTIONS)
    everything, _ = linear_logprobs(hidden, weight, labels, **OPTIONS)
    computed = [0, 7, 11]
    left_out = sorted(set(range(12)) - set(computed))
    assert logprob[left_out].eq(0).all()
    assert largest_difference(logprob[computed], everything[computed]) < 1e-6
    (gradient,) = torch.autograd.grad(logprob.sum(), hidden)
    assert gradient[left_out].eq(0).all()
    assert gradient[computed].abs().sum(1).gt(0).all()


@pytest.mark.parametrize("num_rows", [0, 4])
def test_no_row_to_compute(backend: str, num_rows: int) -> None:
    hidden, weight, _ = head(num_rows + 4)
    hidden = hidden[:num_rows].detach().requires_grad_()
    labels = torch.full((num_rows,), -100)
    logprob, _ = linear_logprobs(hidden, weight, labels)
    assert logprob.tolist() == [0.0] * num_rows
    for gradient in torch.autograd.grad(logprob.sum(), (hidden, weight)):
        assert gradient.eq(0).all()
    loss, _ = linear_logprobs_loss(hidden, weight, labels, lambda logprobs, rows: -logprobs)
    assert loss == 0
    for gradient in torch.autograd.grad(loss, (hidden, weight)):
        assert gradient.eq(0).all()


def test_chunks_change_nothing_but_rounding(backend: str) -> None:
    hidden, weight, labels = head()
    results = []
    for workspace in (1, THREE_CHUNKS, 2**20):
        logprob, _ = linear_logprobs(hidden, weight, labels, workspace_bytes=workspace)
        gradients = torch.autograd.grad(logprob.sum(), (hidden, weight))
        results.append((logprob, *gradients))
    for other in results[1:]:
        for a, b in zip(results[0], other, strict=True):
            assert largest_difference(a, b) < 1e-5


def test_chunks_change_no_bit_of_a_log_prob(backend: str) -> None:
    hidden, weight, labels = head()
    with torch.no_grad():  # small whole numbers: the products are exact in any order
        hidden.mul_(2).round_()
        weight.mul_(8).round_()
    in_one, *others = (
        linear_logprobs(
            hidden, weight, labels, with_entropy=True, workspace_bytes=workspace, **OPTIONS
        )
        for workspace in (2**20, THREE_CHUNKS, 1)
    )
    for other in others:
        assert other[0].equal(in_one[0])
        assert other[1].equal(in_one[1])


def test_repeated_runs_agree_bitwise(backend: str) -> None:
    hidden, weight, labels = head()
    runs = []
    for _ in range(2):
        logprob, _ = linear_logprobs(
            hidden, weight, labels, workspace_bytes=THREE_CHUNKS, **OPTIONS
        )
        runs.append((logprob, *torch.autograd.grad(logprob.sum(), (hidden, weight))))
    for a, b in zip(*runs, strict=True):
        assert a.equal(b)


def test_hidden_states_may_be_sliced_transposed_or_expanded(backend: str) -> None:
    hidden, weight, labels = head()
    want, _ = linear_logprobs(hidden, weight, labels)
    wide = torch.zeros(12, 64)
    wide[:, 9:49] = hidden.detach()
    for same in (wide[:, 9:49], hidden.detach().t().contiguous().t()):
        same.requires_grad_()
        logprob, _ = linear_logprobs(same, weight, labels)
        assert largest_difference(logprob, want) < 2e-6
        assert torch.autograd.grad(logprob.sum(), same)[0].isfinite().all()
    transposed = weight.detach().t().contiguous().t()
    assert largest_difference(linear_logprobs(hidden, transposed, labels)[0], want) < 2e-6


def test_gradcheck(backend: str) -> None:
    hidden = torch.randn(3, 8, dtype=torch.float64, requires_grad=True)
    weight = torch.randn(17, 8, dtype=torch.float64, requires_grad=True)
    labels = torch.tensor([0, -100, 14])

    def outputs(x: torch.Tensor, w: torch.Tensor) -> tuple[torch.Tensor, ...]:
        return linear_logprobs(x, w, labels, temperature=0.7, num_valid_vocab=15, with_entropy=True)

    assert torch.autograd.gradcheck(outputs, (hidden, weight), fast_mode=backend == "triton")


def test_weight_gradient_accumulates_in_fp32(backend: str) -> None:
    hidden, weight, labels = head(dtype=torch.bfloat16)
    upstream = torch.stack([torch.randn(12), torch.zeros(12)])
    want = exact(hidden, weight, labels, upstream)[3]
    start = torch.randn(WIDTH, 40)
    main_grad = start.clone()
    for _ in range(2):  # two micro-batches
        logprob, _ = linear_logprobs(hidden, weight, labels, main_grad=main_grad, **OPTIONS)
        _, weight_grad = torch.autograd.grad(
            logprob, (hidden, weight), upstream[0], allow_unused=True
        )
        assert weight_grad is None
    assert relative_difference(main_grad - start, 2 * want) < 5e-3
    assert main_grad.ne(main_grad.bfloat16()).any(), "more digits than bf16 has"


def test_weight_gradient_reaches_a_buffer_of_another_precision() -> None:
    hidden, weight, labels = head()
    main_grad = torch.zeros(WIDTH, 40, dtype=torch.bfloat16)
    logprob, _ = linear_logprobs(hidden, weight, labels, main_grad=main_grad)
    logprob.sum().backward()
    logprob, _ = linear_logprobs(hidden, weight, labels)
    (want,) = torch.autograd.grad(logprob.sum(), weight)
    assert weight.grad is None
    assert relative_difference(main_grad, want) < 3e-3


def sft_loss(weights: torch.Tensor) -> object:
    """-sum of weight times log-prob."""
    return lambda logprobs, rows: -(weights[rows] * logprobs)


def clipped_loss(old: torch.Tensor, advantages: torch.Tensor) -> object:
    """The clipped policy loss."""

    def loss(logprobs: torch.Tensor, rows: torch.Tensor) -> torch.Tensor:
        ratio = (logprobs - old[rows]).exp()
        clipped = ratio.clamp(0.8, 1.2)
        return -torch.minimum(ratio * advantages[rows], clipped * advantages[rows])

    return loss


@pytest.mark.parametrize("loss_name", ["sft", "proportional", "ppo", "ppo with derivatives"])
@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16])
def test_one_pass_agrees_with_two(backend: str, loss_name: str, dtype: torch.dtype) -> None:
    hidden, weight, labels = head(dtype=dtype)
    plain, _ = linear_logprobs(hidden, weight, labels, **OPTIONS)
    if loss_name == "sft":
        token_loss = sft_loss(torch.rand(12))
        plain_loss = token_loss
    elif loss_name == "proportional":
        token_loss = ProportionalLoss(torch.tensor(-0.3))
        plain_loss = lambda x, rows: -0.3 * x  # noqa: E731
    else:
        old, advantages = plain.detach() + 0.3 * torch.randn(12), torch.randn(12)
        token_loss = plain_loss = clipped_loss(old, advantages)
        if loss_name == "ppo with derivatives":
            one, losses_of = torch.tensor(1), policy_token_losses
            token_loss = lambda x, rows: losses_of((x, old, advantages), rows, one)[:2]  # noqa: E731
    counts = labels != -100
    want = torch.where(counts, plain_loss(plain, torch.arange(12)), 0.0).sum()
    want_grads = torch.autograd.grad(3 * want, (hidden, weight))
    loss, logprob = linear_logprobs_loss(
        hidden, weight, labels, token_loss, workspace_bytes=THREE_CHUNKS, **OPTIONS
    )
    assert largest_difference(loss, want) < 1e-5
    assert largest_difference(logprob, plain) < 2e-6
    assert not logprob.requires_grad
    tolerance = 1e-5 if dtype == torch.float32 else 8e-3
    for got, expected in zip(
        torch.autograd.grad(3 * loss, (hidden, weight)), want_grads, strict=True
    ):
        assert got.dtype == dtype
        assert relative_difference(got, expected) < tolerance


def test_one_pass_ignores_rows_that_a_gpu_would_compute(backend: str) -> None:
    hidden, weight, labels = head()
    loss_of_all = clipped_loss(torch.zeros(12), torch.ones(12))  # not 0 where the log-prob is
    compacted, _ = linear_logprobs_loss(hidden, weight, labels, loss_of_all)
    every_row = torch.arange(12)
    whole, _ = linear_logprobs_loss(hidden, weight, labels, loss_of_all, row_index=every_row)
    assert torch.allclose(compacted, whole)
    for a, b in zip(
        torch.autograd.grad(compacted, (hidden, weight)),
        torch.autograd.grad(whole, (hidden, weight)),
        strict=True,
    ):
        assert largest_difference(a, b) < 1e-6


def test_one_pass_scales_what_it_adds_to_main_grad() -> None:
    hidden, weight, labels = head()
    weights = torch.rand(12)
    loss, _ = linear_logprobs_loss(hidden, weight, labels, sft_loss(weights))
    (want,) = torch.autograd.grad(loss, weight)
    main_grad = torch.ones(WIDTH, 40)
    loss, _ = linear_logprobs_loss(hidden, weight, labels, sft_loss(weights), main_grad=main_grad)
    assert main_grad.eq(1).all(), "nothing before backward"
    (0.25 * loss).backward()
    assert largest_difference(main_grad, 1 + 0.25 * want) < 1e-6


def test_fp16_gradients_survive_until_the_loss_scale_arrives(backend: str) -> None:
    hidden, weight, labels = head(dtype=torch.float16)
    small, scale = 2.0**-24, 2.0**20
    loss, logprob = linear_logprobs_loss(hidden, weight, labels, lambda x, rows: -small * x)
    got = torch.autograd.grad(scale * loss, (hidden, weight))
    plain, _ = linear_logprobs(hidden, weight, labels)
    want = torch.autograd.grad(-small * scale * plain.sum(), (hidden, weight))
    assert torch.allclose(loss, -small * plain.sum())
    assert logprob.equal(plain) and not logprob.requires_grad
    for a, b in zip(got, want, strict=True):
        assert relative_difference(a, b) < 2e-3


def test_one_pass_without_gradients_only_adds_up_the_loss() -> None:
    hidden, weight, labels = head()
    token_loss = sft_loss(torch.ones(12))
    with torch.no_grad():
        loss, logprob = linear_logprobs_loss(hidden, weight, labels, token_loss)
    assert not loss.requires_grad
    assert torch.allclose(loss, -logprob.sum())


def peak_bytes(run: Callable[[], object]) -> int:
    """Most memory that the CPU allocator handed out at a time while `run` ran."""
    activities = [torch.profiler.ProfilerActivity.CPU]
    with torch.profiler.profile(activities=activities, profile_memory=True) as profile:
        run()
    events = profile.profiler.kineto_results.events()
    changes = [(e.start_ns(), e.nbytes()) for e in events if e.name() == "[memory]"]
    return max(itertools.accumulate(nbytes for _, nbytes in sorted(changes, key=itemgetter(0))))


@pytest.mark.parametrize("one_pass", [False, True])
def test_the_full_logits_never_exist(
    backend: str, one_pass: bool, monkeypatch: pytest.MonkeyPatch
) -> None:
    config = {"row_state": LaunchConfig(8192, 1), "row_gradient": LaunchConfig(8192, 1)}
    monkeypatch.setitem(launch.LAUNCHES, "cpu", launch.LAUNCHES["cpu"] | config)
    num_rows, width, num_columns = 160, 16, 8192
    block_bytes = 4 * 4 * num_columns  # of the reference: four rows
    monkeypatch.setattr(row_blocks, "BLOCK_WORDS", block_bytes // 4 // torch.get_num_threads())
    workspace = 2**20
    hidden = torch.randn(num_rows, width, requires_grad=True)
    weight = torch.randn(num_columns, width, requires_grad=True)
    labels = torch.randint(0, num_columns, (num_rows,))

    def run() -> None:
        if one_pass:
            loss, _ = linear_logprobs_loss(
                hidden, weight, labels, lambda x, rows: -x, workspace_bytes=workspace
            )
        else:
            loss = -linear_logprobs(hidden, weight, labels, workspace_bytes=workspace)[0].sum()
        gc.collect()  # the interpreter leaves its arguments in reference cycles
        loss.backward()

    full_logits = 4 * num_rows * num_columns
    hidden_bytes, weight_bytes = 4 * num_rows * width, 4 * num_columns * width
    # Two weight-sized buffers: its gradient, and in one pass the copy that backward scales.
    bound = workspace + 8 * hidden_bytes + (2 if one_pass else 1) * weight_bytes
    bound += 2 * block_bytes if backend == "reference" else 0
    assert workspace / 8 < peak_bytes(run) < bound < full_logits / 2

    naive = peak_bytes(lambda: (hidden @ weight.t()).log_softmax(-1))
    assert naive > 1.9 * full_logits, "the measurement sees what it is to see"


def test_mismatched_inputs_are_refused() -> None:
    with pytest.raises(ValueError, match=r"\(3, 5\) and \(7, 6\)"):
        linear_logprobs(torch.zeros(3, 5), torch.zeros(7, 6), torch.zeros(3, dtype=torch.int64))
    with pytest.raises(ValueError, match="bfloat16"):
        linear_logprobs(
            torch.zeros(3, 5), torch.zeros(7, 5).bfloat16(), torch.zeros(3, dtype=torch.int64)
        )
