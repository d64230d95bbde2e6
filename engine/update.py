"""Phase 5 of PPO, update: the optimizer steps of policy and critic on an iteration's episodes."""

import functools
from dataclasses import dataclass

import numpy as np
import torch

from engine.advantage import Advantages, unsound_clause
from engine.checkpoints.course import Course
from engine.data.batches import PackedBatch, Units
from engine.data.examples import Example
from engine.evidence.keeper import Evidence
from engine.feed import Feed, StepBatch, pack_for, step_batch
from engine.losses import ClippedPolicyLoss, NegativeLogLikelihood, clipped_value_loss
from engine.ranks.seeds import seed_for_step
from engine.rollout import Rollout
from engine.score import Scored, scored_examples
from engine.settings.ppo import PPOConfig
from engine.training.ema import EMA
from engine.training.optimizer import Optimizer
from engine.training.passes import Objective, accumulate, forward_backward
from engine.training.recheck import checked_gradients
from engine.training.reduce import reduce_metrics
from engine.training.skipped import SkippedSteps
from kernels.moments import Whitening


@dataclass(kw_only=True)
class Learner:
    """What learns in PPO, and the pretraining text it must not forget."""

    policy: Optimizer
    critic: Optimizer
    ema: EMA
    pretraining: Feed | None
    """None without ptx."""
    evidence: Evidence | None = None
    """Keeps steps that are skipped, and says so."""

    @functools.cached_property
    def rollouts(self) -> SkippedSteps:
        """Iterations without any step, as what they were to learn from was not finite."""
        return SkippedSteps(
            limit=self.policy.config.max_skipped_steps,
            subject="what responses are learned from",
            taken="iterations",
        )

    def num_learned(self, rollout: Rollout) -> int:
        """Return of how many responses of the iteration's rollout it has learned."""
        return 0 if self.rollouts.in_a_row else len(rollout)

    @property
    def skipped(self) -> dict[str, SkippedSteps]:
        """The skipped steps of both networks, and the skipped iterations."""
        networks = {"policy": self.policy.skipped, "critic": self.critic.skipped}
        return {**networks, "rollouts": self.rollouts}

    @property
    def num_sequences(self) -> int:
        """The different sequences of pretraining text; 0 without ptx."""
        return 0 if self.pretraining is None else self.pretraining.order.num_examples


def learning_examples(rollout: Rollout, scored: Scored, advantages: Advantages) -> list[Example]:
    """Return the responses as training examples that carry the numbers of their tokens."""
    columns = {
        "logprobs": scored.logprobs,
        "values": scored.values,
        "advantages": advantages.advantages,
        "returns": advantages.returns,
    }
    return rollout.carrying(columns)


def learn(
    learner: Learner,
    config: PPOConfig,
    rollout: Rollout,
    scored: Scored,
    advantages: Advantages,
    course: Course,
) -> dict[str, float]:
    """Learn from the rollout of the step that a run's course is at; return what its optimizer
    steps say together.

    Where a number of it is not finite no step is taken: it would be in the whitening of all. The
    samples are named then, and a few such iterations in a row end the run.
    """
    examples = learning_examples(rollout, scored, advantages)
    # On the host already: nothing waits.
    columns = [column for example in examples for column in example.fields.values()]
    is_sound = all(bool(np.isfinite(column).all()) for column in columns)
    decode = str if learner.evidence is None else learner.evidence.run.tokenizer.decode
    clause = "" if is_sound else unsound_clause(rollout, scored, advantages, decode)
    learner.rollouts.count(was_skipped=not is_sound, is_explained=False, reason=clause)
    counts = {"update/skipped_rollouts": float(learner.rollouts.total)}
    if not is_sound:
        if learner.evidence is not None:
            learner.evidence.look_at_rollout(
                course.position * config.num_updates,
                learner.rollouts,
                lambda: {"episodes": scored_examples(rollout, scored)},
                {"kl_coef": advantages.kl_coef},
            )
        return counts
    whitening, passed_over = advantages.whitening, course.passed_over
    updated = run_updates(learner, config, examples, whitening, course.step, passed_over)
    return updated | counts


def run_updates(
    learner: Learner,
    config: PPOConfig,
    examples: list[Example],
    whitening: Whitening | None,
    iteration: int,
    passed_over: int = 0,
) -> dict[str, float]:
    """Take an iteration's optimizer steps, and return what they say together.

    A learner whose steps are skipped time and again takes no more of them: the run ends once this
    iteration's numbers are on record. Nor does one that is to be set back for a spike.
    passed_over: iterations' prompts that none learns from.
    """
    updates = []
    optimizers = (learner.policy, learner.critic)
    for step, chosen in minibatches(config, iteration + passed_over):
        minibatch = [examples[i] for i in chosen]
        updates.append(
            update(learner, config, minibatch, whitening, step=step, passed_over=passed_over)
        )
        if learner.evidence is not None:
            _keep_evidence(learner.evidence, learner, minibatch, whitening, step)
        if any(o.skipped.is_stuck or o.spikes.has_to_stop for o in optimizers):
            break
    for optimizer in optimizers:
        optimizer.network.settle()
    return merge_updates(updates)


def _keep_evidence(
    evidence: Evidence,
    learner: Learner,
    minibatch: list[Example],
    whitening: Whitening | None,
    step: int,
) -> None:
    def sources() -> dict[str, Units]:
        text = {} if learner.pretraining is None else {"ptx": learner.pretraining.chosen(step)}
        return {"episodes": minibatch, **text}

    def numbers() -> dict[str, float]:
        fields = {} if whitening is None else whitening._asdict()
        return {name: float(value) for name, value in fields.items()}  # sync

    evidence.look(step, "policy", sources, numbers)
    evidence.look(step, "critic", lambda: {"episodes": minibatch})


def update(
    learner: Learner,
    config: PPOConfig,
    minibatch: list[Example],
    whitening: Whitening | None,
    *,
    step: int,
    passed_over: int = 0,
) -> dict[str, float]:
    """One optimizer step of policy and critic on a minibatch; `step` counts them over the run,
    those of the iterations that were passed over too."""
    policy, critic = learner.policy.network, learner.critic.network
    parallel = policy.parallel
    iteration = step // config.num_updates - passed_over
    seed_for_step(parallel, step)
    batch = step_batch(minibatch, parallel, config.micro_batch_tokens)
    num_targets = torch.tensor(float(batch.num_targets), device=parallel.device)
    learner.policy.zero_gradients()
    found = checked_gradients(
        learner.policy,
        lambda: policy_gradient(learner, config, batch.batches, num_targets, whitening, step=step),
        step=step,
        role="policy",
    )
    learner.critic.zero_gradients()
    critic_batches = pack_for(minibatch, critic.parallel, config.micro_batch_tokens)
    value_loss = clipped_value_loss(num_targets, cliprange=config.value_cliprange)
    critic_found = checked_gradients(
        learner.critic,
        lambda: forward_backward(critic, critic_batches, value_loss),
        step=step,
        role="critic",
    )
    policy_step = learner.policy.step(iteration, found)
    critic_step = learner.critic.step(iteration, critic_found)
    if not policy_step.was_skipped:
        learner.ema.update()
    # Behind the steps, whose launches need none of these numbers.
    values = reduce_metrics(found, parallel) | reduce_metrics(critic_found, critic.parallel)
    return values | {
        **{f"policy_{name}": value for name, value in learner.policy.numbers(policy_step).items()},
        **{f"critic_{name}": value for name, value in learner.critic.numbers(critic_step).items()},
        "token_spread": batch.spread,
    }


def policy_gradient(
    learner: Learner,
    config: PPOConfig,
    batches: list[PackedBatch],
    num_targets: torch.Tensor,
    whitening: Whitening | None,
    *,
    step: int,
) -> dict[str, torch.Tensor]:
    """Add the gradient of InstructGPT eq. 2 to the policy's buffers: PPO's, then ptx_coef x the
    pretraining's.

    Both are means over tokens; the paper does not state the reduction that makes 27.8 meaningful.
    """
    text = None if learner.pretraining is None else learner.pretraining.step(step)
    objectives = policy_objectives(config, batches, num_targets, whitening, text)
    return accumulate(learner.policy.network, objectives)


def policy_objectives(
    config: PPOConfig,
    batches: list[PackedBatch],
    num_targets: torch.Tensor,
    whitening: Whitening | None,
    text: StepBatch | None,
) -> list[Objective]:
    """Return the terms of the policy's loss: of the minibatch, and of the pretraining text."""
    policy_loss = ClippedPolicyLoss(
        num_targets=num_targets, cliprange=config.cliprange, whitening=whitening
    )
    objectives = [
        Objective(batches=batches, loss=policy_loss, temperature=config.sampling.temperature)
    ]
    if text is not None:
        objectives.append(
            Objective(
                batches=text.batches,
                loss=NegativeLogLikelihood(text.num_targets, "ptx_loss"),
                scale=config.ptx_coef,
            )
        )
    return objectives


def minibatches(config: PPOConfig, iteration: int) -> list[tuple[int, list[int]]]:
    """Return (step of the run, indices of the rollout) of an iteration's minibatches, shuffled anew
    each epoch."""
    chosen: list[list[int]] = []
    for epoch in range(config.ppo_epochs):
        shuffle = np.random.default_rng([config.seed, iteration, epoch])
        order = shuffle.permutation(config.rollout_batch_size).tolist()
        chosen += [
            order[start : start + config.minibatch_size]
            for start in range(0, len(order), config.minibatch_size)
        ]
    return list(enumerate(chosen, start=iteration * config.num_updates))


def merge_updates(updates: list[dict[str, float]]) -> dict[str, float]:
    """Return an iteration's update metrics: means over its minibatches, extremes of the ratios, the
    last of the loss scale and of counts of steps, which run on. One that is not finite makes the
    whole so."""
    first = updates[0]
    merged: dict[str, float] = {}
    for name in first:
        column = [values[name] for values in updates]
        if name == "ratio_min":
            merged[name] = float(np.min(column))
        elif name == "ratio_max":
            merged[name] = float(np.max(column))
        elif name.endswith(
            ("_skipped_steps", "_spiked_steps", "_scale_search_steps", "_loss_scale")
        ):
            merged[name] = column[-1]
        else:
            merged[name] = sum(column) / len(column)
    variance = merged.pop("return_variance"), merged.pop("error_variance")
    merged["explained_variance"] = 1.0 - variance[1] / variance[0] if variance[0] != 0 else 0.0
    merged["first_ratio_error"] = max(first["ratio_max"] - 1.0, 1.0 - first["ratio_min"])
    return {
        f"update/{name}": value
        for name, value in merged.items()
        if name not in ("return_mean", "error_mean")
    }
