"""The softmax kernels on a GPU, at real sizes."""

import math
from dataclasses import replace

import pytest
import torch

from kernels.linear_logprobs import ProportionalLoss, linear_logprobs, linear_logprobs_loss
from kernels.logprobs import logprobs
from kernels.row_gradient import row_gradient
from kernels.row_merge import write_merged_results
from kernels.row_pass import row_pass
from kernels.row_state import RowSpec, empty_results, row_state, write_row_results
from kernels.workspace import WORKSPACE_BYTES
from tests.kernels.oracle import exact_logprobs, largest_difference, relative_difference

CUDA = "cuda"
VOCAB, NUM_VALID = 50304, 50257  # GPT-2's vocabulary, padded


def rows(num_rows: int, dtype: torch.dtype = torch.bfloat16) -> tuple[torch.Tensor, torch.Tensor]:
    """Logits of GPT-2's padded vocabulary and labels on the GPU."""
    logits = 4 * torch.randn(num_rows, VOCAB, device=CUDA, dtype=dtype)
    labels = torch.randint(0, NUM_VALID, (num_rows,), device=CUDA)
    labels[0], labels[-1] = 0, NUM_VALID - 1
    return logits, labels


def head(num_rows: int, width: int) -> tuple[torch.Tensor, ...]:
    """Hidden states, weight and labels of an LM head on the GPU, bf16."""
    hidden = torch.randn(num_rows, width, device=CUDA, dtype=torch.bfloat16)
    weight = (4 / math.sqrt(width)) * torch.randn(VOCAB, width, device=CUDA)
    labels = torch.randint(0, NUM_VALID, (num_rows,), device=CUDA)
    labels[:: max(2, num_rows // 4)] = -100
    return hidden.requires_grad_(), weight.bfloat16().requires_grad_(), labels


@pytest.mark.gpu
@pytest.mark.parametrize("dtype", [torch.bfloat16, torch.float16, torch.float32])
@pytest.mark.parametrize("num_rows", [1, 4096])
def test_logits_at_real_size(num_rows: int, dtype: torch.dtype) -> None:
    logits, labels = rows(num_rows, dtype)
    leaf = logits.clone().requires_grad_()
    options = {"temperature": 0.7, "num_valid_vocab": NUM_VALID}
    outputs = logprobs(leaf, labels, with_entropy=True, **options)
    upstream = torch.randn(2, num_rows, device=CUDA)
    (gradient,) = torch.autograd.grad(outputs, leaf, list(upstream))
    few = slice(max(0, num_rows - 64), num_rows)
    exact_leaf = logits[few].double().requires_grad_()
    exact = exact_logprobs(exact_leaf, labels[few], **options)
    (want,) = torch.autograd.grad(exact, exact_leaf, list(upstream[:, few].double()))
    largest = logits.abs().max().item() / 0.7
    assert largest_difference(outputs[0][few], exact[0]) < 2e-6 * largest
    assert largest_difference(outputs[1][few], exact[1]) < 5e-6 * math.log(VOCAB)
    assert relative_difference(gradient[few], want) < max(1e-5, torch.finfo(dtype).eps)


@pytest.mark.gpu
def test_more_than_2_to_the_31_elements() -> None:
    logits, labels = rows(43008)
    logprob, entropy = logprobs(logits, labels, with_entropy=True, num_valid_vocab=NUM_VALID)
    for few in (slice(0, 8), slice(-8, None)):
        exact = exact_logprobs(logits[few], labels[few], num_valid_vocab=NUM_VALID)
        assert largest_difference(logprob[few], exact[0]) < 5e-5
        assert largest_difference(entropy[few], exact[1]) < 5e-5
    leaf = logits.requires_grad_()
    logprob, _ = logprobs(leaf, labels, num_valid_vocab=NUM_VALID)
    (gradient,) = torch.autograd.grad(logprob.sum(), leaf)
    assert gradient[-1].sum().abs() < 0.05
    assert gradient[-1, labels[-1]] > 0.5


@pytest.mark.gpu
def test_more_rows_than_a_second_grid_axis_holds() -> None:
    logits = torch.randn(70000, 64, device=CUDA)
    labels = torch.randint(0, 64, (70000,), device=CUDA)
    exact, _ = exact_logprobs(logits, labels)
    assert largest_difference(logprobs(logits, labels)[0], exact) < 1e-5


@pytest.mark.gpu
@pytest.mark.parametrize("width", [768, 2048])
def test_hidden_states_at_real_size(width: int) -> None:
    hidden, weight, labels = head(3000, width)
    main_grad = torch.zeros(weight.shape, device=CUDA)
    options = {"num_valid_vocab": NUM_VALID}
    outputs = linear_logprobs(
        hidden, weight, labels, with_entropy=True, main_grad=main_grad, **options
    )
    upstream = torch.randn(2, 3000, device=CUDA)
    (hidden_grad,) = torch.autograd.grad(outputs, hidden, list(upstream))
    leaves = [x.detach().double().requires_grad_() for x in (hidden, weight)]
    exact = exact_logprobs(leaves[0] @ leaves[1].t(), labels, **options)
    want = torch.autograd.grad(exact, leaves, list(upstream.double()))
    assert largest_difference(outputs[0], exact[0]) < 2e-4
    assert largest_difference(outputs[1], exact[1]) < 1e-4
    # A kernel may be off by twice what torch is off in this dtype, and a small constant.
    plain = [x.detach().requires_grad_() for x in (hidden, weight)]
    log_p = (plain[0] @ plain[1].t())[:, :NUM_VALID].float().log_softmax(-1)
    counts = labels != -100
    picked = log_p.gather(1, labels.clamp(min=0)[:, None])[:, 0]
    entropy = -(log_p.exp() * log_p).sum(-1)
    loss = (upstream[0] * picked + upstream[1] * entropy)[counts].sum()
    by_torch = torch.autograd.grad(loss, plain)
    for got, theirs, exactly in zip((hidden_grad, main_grad), by_torch, want, strict=True):
        bound = 2 * relative_difference(theirs, exactly) + 1e-4
        assert relative_difference(got, exactly) < bound


@pytest.mark.gpu
def test_one_pass_agrees_with_two_at_real_size() -> None:
    hidden, weight, labels = head(3000, 768)
    row_index = (labels != -100).nonzero().squeeze(1)
    weights = torch.rand(3000, device=CUDA)
    loss, logprob = linear_logprobs_loss(
        hidden, weight, labels, lambda x, rows: -(weights[rows] * x), row_index=row_index
    )
    one_pass = torch.autograd.grad(loss, (hidden, weight))
    plain, _ = linear_logprobs(hidden, weight, labels)
    two_pass = torch.autograd.grad(-(weights * plain).sum(), (hidden, weight))
    assert largest_difference(logprob, plain) < 1e-4
    for a, b in zip(one_pass, two_pass, strict=True):
        assert relative_difference(a, b) < 4e-3


@pytest.mark.gpu
def test_a_gradient_over_its_logits_meets_no_race() -> None:
    logits, labels = rows(512, torch.float32)
    spec = RowSpec(num_valid_vocab=NUM_VALID)
    grads = torch.randn(512, device=CUDA), torch.randn(512, device=CUDA)
    state = row_state(logits, labels, spec)
    out = torch.empty(logits.shape, device=CUDA, dtype=torch.bfloat16)
    want = row_gradient(logits, labels, state, grads, spec, out=out)
    for _ in range(50):
        again = logits.clone()
        over = again.view(torch.bfloat16)[:, :VOCAB]
        row_gradient(again, labels, state, grads, spec, out=over)
        assert over.equal(want)


@pytest.mark.gpu
def test_a_row_passed_once_meets_no_race() -> None:
    logits, labels = rows(512, torch.float32)
    labels[7] = -100
    spec, slope = (
        RowSpec(num_valid_vocab=NUM_VALID, with_entropy=False),
        torch.tensor(-0.5).to(CUDA),
    )
    results = empty_results(512, logits, with_entropy=False)
    write_row_results(results, logits, labels, spec)
    dz = torch.empty(logits.shape, device=CUDA, dtype=torch.bfloat16)
    grads = slope.expand(512), None
    row_gradient(logits, labels, results.state, grads, spec, out=dz)
    runs = []
    for _ in range(50):
        again, logprob = logits.clone(), torch.empty(512, device=CUDA)
        over = again.view(torch.bfloat16)[:, :VOCAB]
        row_pass(again, labels, slope, logprob, spec, out=over)
        runs.append((logprob, over))
    for logprob, over in runs[1:]:
        assert logprob.equal(runs[0][0])
        assert over.equal(runs[0][1])
    # The two sum in another order.
    assert largest_difference(runs[0][0], results.logprobs) < 1e-5
    assert relative_difference(runs[0][1], dz) < 1e-3


@pytest.mark.gpu
def test_shards_merged_on_the_device_are_the_whole_vocabulary() -> None:
    logits, labels = rows(1000)
    labels[7] = -100
    width, whole = VOCAB // 8, RowSpec(num_valid_vocab=NUM_VALID)
    want, got = (empty_results(1000, logits, with_entropy=True) for _ in range(2))
    write_row_results(want, logits, labels, whole)
    states = [
        row_state(shard, labels, replace(whole, first_column=i * width))
        for i, shard in enumerate(logits.split(width, dim=1))
    ]
    write_merged_results(got, torch.stack(states), labels, whole)
    assert largest_difference(got.logprobs, want.logprobs) < 2e-5
    assert largest_difference(got.entropies, want.entropies) < 2e-5


@pytest.mark.gpu
def test_no_host_sync_and_bitwise_repeats() -> None:
    hidden, weight, labels = head(2000, 768)
    row_index = (labels != -100).nonzero().squeeze(1)
    main_grad = torch.zeros(weight.shape, device=CUDA)
    logits = rows(64)[0].requires_grad_()

    def run() -> list[torch.Tensor]:
        main_grad.zero_()
        logprob, entropy = linear_logprobs(
            hidden, weight, labels, with_entropy=True, main_grad=main_grad, row_index=row_index
        )
        (hidden_grad,) = torch.autograd.grad((logprob + entropy).sum(), hidden)
        loss, _ = linear_logprobs_loss(hidden, weight, labels, lambda x, rows: -x)
        one_pass = torch.autograd.grad(loss, (hidden, weight))
        (dlogits,) = torch.autograd.grad(logprobs(logits, labels[:64])[0].sum(), logits)
        return [logprob, entropy, hidden_grad, main_grad.clone(), loss, *one_pass, dlogits]

    first = run()  # compiles
    torch.cuda.set_sync_debug_mode("error")
    try:
        second = run()
    finally:
        torch.cuda.set_sync_debug_mode("default")
    assert all(a.equal(b) for a, b in zip(first, second, strict=True))


@pytest.mark.gpu
def test_cuda_graph_capture() -> None:
    hidden, weight, labels = head(512, 768)

    def run() -> tuple[torch.Tensor, ...]:
        logprob, _ = linear_logprobs(hidden, weight, labels)
        return logprob, *torch.autograd.grad(logprob.sum(), (hidden, weight))

    side = torch.cuda.Stream()
    side.wait_stream(torch.cuda.current_stream())
    with torch.cuda.stream(side):
        run()
    torch.cuda.current_stream().wait_stream(side)
    graph = torch.cuda.CUDAGraph()
    with torch.cuda.graph(graph):
        captured = run()
    with torch.no_grad():
        hidden.copy_(torch.randn_like(hidden))
    graph.replay()
    for a, b in zip(captured, run(), strict=True):
        assert a.equal(b)


@pytest.mark.gpu
def test_peak_memory_is_the_workspace_and_hidden_sized_buffers() -> None:
    num_rows, width = 32768, 2048
    hidden, weight, labels = head(num_rows, width)
    main_grad = torch.zeros(weight.shape, device=CUDA)
    torch.cuda.reset_peak_memory_stats()
    before = torch.cuda.memory_allocated()
    logprob, _ = linear_logprobs(hidden, weight, labels, main_grad=main_grad)
    logprob.sum().backward()
    peak = torch.cuda.max_memory_allocated() - before
    hidden_bytes = 2 * num_rows * width
    assert peak < WORKSPACE_BYTES[CUDA] + 1.5 * hidden_bytes + 32 * 2**20
    assert 4 * num_rows * VOCAB > 10 * peak


@pytest.mark.gpu
def test_kernels_do_not_spill(monkeypatch: pytest.MonkeyPatch) -> None:
    from kernels import full_kl
    from kernels import row_gradient as gradient_file
    from kernels import row_pass as pass_file
    from kernels import row_state as state_file

    spills: dict[str, int] = {}

    class Launcher:
        """A kernel that notes the spills of what it launches."""

        def __init__(self, kernel: object, name: str) -> None:
            self.kernel, self.name = kernel, name

        def __getitem__(self, grid: tuple[int, ...]) -> object:
            def launch(*args: object, **kwargs: object) -> None:
                compiled = self.kernel[grid](*args, **kwargs)
                spills[self.name] = max(spills.get(self.name, 0), compiled.n_spills)

            return launch

    kernels = {
        state_file: ["_row_state_kernel"],
        gradient_file: ["_row_gradient_kernel"],
        pass_file: ["_row_pass_kernel"],
        full_kl: ["_kl_state_kernel", "_kl_gradient_kernel"],
    }
    for module, names in kernels.items():
        for name in names:
            monkeypatch.setattr(module, name, Launcher(getattr(module, name), name))
    for dtype in (torch.bfloat16, torch.float32):
        logits, labels = rows(8, dtype)
        leaf = logits.requires_grad_()
        sum(logprobs(leaf, labels, with_entropy=True)).sum().backward()
        full_kl.full_kl(leaf, leaf).sum().backward()
    hidden, weight, labels = head(64, 768)
    linear_logprobs_loss(hidden, weight, labels, ProportionalLoss(torch.tensor(-1.0).to(CUDA)))
    assert spills == dict.fromkeys(sum(kernels.values(), []), 0)
