import dataclasses
import json
from pathlib import Path

import numpy as np
import pytest
import torch
from megatron.core import dist_checkpointing

from engine.checkpoints.checkpointer import Checkpointer
from engine.checkpoints.found import find_network, size_of
from engine.checkpoints.weights import load_weights
from engine.data.batches import pack
from engine.data.examples import Example
from engine.errors import UserError
from engine.losses import NegativeLogLikelihood
from engine.ranks.parallel import Parallel
from engine.ranks.start import start_parallel
from engine.settings.adam import AdamConfig
from engine.settings.layout import ParallelLayout
from engine.settings.numerics import Numerics
from engine.training.ema import EMA
from engine.training.network import Network, build_network
from engine.training.optimizer import Optimizer, StepResult
from engine.training.passes import forward_backward
from tests.tiny import SIZE, random_network


@pytest.fixture
def parallel() -> Parallel:
    return start_parallel(ParallelLayout(), seed=1)


@dataclasses.dataclass(kw_only=True)
class Training:
    """A policy in training, its average, and where both are saved."""

    optimizer: Optimizer
    ema: EMA
    checkpointer: Checkpointer

    def step(self, position: int, *, scale: float = 1.0) -> StepResult:
        """Train on a batch of the position's own."""
        tokens = np.random.default_rng(position).integers(0, 100, 40)
        batch = pack([Example(tokens=tokens, prompt_length=1)], multiple_of=1)
        self.optimizer.zero_gradients()
        network = self.optimizer.network
        forward_backward(network, [batch], NegativeLogLikelihood(39), scale=scale)
        result = self.optimizer.step(position)
        self.ema.update()
        return result

    def tensors(self) -> list[torch.Tensor]:
        """Weights, masters and the average."""
        weights = [p.detach().clone() for p in self.optimizer.network.modules[0].parameters()]
        masters = [master.clone() for _, _, master in self.optimizer.owned_masters()]
        return weights + masters + [shadow.clone() for shadow in self.ema.shadows]


def training(
    directory: Path, parallel: Parallel, *, dtype: str = "fp32", seed: int = 0
) -> Training:
    network = random_network("language", parallel, dtype=dtype, seed=seed)
    optimizer = Optimizer(network, AdamConfig(lr=1e-3), total_steps=10)
    ema = EMA(optimizer, 0.9)
    checkpointer = Checkpointer(
        directory=directory,
        parallel=parallel,
        networks={"policy": network},
        optimizers={"policy": optimizer},
        ema=ema,
        tokenizer_fingerprint="a tokenizer",
    )
    return Training(optimizer=optimizer, ema=ema, checkpointer=checkpointer)


def checkpointer_of(
    network: Network, directory: Path, role: str = "policy", fingerprint: str = ""
) -> Checkpointer:
    """What saves a network by itself, without an optimizer."""
    return Checkpointer(
        directory=directory,
        parallel=network.parallel,
        networks={role: network},
        optimizers={},
        tokenizer_fingerprint=fingerprint,
    )


def saved(network: Network, directory: Path, role: str, fingerprint: str = "") -> Path:
    """Save a network as a run of its own; return the run."""
    checkpointer_of(network, directory / "checkpoints", role, fingerprint).save(1, {})
    return directory


def weights(network: Network) -> dict[str, torch.Tensor]:
    return {name: p.detach().clone() for name, p in network.modules[0].named_parameters()}


@pytest.mark.parametrize("dtype", ["fp32", "bf16", "fp16"])
def test_resumed_training_goes_on_to_the_last_bit(dtype: str, parallel: Parallel, tmp_path: Path):
    first = training(tmp_path, parallel, dtype=dtype)
    # Overflows under fp16, the first of which the scaler forgives: its state counts as well.
    results = [first.step(0), first.step(1, scale=1e38 if dtype == "fp16" else 1.0)]
    assert [result.was_skipped for result in results] == [False, dtype == "fp16"]
    first.checkpointer.save(2, {"kl_coef": 0.25})
    at_save = first.tensors()
    expected = [first.step(2, scale=1e38 if dtype == "fp16" else 1.0), first.step(3)]

    second = training(tmp_path, parallel, dtype=dtype, seed=9)
    assert second.checkpointer.resume() == {"step": 2, "kl_coef": 0.25}
    for ours, theirs in zip(second.tensors(), at_save, strict=True):
        assert ours.dtype is theirs.dtype
        assert torch.equal(ours, theirs)
    found = [second.step(2, scale=1e38 if dtype == "fp16" else 1.0), second.step(3)]
    assert repr(found) == repr(expected)  # nan, the norm of an overflow, does not equal itself
    for ours, theirs in zip(second.tensors(), first.tensors(), strict=True):
        assert torch.equal(ours, theirs)
    if dtype == "fp16":
        scales = [t.optimizer.megatron.get_loss_scale().item() for t in (first, second)]
        assert scales == [2.0**15] * 2


def test_state_behind_a_padded_bucket_is_saved_in_its_place(
    tmp_path: Path,
):
    layout = ParallelLayout(overlap_grad_reduce=True, bucket_elements=5_000)
    parallel = start_parallel(layout, seed=1)
    first = training(tmp_path, parallel)
    (buffer,) = first.optimizer.network.chunks[0].buffers
    ends = [max(buffer.param_index_map[p][1] for p in bucket.params) for bucket in buffer.buckets]
    assert any(end % 128 for end in ends[:-1])  # so that padding follows
    first.step(0)
    first.checkpointer.save(1, {})
    second = training(tmp_path, parallel, seed=9)
    second.checkpointer.resume()
    for ours, theirs in zip(second.tensors(), first.tensors(), strict=True):
        assert torch.equal(ours, theirs)
    assert repr(second.step(1)) == repr(first.step(1))


def test_checkpoint_before_the_first_step_resumes(parallel: Parallel, tmp_path: Path):
    first = training(tmp_path, parallel)
    first.checkpointer.save(0, {})
    second = training(tmp_path, parallel, seed=9)
    second.checkpointer.resume()
    assert repr(second.step(0)) == repr(first.step(0))


def test_checkpoint_in_megatrons_own_form_resumes(parallel: Parallel, tmp_path: Path):
    """Before boxes, state was joined and written as megatron does it."""
    first = training(tmp_path, parallel, dtype="bf16")
    first.step(0)
    first.checkpointer.save(1, {})
    folder, optimizer = tmp_path / "step_00000001" / "policy", first.optimizer
    for path in folder.iterdir():
        if path.name != "network.json":
            path.unlink()
    weights = optimizer.network.modules[0].sharded_state_dict()
    state = {
        "chunk0": weights,
        "optimizer": optimizer.megatron.sharded_state_dict(
            {"chunk0": weights}, metadata={"distrib_optim_sharding_type": "fully_reshardable"}
        ),
    }
    dist_checkpointing.save(state, str(folder))
    second = training(tmp_path, parallel, dtype="bf16", seed=9)
    second.checkpointer.resume()
    for ours, theirs in zip(second.tensors(), first.tensors(), strict=True):
        assert torch.equal(ours, theirs)
    assert repr(second.step(1)) == repr(first.step(1))


def test_nothing_saved_is_nothing_to_resume(parallel: Parallel, tmp_path: Path):
    assert training(tmp_path, parallel).checkpointer.resume() is None


def test_last_checkpoints_are_kept(parallel: Parallel, tmp_path: Path):
    run = checkpointer_of(random_network("language", parallel), tmp_path)
    for step in (8, 9, 10, 11):
        run.save(step, {})
        assert (tmp_path / "latest").read_text() == f"step_{step:08d}"
    names = sorted(path.name for path in tmp_path.iterdir())
    assert names == ["latest", "step_00000010", "step_00000011"]


def test_saving_a_step_again_replaces_it(parallel: Parallel, tmp_path: Path):
    run = checkpointer_of(random_network("language", parallel), tmp_path)
    run.save(3, {"x": 1})
    (tmp_path / "step_00000003" / "left_over").touch()
    run.save(3, {"x": 2})
    assert run.resume() == {"step": 3, "x": 2}
    assert not (tmp_path / "step_00000003" / "left_over").exists()


def test_latest_is_the_old_name_until_it_is_the_new_one(
    parallel: Parallel, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
):
    run = checkpointer_of(random_network("language", parallel), tmp_path)
    run.save(1, {})
    seen = []

    def look_and_fail(new: Path, old: Path) -> None:
        assert (new.read_text(), old) == ("step_00000002", tmp_path / "latest")
        assert (tmp_path / "step_00000002" / "policy" / "network.json").exists()
        seen.append(old.read_text())
        raise OSError("the machine is gone")

    with monkeypatch.context() as patch, pytest.raises(OSError, match="machine is gone"):
        patch.setattr(Path, "replace", look_and_fail)
        run.save(2, {})
    assert set(seen) == {"step_00000001"}
    assert run.resume() == {"step": 1}


def test_partial_checkpoint_is_not_resumed_and_makes_way(parallel: Parallel, tmp_path: Path):
    run = checkpointer_of(random_network("language", parallel), tmp_path)
    run.save(1, {})
    partial = tmp_path / "step_00000002.partial" / "policy"
    partial.mkdir(parents=True)
    (partial / "__0_0.distcp").write_bytes(b"cut short")
    assert run.resume() == {"step": 1}
    run.save(2, {})
    assert not partial.parent.exists()
    assert run.resume() == {"step": 2}


def test_partial_checkpoint_does_not_count_among_those_kept(parallel: Parallel, tmp_path: Path):
    run = checkpointer_of(random_network("language", parallel), tmp_path)
    (tmp_path / "step_00000099.partial").mkdir()
    for step in (1, 2):
        run.save(step, {})
    assert (tmp_path / "step_00000001").exists()


def test_average_is_saved_in_fp32_and_loads_as_a_network(parallel: Parallel, tmp_path: Path):
    run = training(tmp_path, parallel, dtype="bf16")
    run.step(0)
    run.step(1)
    run.checkpointer.save(2, {})
    averages = {parameter: shadow for parameter, _, shadow in run.ema.owned_shadows()}
    for dtype in ("fp32", "bf16"):
        network = build_network("language", SIZE, parallel, numerics=Numerics(dtype=dtype))
        load_weights(network, tmp_path, role="ema")
        for ours, trained in zip(
            network.modules[0].parameters(),
            run.optimizer.network.modules[0].parameters(),
            strict=True,
        ):
            assert torch.equal(ours.flatten(), averages[trained].to(network.dtype))


@pytest.mark.parametrize("where", ["", "checkpoints", "checkpoints/step_00000001"])
def test_weights_are_found_under_a_run_its_checkpoints_and_one_of_them(
    where: str, parallel: Parallel, tmp_path: Path
):
    network = random_network("language", parallel, seed=4)
    run = saved(network, tmp_path, "policy")
    found = random_network("language", parallel, seed=5)
    load_weights(found, run / where, role="policy")
    for name, weight in weights(network).items():
        assert torch.equal(weights(found)[name], weight)
    assert size_of(run / where, "policy") == SIZE


def test_language_model_loads_into_a_scalar_trunk_and_leaves_the_head(
    parallel: Parallel, tmp_path: Path
):
    policy = random_network("language", parallel, seed=4)
    saved(policy, tmp_path, "policy")
    scalar = random_network("scalar", parallel, seed=5)
    before = weights(scalar)
    load_weights(scalar, tmp_path, role="policy")
    after, trunk = weights(scalar), weights(policy)
    heads = {"scalar_head.weight", "scalar_head.bias"}
    assert after.keys() == trunk.keys() | heads
    assert all(torch.equal(after[name], trunk[name]) for name in trunk)
    assert all(torch.equal(after[name], before[name]) for name in heads)


def test_scalar_network_loads_with_its_head(parallel: Parallel, tmp_path: Path):
    reward_model = random_network("scalar", parallel, seed=4)
    saved(reward_model, tmp_path, "reward_model")
    critic = random_network("scalar", parallel, seed=5)
    load_weights(critic, tmp_path, role="reward_model")
    for name, weight in weights(reward_model).items():
        assert torch.equal(weights(critic)[name], weight)


def test_reward_model_is_no_language_model(parallel: Parallel, tmp_path: Path):
    saved(random_network("scalar", parallel), tmp_path, "reward_model")
    with pytest.raises(UserError, match="holds a reward model or critic where a language model"):
        load_weights(random_network("language", parallel), tmp_path, role="reward_model")


def test_frozen_masters_follow_loaded_weights(parallel: Parallel, tmp_path: Path):
    saved(random_network("language", parallel, seed=4), tmp_path, "policy")
    run = training(tmp_path / "other", parallel, seed=5)
    load_weights(run.optimizer.network, tmp_path, role="policy")
    run.optimizer.adopt_weights()
    for parameter, bounds, master in run.optimizer.owned_masters():
        assert torch.equal(parameter.detach().flatten()[bounds], master)


@pytest.mark.parametrize(
    ("change", "cause"),
    [
        ({"vocab_size": 101}, "vocab_size is 100, this run's model has 101"),
        ({"num_layers": 2}, "num_layers is 4, this run's model has 2"),
        ({"hidden_size": 64}, "hidden_size is 32, this run's model has 64"),
        ({"context_length": 32}, "context_length is 64, this run's model has 32"),
    ],
)
def test_other_size_is_an_error(change: dict, cause: str, parallel: Parallel, tmp_path: Path):
    saved(random_network("language", parallel), tmp_path, "policy")
    size = dataclasses.replace(SIZE, **change)
    network = build_network("language", size, parallel, numerics=Numerics())
    with pytest.raises(UserError, match=cause):
        load_weights(network, tmp_path, role="policy")


def test_other_tokenizer_is_an_error(parallel: Parallel, tmp_path: Path):
    network = random_network("language", parallel)
    saved(network, tmp_path, "policy", fingerprint="one")
    load_weights(network, tmp_path, role="policy", tokenizer_fingerprint="one")
    load_weights(network, tmp_path, role="policy")  # nothing to compare with
    with pytest.raises(UserError, match="trained with another tokenizer"):
        load_weights(network, tmp_path, role="policy", tokenizer_fingerprint="two")


def test_run_of_another_tokenizer_is_not_resumed(parallel: Parallel, tmp_path: Path):
    first = training(tmp_path, parallel)
    first.checkpointer.save(1, {})
    second = training(tmp_path, parallel)
    second.checkpointer.tokenizer_fingerprint = "another"
    with pytest.raises(UserError, match="trained with another tokenizer"):
        second.checkpointer.resume()


def test_missing_role_is_an_error_that_lists_the_others(parallel: Parallel, tmp_path: Path):
    saved(random_network("scalar", parallel), tmp_path, "reward_model")
    with pytest.raises(UserError, match="no checkpoint of a policy here; it holds reward_model"):
        find_network(tmp_path, "policy")
    with pytest.raises(UserError, match="no checkpoint of a policy here"):
        size_of(tmp_path / "nowhere", "policy")


def test_damaged_description_is_an_error(parallel: Parallel, tmp_path: Path):
    run = saved(random_network("language", parallel), tmp_path, "policy")
    description = find_network(run, "policy") / "network.json"
    description.write_text(description.read_text()[:20])
    with pytest.raises(UserError, match=r"network\.json: cannot be read"):
        size_of(run, "policy")


def test_description_says_kind_size_and_tokenizer(parallel: Parallel, tmp_path: Path):
    run = saved(random_network("scalar", parallel), tmp_path, "reward_model", fingerprint="one")
    text = (find_network(run, "reward_model") / "network.json").read_text()
    assert json.loads(text) == {
        "kind": "scalar",
        "size": dataclasses.asdict(SIZE),
        "tokenizer": "one",
    }
