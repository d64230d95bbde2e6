import dataclasses
import math

import numpy as np
import pytest
import torch

from engine.advantage import estimate_advantages
from engine.data.batches import PackedBatch
from engine.data.examples import Example
from engine.feed import Feed, pack_for
from engine.ranks.parallel import Parallel
from engine.ranks.start import start_parallel
from engine.rollout import Rollout, generate_rollout
from engine.score import score_rollout
from engine.settings.layout import ParallelLayout
from engine.settings.ppo import PPOConfig
from engine.settings.sampling import SamplingConfig
from engine.training.ema import EMA
from engine.training.network import Network
from engine.training.optimizer import Optimizer, StepResult
from engine.update import (
    Learner,
    learning_examples,
    merge_updates,
    minibatches,
    policy_gradient,
    run_updates,
    update,
)
from kernels.moments import Whitening
from models.packed_sequences import PackedSequences
from models.readouts import Logits
from tests.tiny import (
    ADAM,
    random_network,
)

CONFIG = PPOConfig(
    sampling=SamplingConfig(max_new_tokens=16, num_slots=4, cache_gib=0.01, temperature=0.7),
    rollout_batch_size=6,
    minibatch_size=3,
    micro_batch_tokens=40,
    ptx_coef=1.5,
    ema_decay=0.9,
    eos_rule="penalty",
)


@pytest.fixture
def parallel() -> Parallel:
    return start_parallel(ParallelLayout(), seed=1)


@dataclasses.dataclass(kw_only=True)
class Scene:
    """A rollout of a policy that has moved away from its old log-probs, and who learns from it."""

    learner: Learner
    rollout: Rollout
    examples: list[Example]
    """The responses with the numbers of their tokens, which learning reads."""
    whitening: Whitening
    pretraining: Feed


@pytest.fixture
def scene(parallel: Parallel) -> Scene:
    policy = random_network("language", parallel, seed=0)
    critic = random_network("scalar", parallel, seed=2)
    draw = np.random.default_rng(0)
    prompts = [
        Example(tokens=draw.integers(1, 100, n), prompt_length=n) for n in (3, 9, 5, 12, 1, 7)
    ]
    rollout = generate_rollout(
        policy, prompts, CONFIG.sampling, eos_id=0, seed=3, first_sample_index=0
    )
    scored = score_rollout(
        rollout,
        dataclasses.replace(CONFIG, policy_logprobs="scored"),
        policy=policy,
        reference=random_network("language", parallel, seed=1),
        critic=critic,
        reward_model=random_network("scalar", parallel, seed=2),
    )
    advantages = estimate_advantages(rollout, scored, CONFIG, kl_coef=0.1)
    assert advantages.whitening is not None
    optimizer = Optimizer(policy, ADAM, total_steps=10)
    texts = [Example(tokens=draw.integers(1, 100, 20), prompt_length=1) for _ in range(10)]
    pretraining = Feed(units=texts, batch_size=4, micro_batch_tokens=40, seed=0, parallel=parallel)
    learner = Learner(
        policy=optimizer,
        critic=Optimizer(critic, ADAM, total_steps=10),
        ema=EMA(optimizer, CONFIG.ema_decay),
        pretraining=pretraining,
    )
    return Scene(
        learner=learner,
        rollout=rollout,
        examples=learning_examples(rollout, scored, advantages),
        whitening=advantages.whitening,
        pretraining=pretraining,
    )


def move_away(scene: Scene) -> None:
    """Shift the old log-probs, so that ratios leave 1 and some of them the clip range."""
    noise = torch.randn(scene.rollout.num_tokens, generator=torch.Generator().manual_seed(0))
    noise *= 0.3 * scene.rollout.response_mask
    parts = noise.split([len(e.tokens) for e in scene.examples])
    for example, part in zip(scene.examples, parts, strict=True):
        example.fields["logprobs"] += part.numpy()


def gradient_buffers(network: Network) -> dict[str, torch.Tensor]:
    """What forward_backward has left for the optimizer, by parameter."""
    (module,) = network.modules
    return {name: p.main_grad.clone() for name, p in module.named_parameters()}


def plain_gradient(network: Network, loss: torch.Tensor) -> dict[str, torch.Tensor]:
    """The gradient of a loss by torch.autograd alone."""
    (module,) = network.modules
    names, parameters = zip(*module.named_parameters(), strict=True)
    found = torch.autograd.grad(loss, parameters, allow_unused=True)
    return {
        name: torch.zeros_like(p) if g is None else g
        for name, p, g in zip(names, parameters, found, strict=True)
    }


def plain_logprobs(network: Network, batch: PackedBatch, temperature: float) -> torch.Tensor:
    """[T] differentiable log-probs from the logits of every token, by softmax alone."""
    (module,) = network.modules
    sequences = PackedSequences.of(batch.cu_seqlens, batch.max_seqlen)
    rows = torch.arange(len(batch.tokens))
    logits = module(batch.tokens, batch.positions, sequences, Logits(rows))
    logits = logits[:, : network.size.vocab_size] / temperature
    chosen = logits.log_softmax(-1)[:-1].gather(1, batch.tokens[1:, None])[:, 0]
    return torch.cat([chosen.new_zeros(1), chosen])


def assert_close(found: dict[str, torch.Tensor], expected: dict[str, torch.Tensor]) -> None:
    norm = torch.cat([g.flatten() for g in expected.values()]).norm()
    for name, gradient in expected.items():
        assert (found[name] - gradient).norm() < 1e-5 * norm, name


def test_gradient_is_ppos_and_ptx_coef_times_the_pretrainings(scene: Scene, parallel: Parallel):
    move_away(scene)
    policy = scene.learner.policy.network
    examples = scene.examples
    num_targets = scene.rollout.response_mask.sum()

    (batch,) = pack_for(examples, parallel, 10_000)
    logprobs = plain_logprobs(policy, batch, temperature=0.7)
    ratio = (logprobs - batch.fields["logprobs"]).exp()
    advantages = (batch.fields["advantages"] - scene.whitening.mean) * scene.whitening.rstd
    losses = -torch.minimum(ratio * advantages, ratio.clamp(0.8, 1.2) * advantages)
    is_clipped = ratio * advantages > ratio.clamp(0.8, 1.2) * advantages
    assert 0.1 < is_clipped[batch.mask].float().mean() < 0.9
    ppo = plain_gradient(policy, losses[batch.mask].sum() / num_targets)

    texts = [scene.pretraining.units[i] for i in scene.pretraining.order.indices(5)]
    (batch,) = pack_for(texts, parallel, 10_000)
    logprobs = plain_logprobs(policy, batch, temperature=1.0)
    ptx = plain_gradient(policy, -logprobs[batch.mask].mean())

    scene.learner.policy.zero_gradients()
    batches = pack_for(examples, parallel, CONFIG.micro_batch_tokens)
    assert len(batches) > 2
    arguments = (CONFIG, batches, num_targets.float(), scene.whitening)
    found = policy_gradient(scene.learner, *arguments, step=5)
    joint = {name: ppo[name] + 1.5 * ptx[name] for name in ppo}
    assert_close(gradient_buffers(policy), joint)
    assert math.isclose(found["ptx_loss"], -logprobs[batch.mask].mean().item(), rel_tol=1e-5)

    without = dataclasses.replace(scene.learner, pretraining=None)
    scene.learner.policy.zero_gradients()
    policy_gradient(without, *arguments, step=5)
    assert_close(gradient_buffers(policy), ppo)


def test_first_minibatch_has_ratio_one(scene: Scene):
    examples = scene.examples
    first = update(scene.learner, CONFIG, examples[:3], scene.whitening, step=0)
    assert max(first["ratio_max"] - 1, 1 - first["ratio_min"]) < 1e-5
    assert first["clip_fraction"] == 0
    second = update(scene.learner, CONFIG, examples[3:], scene.whitening, step=1)
    assert second["ratio_max"] - second["ratio_min"] > 1e-3  # the policy has moved
    merged = merge_updates([first, second])
    assert merged["update/first_ratio_error"] < 1e-5
    assert merged["update/ratio_max"] == second["ratio_max"]


def test_update_lowers_both_losses_on_its_minibatch(scene: Scene):
    examples = scene.examples
    values = [update(scene.learner, CONFIG, examples, scene.whitening, step=0) for _ in range(4)]
    assert values[-1]["policy_loss"] < values[0]["policy_loss"]
    assert values[-1]["value_loss"] < values[0]["value_loss"]


def test_update_holds_no_gradient_of_the_one_before(scene: Scene):
    still = dataclasses.replace(ADAM, lr=1e-12)
    learner = dataclasses.replace(
        scene.learner,
        policy=Optimizer(scene.learner.policy.network, still, total_steps=10),
        critic=Optimizer(scene.learner.critic.network, still, total_steps=10),
    )
    learner.ema.optimizer = learner.policy
    examples = scene.examples
    first, second = (update(learner, CONFIG, examples, scene.whitening, step=0) for _ in range(2))
    for name in ("policy_grad_norm", "critic_grad_norm"):
        assert second[name] == pytest.approx(first[name], rel=1e-5)


def test_update_moves_the_average(scene: Scene):
    before = [shadow.clone() for shadow in scene.learner.ema.shadows]
    update(scene.learner, CONFIG, scene.examples, scene.whitening, step=0)
    assert not torch.equal(before[0], scene.learner.ema.shadows[0])


def test_schedule_counts_iterations(scene: Scene):
    adam = dataclasses.replace(ADAM, schedule="constant", warmup=10)
    policy = scene.learner.policy.network
    learner = dataclasses.replace(
        scene.learner, policy=Optimizer(policy, adam, total_steps=10), pretraining=None
    )
    learner.ema.optimizer = learner.policy
    rates = [
        update(learner, CONFIG, scene.examples[:3], None, step=step)["policy_lr"]
        for step in (0, 1, 2)  # two optimizer steps an iteration
    ]
    assert rates == pytest.approx([1e-4, 1e-4, 1.9e-4])


def test_weights_are_settled_once_an_iterations_steps_are_taken(scene: Scene, monkeypatch):
    settled = []
    monkeypatch.setattr(Network, "settle", lambda network: settled.append(network.kind))
    run_updates(scene.learner, CONFIG, scene.examples, scene.whitening, iteration=0)
    assert settled[-2:] == ["language", "scalar"]


def test_a_learner_that_is_stuck_takes_no_more_steps(scene: Scene, monkeypatch):
    taken = []

    def stuck(learner: Learner, *arguments: object, step: int, **named: object) -> dict[str, float]:
        taken.append(step)
        for _ in range(learner.critic.skipped.limit):
            learner.critic.skipped.count(was_skipped=True, is_explained=False)
        return update(learner, *arguments, step=step, **named)  # type: ignore[arg-type]

    skipped = StepResult(grad_norm=math.nan, lr=0.0, was_skipped=True)
    monkeypatch.setattr(Optimizer, "step", lambda *_: skipped)
    monkeypatch.setattr("engine.update.update", stuck)
    run_updates(scene.learner, CONFIG, scene.examples, scene.whitening, iteration=3)
    assert taken == [6]  # of 6 and 7


def test_minibatches_take_every_response_once_an_epoch():
    config = PPOConfig(rollout_batch_size=12, minibatch_size=4, ppo_epochs=2, seed=3)
    assert config.num_updates == 6
    found = minibatches(config, iteration=5)
    assert [step for step, _ in found] == list(range(30, 36))
    first, second = (sum((chosen for _, chosen in found[i : i + 3]), []) for i in (0, 3))
    assert sorted(first) == sorted(second) == list(range(12))
    assert first != second  # shuffled anew
    assert minibatches(config, iteration=5) == found
    assert minibatches(config, iteration=4)[0][1] != found[0][1]


@pytest.mark.parametrize("dp", [1, 2, 3])
def test_ranks_share_a_minibatch_without_overlap(dp: int, scene: Scene, parallel: Parallel):
    examples = scene.examples
    indices = minibatches(CONFIG, 0)[0][1]
    seen: list[int] = []
    for dp_rank in range(dp):
        rank = dataclasses.replace(parallel, dp=dp, dp_rank=dp_rank)
        for batch in pack_for([examples[i] for i in indices], rank, 40):
            seen += [i for i in batch.sequence_ids.tolist() if i >= 0]
    assert sorted(seen) == [0, 1, 2]


def test_examples_carry_what_the_losses_read(scene: Scene):
    assert sorted(scene.examples[0].fields) == ["advantages", "logprobs", "returns", "values"]
    for example, sampled in zip(scene.examples, scene.rollout.examples, strict=True):
        assert example.tokens.tolist() == sampled.tokens.tolist()
        assert example.prompt_length == sampled.prompt_length
        fields = example.fields
        expected = fields["advantages"] + fields["values"]
        np.testing.assert_allclose(fields["returns"], expected, rtol=1e-5, atol=1e-6)
        assert (fields["returns"][: example.prompt_length] == 0).all()
        assert np.abs(fields["returns"][example.prompt_length :]).min() > 0


SOUND = {"ratio_min": 0.9, "ratio_max": 1.1, "return_variance": 4.0, "error_variance": 1.0}


def test_merged_updates_are_means_extremes_and_the_explained_variance():
    common = {"return_variance": 4.0, "return_mean": 9.0, "error_mean": 9.0}
    merged = merge_updates(
        [
            {"policy_loss": 1.0, "ratio_min": 0.9, "ratio_max": 1.3, "error_variance": 1.0}
            | common,
            {"policy_loss": 3.0, "ratio_min": 0.7, "ratio_max": 1.1, "error_variance": 3.0}
            | common,
        ]
    )
    assert merged == {
        "update/policy_loss": 2.0,
        "update/ratio_min": 0.7,
        "update/ratio_max": 1.3,
        "update/explained_variance": 0.5,
        "update/first_ratio_error": pytest.approx(0.3),
    }


def test_skipped_steps_run_on_over_minibatches():
    merged = merge_updates([SOUND | {"policy_skipped_steps": float(n)} for n in (3, 3, 4)])
    assert merged["update/policy_skipped_steps"] == 4


@pytest.mark.parametrize("name", ["policy_loss", "ratio_max", "return_variance"])
@pytest.mark.parametrize("place", [0, 1])
def test_a_minibatch_that_is_not_finite_shows(name: str, place: int):
    updates = [SOUND | {"policy_loss": 1.0}, SOUND | {"policy_loss": 1.0}]
    updates[place] = updates[place] | {name: math.nan}
    merged = merge_updates(updates)
    shown = "explained_variance" if name == "return_variance" else name
    assert [key for key in merged if math.isnan(merged[key])][:1] == [f"update/{shown}"]
