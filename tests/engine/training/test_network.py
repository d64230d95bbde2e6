import ast
import dataclasses
import os
from collections.abc import Callable, Iterator
from pathlib import Path

import pytest
import torch

from engine.data.batches import pack
from engine.data.examples import Example
from engine.errors import UserError
from engine.losses import NegativeLogLikelihood
from engine.ranks.parallel import Parallel
from engine.ranks.start import start_parallel
from engine.settings.layout import ParallelLayout
from engine.settings.numerics import Numerics
from engine.training.network import Network, build_network
from engine.training.passes import forward_backward
from engine.training.trainable import make_trainable
from tests.gpu_choices import choices_of_a_gpu
from tests.tiny import SIZE

ROOT = Path(__file__).parents[3]
FLOORS = ("kernels", "models", "engine", "recipes", "benchmarks", "tests")
# Those whose names say that they are a network's.
FIELDS = {field.name for field in dataclasses.fields(Network)} - {"size", "config"}
NAMES = {"network", "policy", "critic", "reference", "reward_model", "guest"}


@pytest.fixture
def parallel() -> Parallel:
    return start_parallel(ParallelLayout(), seed=1)


@pytest.mark.parametrize("kind", ["language", "scalar"])
def test_new_network_is_frozen_and_without_dropout(kind: str, parallel: Parallel):
    network = build_network(kind, SIZE, parallel, numerics=Numerics(), dropout=0.1)
    (module,) = network.modules
    assert not any(p.requires_grad for p in module.parameters())
    assert not any(part.training for part in module.modules())
    make_trainable(network)
    assert all(p.requires_grad for p in module.parameters())
    assert all(part.training for part in module.modules())
    network.train(False)
    assert not any(part.training for part in module.modules())


@pytest.mark.parametrize("mode", [False, True])
def test_evaluating_puts_back_the_mode_it_found(mode: bool, parallel: Parallel):
    network = build_network("language", SIZE, parallel, numerics=Numerics(), dropout=0.1)
    network.train(mode)
    parts = list(network.modules[0].modules())
    with network.evaluating():
        assert not any(part.training for part in parts)
    assert all(part.training is mode for part in parts)
    with pytest.raises(KeyError), network.evaluating():
        raise KeyError
    assert all(part.training is mode for part in parts)


def test_a_copy_is_fresh_between_its_filling_and_the_sources_next_change(parallel: Parallel):
    source, copy = (
        build_network("language", SIZE, parallel, numerics=Numerics()) for _ in range(2)
    )
    copy.become_copy(source)
    changes: list[Callable[[], None]] = [lambda: None, source.mark_changed, copy.mark_emptied]
    for change in changes:
        change()
        with pytest.raises(RuntimeError, match="stale weights"):
            copy.check_fresh()
        copy.mark_copied()
        copy.check_fresh()


def test_a_guest_has_the_modules_and_versions_of_its_own(parallel: Parallel):
    network = build_network("language", SIZE, parallel, numerics=Numerics())
    make_trainable(network)
    network.mark_changed()
    guest = network.guest()
    assert guest.modules is guest.chunks is network.modules
    assert network.chunks is not network.modules
    guest.mark_changed()
    guest.mark_changed()
    assert (network.weights_version, guest.weights_version) == (1, 2)


@pytest.mark.parametrize(
    ("dtype", "expected"),
    [("fp32", torch.float32), ("bf16", torch.bfloat16), ("fp16", torch.float16)],
)
def test_weights_have_the_dtype_that_was_asked_for(dtype, expected, parallel: Parallel):
    for kind in ("language", "scalar"):
        network = build_network(kind, SIZE, parallel, numerics=Numerics(dtype=dtype))
        assert network.dtype is expected
        dtypes = {n: p.dtype for m in network.modules for n, p in m.named_parameters()}
        # A head's readings are fp32, and so are its parameters.
        heads = {n: dtypes.pop(n) for n in list(dtypes) if n.startswith("scalar_head.")}
        assert set(dtypes.values()) == {expected}
        assert set(heads.values()) == ({torch.float32} if kind == "scalar" else set())


def test_network_does_what_its_device_chooses_unless_told(parallel: Parallel):
    def fusions(numerics: Numerics) -> tuple[bool, bool, bool]:
        config = build_network("language", SIZE, parallel, numerics=numerics).config
        elementwise = config.bias_activation_fusion, config.bias_dropout_fusion
        return *elementwise, config.gradient_accumulation_fusion

    assert fusions(Numerics()) == (False, False, False)
    assert fusions(Numerics(gradient_accumulation_fusion=True)) == (False, False, True)
    with choices_of_a_gpu():
        assert fusions(Numerics()) == (True, True, True)
        assert fusions(Numerics(gradient_accumulation_fusion=False)) == (True, True, False)


def test_weights_depend_on_the_seed_and_on_nothing_drawn_before(parallel: Parallel):
    def weights(seed: int) -> torch.Tensor:
        torch.rand(3)
        network = build_network(
            "language", SIZE, start_parallel(ParallelLayout(), seed=seed), numerics=Numerics()
        )
        return torch.cat([p.flatten() for p in network.modules[0].parameters()])

    assert torch.equal(weights(1), weights(1))
    assert not torch.equal(weights(1), weights(2))


def test_layout_is_checked_before_anything_is_built(parallel: Parallel):
    wide = dataclasses.replace(parallel, layout=ParallelLayout(tp=3))
    with pytest.raises(UserError, match="must divide the model's 4 heads"):
        build_network("language", SIZE, wide, numerics=Numerics())


@pytest.mark.parametrize("recompute", ["selective", "full"])
def test_recomputed_activations_give_the_same_gradients(recompute, parallel: Parallel):
    tokens = torch.arange(1, 40).numpy()
    batch = pack([Example(tokens=tokens, prompt_length=4)], multiple_of=1)
    gradients = []
    for numerics in (Numerics(), Numerics(recompute=recompute)):
        network = build_network("language", SIZE, parallel, numerics=numerics)
        make_trainable(network)
        forward_backward(network, [batch], NegativeLogLikelihood(35))
        parameters = network.modules[0].parameters()
        gradients.append(torch.cat([p.main_grad.flatten() for p in parameters]))
    assert gradients[0].norm() > 0.1
    torch.testing.assert_close(*gradients, rtol=1e-5, atol=1e-7)


def bf16_gradient(fuses: bool, parallel: Parallel) -> tuple[torch.Tensor, dict[str, bool]]:
    """The gradient of three micro-batches, and whether each parameter's took the fused way."""
    tokens = torch.arange(1, 40).numpy()
    batch = pack([Example(tokens=tokens, prompt_length=4)], multiple_of=1)
    numerics = Numerics(dtype="bf16", gradient_accumulation_fusion=fuses)
    network = build_network("language", SIZE, parallel, numerics=numerics)
    make_trainable(network)
    forward_backward(network, [batch] * 3, NegativeLogLikelihood(35))
    parameters = dict(network.modules[0].named_parameters())
    total = torch.cat([p.main_grad.flatten() for p in parameters.values()])
    return total, {name: p.grad_added_to_main_grad for name, p in parameters.items()}


def test_fused_gradients_are_the_same_and_not_rounded_to_bf16(parallel: Parallel):
    (plain, plain_ways), (fused, fused_ways) = (bf16_gradient(f, parallel) for f in (False, True))
    matrices = ("linear_qkv.weight", "linear_proj.weight", "linear_fc1.weight", "linear_fc2.weight")
    assert {name for name, way in fused_ways.items() if way} == {
        name for name in fused_ways if name.endswith(matrices)
    }
    assert not any(plain_ways.values())
    assert 0 < (fused - plain).norm() < 0.01 * plain.norm()
    # A third of the sum is one micro-batch's gradient, which bf16 holds only if it was rounded.
    is_rounded = [(g / 3 == (g / 3).bfloat16()).float().mean() for g in (plain, fused)]
    assert is_rounded[1] < is_rounded[0]


def test_deterministic_networks_have_torch_and_megatron_add_up_in_order(
    parallel: Parallel, monkeypatch
):
    monkeypatch.setenv("CUBLAS_WORKSPACE_CONFIG", "")  # and put back after the test
    monkeypatch.delenv("CUBLAS_WORKSPACE_CONFIG")
    batch = pack([Example(tokens=torch.arange(1, 40).numpy(), prompt_length=4)], multiple_of=1)
    gradients = []
    try:
        for is_asked in (False, True):
            numerics = Numerics(deterministic=is_asked)
            network = build_network("language", SIZE, parallel, numerics=numerics)
            assert network.config.deterministic_mode is is_asked
            assert torch.are_deterministic_algorithms_enabled() is is_asked
            with choices_of_a_gpu():  # what is compiled adds up in an order of its own
                on_a_gpu = build_network("language", SIZE, parallel, numerics=numerics)
            assert on_a_gpu.config.bias_dropout_fusion is not is_asked
            make_trainable(network)
            forward_backward(network, [batch], NegativeLogLikelihood(35))
            parameters = network.modules[0].parameters()
            gradients.append(torch.cat([p.main_grad.flatten() for p in parameters]))
        assert os.environ["CUBLAS_WORKSPACE_CONFIG"] == ":4096:8"
    finally:
        torch.use_deterministic_algorithms(False)
    torch.testing.assert_close(*gradients, rtol=1e-5, atol=1e-7)


def changes_of_networks(tree: ast.AST) -> Iterator[int]:
    """Yield the lines that assign a network's field, or anything to what is called a network.

    A class's own `self.source = ...` is none, whatever other classes call their fields.
    """
    for node in ast.walk(tree):
        if isinstance(node, ast.Assign | ast.Delete):
            targets = node.targets
        elif isinstance(node, ast.AugAssign | ast.AnnAssign):
            targets = [node.target]
        elif isinstance(node, ast.Call) and ast.unparse(node.func) == "setattr":
            owner, name, *_ = node.args
            name = name.value if isinstance(name, ast.Constant) else ""
            targets = [ast.Attribute(owner, name)]
        elif isinstance(node, ast.Call) and isinstance(node.func, ast.Attribute):
            is_list = node.func.attr in {"append", "extend", "insert", "pop", "clear", "remove"}
            targets = [node.func.value] if is_list else []
        else:
            continue
        for target in targets:
            parts = target.elts if isinstance(target, ast.Tuple | ast.List) else [target]
            if any(is_of_a_network(part) for part in parts):
                yield node.lineno


def is_of_a_network(target: ast.AST) -> bool:
    while isinstance(target, ast.Subscript):
        target = target.value
    if not isinstance(target, ast.Attribute):
        return False
    *owners, attribute = ast.unparse(target).split(".")
    if attribute.endswith("_func"):  # megatron's hooks in a config, which may have been taken out
        return True
    if owners[-1] == "config" and owners not in (["config"], ["self", "config"]):
        return True
    return owners[-1] in NAMES or attribute in FIELDS and owners not in (["self"], ["sys"])


def test_only_network_py_changes_a_network():
    files = [path for floor in FLOORS for path in (ROOT / floor).rglob("*.py")]
    files.remove(ROOT / "engine/training/network.py")
    found = {
        f"{path.relative_to(ROOT)}:{line}"
        for path in files
        for line in changes_of_networks(ast.parse(path.read_text()))
    }
    assert not found, "a network changes by its methods: see Network's docstring"


def test_the_check_sees_changes_however_they_are_written():
    changes = """
network.weights_version += 1
self.network.source = source
into.weights_version = 3
network.config.grad_scale_func = None
config.no_sync_func = None
network.chunks[0] = network.modules[0]
network.chunks.append(chunk)
a, policy.memory = b, seat
setattr(critic, name, value)
guest.whatever: int = 2
del learner.policy.decoding
"""
    others = """
self.source, self.config = source, config
self.weights_version = network.weights_version
network = build()
network.modules[0].decoder.bias[3] = 0.0
module.weight.data = shard
answers.append(network.size)
config.recompile_limit += 1
"""
    assert len(list(changes_of_networks(ast.parse(changes)))) == changes.count("\n") - 1
    assert list(changes_of_networks(ast.parse(others))) == []
