"""`numerics.deterministic`: the mode is what attention needs, and nothing runs that it refuses."""

import dataclasses
import os
from collections.abc import Callable, Iterator
from pathlib import Path
from typing import Any

import pytest
import torch
from torch.utils._python_dispatch import TorchDispatchMode

from engine.errors import UserError
from engine.ranks.device import make_deterministic
from engine.ranks.start import start_parallel
from engine.settings.layout import ParallelLayout
from engine.settings.numerics import Numerics
from engine.settings.ppo import PPOConfig
from engine.training.network import build_network
from tests.tiny import SIZE, ppo_config, rm_config, rows_of, sft_config, train, weights_of

# Operators that raise on a GPU in this mode (torch 2.11 to 2.13, use_deterministic_algorithms), as
# far as a language model could come to use one; and the gradient of torch's embedding, which has
# a race that no mode closes (pytorch pull request 187687).
REFUSED = {
    *("embedding_dense_backward", "_embedding_bag", "_embedding_bag_backward"),
    *("histc", "bincount", "kthvalue", "median", "put_", "put"),
    *("nll_loss_forward", "nll_loss_backward", "nll_loss2d_forward", "nll_loss2d_backward"),
}
STAGES: dict[str, Callable[..., Any]] = {"sft": sft_config, "rm": rm_config, "ppo": ppo_config}


@pytest.fixture(autouse=True)
def mode_is_put_back(monkeypatch: pytest.MonkeyPatch) -> Iterator[None]:
    for name in ("CUBLAS_WORKSPACE_CONFIG", "NCCL_ALGO"):
        monkeypatch.setenv(name, "")  # so that it is put back after the test
        monkeypatch.delenv(name)
    yield
    torch.use_deterministic_algorithms(False)


class Recorder(TorchDispatchMode):
    """The names of the operators that ran."""

    def __init__(self) -> None:
        super().__init__()
        self.names: set[str] = set()

    def __torch_dispatch__(self, operator: Any, types: Any, args: Any = (), kwargs: Any = None):
        name = operator._schema.name.removeprefix("aten::")
        if name.startswith("cumsum") and args[0].is_floating_point():
            name = "cumsum of floats"
        self.names.add(name)
        return operator(*args, **(kwargs or {}))


def settings(stage: str, files: Path, run: Path, numerics: Numerics) -> Any:
    config = STAGES[stage](files, run, numerics=numerics)
    if isinstance(config, PPOConfig):
        # What sorts and adds up the rows of the sampler, which plain sampling does not.
        sampling = dataclasses.replace(config.sampling, top_k=20, top_p=0.95, min_new_tokens=2)
        config = dataclasses.replace(config, sampling=sampling)
    return config


def test_the_mode_is_the_one_that_attention_obeys():
    make_deterministic()
    assert torch.are_deterministic_algorithms_enabled()
    # torch's attention: "if warn_only, warn once, and go on adding up in any order".
    assert not torch.is_deterministic_algorithms_warn_only_enabled()
    assert not torch.utils.deterministic.fill_uninitialized_memory


@pytest.mark.parametrize("stage", STAGES)
def test_no_stage_runs_what_a_gpu_refuses(stage: str, tiny: Path, tmp_path: Path):
    config = settings(stage, tiny, tmp_path, Numerics(deterministic=True))
    with Recorder() as recorder:
        train(config)
    assert torch.are_deterministic_algorithms_enabled()
    assert {"mm", "index", "index_put"} & recorder.names  # it has looked
    assert "cumsum of floats" not in recorder.names
    assert not recorder.names & REFUSED


@pytest.mark.parametrize("stage", STAGES)
def test_the_mode_is_set_before_the_ranks_meet(stage: str, tiny: Path, tmp_path: Path, monkeypatch):
    class Met(Exception):
        pass

    def meet(*_: Any) -> None:
        assert torch.are_deterministic_algorithms_enabled()
        assert os.environ["NCCL_ALGO"]
        raise Met

    monkeypatch.setattr("engine.run.start_parallel", meet)
    with pytest.raises(Met):
        train(settings(stage, tiny, tmp_path, Numerics(deterministic=True)))


@pytest.mark.parametrize("kind", ["language", "scalar"])
def test_positions_keep_their_names_and_their_draw(kind: str):
    parallel = start_parallel(ParallelLayout(), seed=3)
    states = [
        build_network(kind, SIZE, parallel, numerics=Numerics(deterministic=d)).modules[0]
        for d in (False, True)
    ]
    plain, ordered = (dict(module.named_parameters()) for module in states)
    assert plain.keys() == ordered.keys()
    assert all(torch.equal(plain[name], ordered[name]) for name in plain)


@pytest.mark.parametrize(
    "algorithms",
    ["Ring", "ring,tree", "Tree,PAT", "CollnetDirect", "^NVLS,NVLSTree", "^nvlstree,NVLS,Tree"],
)
def test_algorithms_that_add_up_in_order_are_kept(algorithms: str, monkeypatch):
    monkeypatch.setenv("NCCL_ALGO", algorithms)
    make_deterministic()


@pytest.mark.parametrize(
    "algorithms", ["NVLS", "Ring,NVLSTree", "^NVLS", "^Ring", "allreduce:ring", "^NVLS, NVLSTree"]
)
def test_other_algorithms_are_refused_in_words(algorithms: str, monkeypatch):
    monkeypatch.setenv("NCCL_ALGO", algorithms)
    with pytest.raises(UserError, match=r"(?s)NCCL_ALGO.*numerics\.deterministic") as refusal:
        make_deterministic()
    assert algorithms in str(refusal.value)
    assert not torch.are_deterministic_algorithms_enabled()


def test_a_workspace_that_is_shared_is_refused_in_words(monkeypatch):
    monkeypatch.setenv("CUBLAS_WORKSPACE_CONFIG", ":0:0")
    with pytest.raises(UserError, match="CUBLAS_WORKSPACE_CONFIG is ':0:0'"):
        make_deterministic()


def test_variables_without_a_value_are_given_one(monkeypatch):
    monkeypatch.setenv("NCCL_ALGO", "")
    make_deterministic()
    assert os.environ["NCCL_ALGO"] == "^NVLS,NVLSTree"
    assert os.environ["CUBLAS_WORKSPACE_CONFIG"] == ":4096:8"


def run_twice(_: int, stage: str, files: Path, folder: Path) -> None:
    numerics = Numerics(dtype="bf16", deterministic=True)
    for run in ("first", "second"):
        train(settings(stage, files, folder / run, numerics))
    assert rows_of(folder / "first") == rows_of(folder / "second")
    role = "reward_model" if stage == "rm" else "policy"
    first, second = (weights_of(folder / run, role) for run in ("first", "second"))
    assert all(torch.equal(first[name], second[name]) for name in first)
    start = weights_of(files / role, role)
    assert not all(torch.equal(first[name], start[name].bfloat16().float()) for name in first)


@pytest.mark.gpu
@pytest.mark.parametrize("stage", STAGES)
def test_the_same_run_has_the_same_bits_on_a_gpu(stage: str, tiny: Path, tmp_path: Path):
    # In a process of its own: torch looks at cuBLAS' variable once, at its first product.
    torch.multiprocessing.spawn(run_twice, args=(stage, tiny, tmp_path), nprocs=1)
