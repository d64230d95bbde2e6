"""PPO and PPO-ptx against the reward model (InstructGPT 3.5 and C.4)."""

import dataclasses
from dataclasses import dataclass
from pathlib import Path

import numpy as np
import torch

from engine.advantage import KLController, estimate_advantages
from engine.alarms import Alarms
from engine.checkpoints.checkpointer import Checkpointer
from engine.checkpoints.found import size_of
from engine.checkpoints.weights import load_weights
from engine.data.batches import EpochOrder, PackedBatch
from engine.data.examples import Example
from engine.data.prompts import prompt_examples, read_prompts
from engine.errors import UserError
from engine.feed import Feed, pack_for, token_spread
from engine.losses import ClippedPolicyLoss, NegativeLogLikelihood, clipped_value_loss
from engine.metrics import PPO_HEADLINE, Metrics
from engine.ranks.parallel import Parallel
from engine.ranks.seeds import seed_for_step
from engine.ranks.start import rearranged
from engine.residency.residency import Residency
from engine.rollout import (
    Rollout,
    generate_rollout,
    rollout_metrics,
    score_rollout,
)
from engine.run import Run, join_ranks, require_path, start_run
from engine.settings.ppo import PPOConfig
from engine.settings.size import named_size
from engine.stop import noting_signals
from engine.training.ema import EMA
from engine.training.network import Network, build_network
from engine.training.optimizer import Optimizer
from engine.training.passes import Objective, accumulate, forward_backward, reduce_metrics
from engine.training.skipped import SkippedSteps, end_if_stuck
from engine.update_metrics import merge_updates
from kernels.moments import Whitening
from models.sizes import Kind


@noting_signals()
def train(config: PPOConfig) -> dict[str, float]:
    """Run the stage to its end, or from its newest checkpoint on; return the last metrics."""
    # The first rank looks at files for all.
    parallel = join_ranks(config.layout, config.seed, config.numerics)
    _check(config)
    run = start_run(
        directory=config.directory,
        parallel=parallel,
        tokenizer=config.policy,
    )

    # Build. The critic starts from the reward model.
    policy = _load("language", config.policy, "policy", config, run)
    critic = _load("scalar", config.reward_model, "reward_model", config, run)
    prompts, notes = _load_prompts(config, run, policy)
    policy_optimizer = Optimizer(policy, config.adam, total_steps=config.iterations)
    critic_optimizer = Optimizer(critic, config.critic_adam, total_steps=config.iterations)
    learner = Learner(
        policy=policy_optimizer,
        critic=critic_optimizer,
        ema=EMA(policy_optimizer, config.ema_decay),
        pretraining=_pretraining_feed(config, run, policy),
    )
    residency = Residency(
        config.residency, policy=policy_optimizer, critic=critic_optimizer, ema=learner.ema
    )
    reference, reward_model = _load_frozen(residency, config, run)
    if config.generation_layout is not None:
        residency.generate_in(config.generation_layout, numerics=config.numerics)
    kl = KLController(config.kl)
    alarms = Alarms(config.alarms, dtype=config.numerics.dtype, num_layers=policy.size.num_layers)
    order = EpochOrder(len(prompts), config.rollout_batch_size, config.seed)

    checkpointer = Checkpointer(
        directory=run.checkpoints,
        parallel=parallel,
        networks={"policy": policy, "critic": critic},
        optimizers={"policy": policy_optimizer, "critic": critic_optimizer},
        ema=learner.ema,
        keep=config.keep,
        tokenizer_fingerprint=run.tokenizer.fingerprint(),
    )
    progress = checkpointer.resume() or {"step": 0}
    run.write_settings(config)
    run.leave_if_asked()
    kl.coef = progress.get("kl_coef", kl.coef)
    if "alarms" in progress:
        alarms.load_state_dict(progress["alarms"])
    values: dict[str, float] = progress.get("metrics", {})

    with Metrics(
        config.directory,
        is_writer=parallel.is_writer,
        num_steps=config.iterations,
        first_step=progress["step"],
        headline=PPO_HEADLINE,
    ) as metrics:
        metrics.note(*notes, policy.attention)
        for iteration in range(progress["step"], config.iterations):
            # 1 prompt
            batch = [prompts[i] for i in order.indices(iteration)]
            with metrics.phase("rollout"), residency.rollout() as generator:  # 2
                rollout = generate_rollout(
                    generator,
                    batch,
                    config.sampling,
                    eos_id=run.tokenizer.eos_id,
                    seed=config.seed,
                    first_sample_index=iteration * config.rollout_batch_size,
                )
            with metrics.phase("score"), residency.score():  # 3
                score_rollout(
                    rollout,
                    policy=policy,
                    reference=reference,
                    critic=critic,
                    reward_model=reward_model,
                    temperature=config.sampling.temperature,
                    micro_batch_tokens=config.micro_batch_tokens,
                    eos_rule=config.eos_rule,
                    eos_penalty=config.eos_penalty,
                    scores_policy=config.scores_policy,
                )
            with metrics.phase("advantage"):  # 4
                _, whitening = estimate_advantages(
                    rollout,
                    kl_coef=kl.coef,
                    kl_estimator=config.kl.estimator,
                    gamma=config.gamma,
                    lam=config.lam,
                    whiten=config.whiten_advantages,
                )
            with metrics.phase("update"), residency.update():  # 5
                examples, updates = rollout.examples(), []
                for step, chosen in minibatches(config, iteration):
                    minibatch = [examples[i] for i in chosen]
                    updates.append(update(learner, config, minibatch, whitening, step=step))
                    if any(skipped.is_stuck for skipped in learner.skipped.values()):
                        break  # the run ends once this iteration's numbers are on record
                for network in (policy, critic):
                    network.settle()
            # 6 record
            values = rollout_metrics(rollout, metrics.phase_seconds) | merge_updates(updates)
            values |= residency.record(config.directory)
            values["kl/coef"] = kl.coef
            kl.update(values["score/kl"], len(rollout))
            metrics.log(iteration, values)
            metrics.log_alarms(iteration, alarms.check(values))
            end_if_stuck(iteration, run.checkpoints, **learner.skipped)
            is_last = iteration + 1 == config.iterations
            if is_last or iteration % config.show_every == 0:
                metrics.log_samples(iteration, _samples(rollout, run, config.num_shown))
            is_asked, done = run.is_asked_to_stop(), iteration + 1
            if is_last or is_asked or (config.save_every and done % config.save_every == 0):
                state = {"kl_coef": kl.coef, "alarms": alarms.state_dict(), "metrics": values}
                checkpointer.save(done, state)
            if is_asked and not is_last:
                run.leave(done)
    return values


@dataclass(frozen=True, kw_only=True)
class Learner:
    """What learns in PPO, and the pretraining text it must not forget."""

    policy: Optimizer
    critic: Optimizer
    ema: EMA
    pretraining: Feed | None
    """None without ptx."""

    @property
    def skipped(self) -> dict[str, SkippedSteps]:
        """The skipped steps of both networks."""
        return {"policy": self.policy.skipped, "critic": self.critic.skipped}


def update(
    learner: Learner,
    config: PPOConfig,
    minibatch: list[Example],
    whitening: Whitening | None,
    *,
    step: int,
) -> dict[str, float]:
    """One optimizer step of policy and critic on a minibatch; `step` counts them over the run."""
    policy, critic = learner.policy.network, learner.critic.network
    parallel = policy.parallel
    iteration = step // config.num_updates
    seed_for_step(parallel, step)
    indices = list(range(len(minibatch)))
    batches = pack_for(minibatch, indices, parallel, config.micro_batch_tokens)
    num_targets = torch.tensor(
        float(sum(len(e.tokens) - e.prompt_length for e in minibatch)), device=parallel.device
    )
    learner.policy.zero_gradients()
    found = policy_gradient(learner, config, batches, num_targets, whitening, step=step)
    learner.critic.zero_gradients()
    batches = pack_for(minibatch, indices, critic.parallel, config.micro_batch_tokens)
    critic_found = forward_backward(
        critic, batches, clipped_value_loss(num_targets, cliprange=config.value_cliprange)
    )
    policy_step = learner.policy.step(iteration)
    critic_step = learner.critic.step(iteration)
    if not policy_step.was_skipped:
        learner.ema.update()
    # Behind the steps, whose launches need none of these numbers.
    values = reduce_metrics(found, parallel) | reduce_metrics(critic_found, critic.parallel)
    return values | {
        "policy_grad_norm": policy_step.grad_norm,
        "critic_grad_norm": critic_step.grad_norm,
        "policy_lr": policy_step.lr,
        "critic_lr": critic_step.lr,
        **{f"{name}_skipped_steps": float(s.total) for name, s in learner.skipped.items()},
        "token_spread": token_spread(minibatch, indices, parallel.dp),
    }


def policy_gradient(  # noqa: PLR0913 - one call for PPO-ptx's two gradients
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
    policy_loss = ClippedPolicyLoss(
        num_targets=num_targets, cliprange=config.cliprange, whitening=whitening
    )
    objectives = [
        Objective(batches=batches, loss=policy_loss, temperature=config.sampling.temperature)
    ]
    if learner.pretraining is not None:
        objectives.append(
            Objective(
                batches=learner.pretraining.batches(step),
                loss=NegativeLogLikelihood(learner.pretraining.num_targets(step), "ptx_loss"),
                scale=config.ptx_coef,
            )
        )
    return accumulate(learner.policy.network, objectives)


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


def _check(config: PPOConfig) -> None:
    """Raise UserError for what cannot work, before anything is loaded."""
    require_path(config.policy, "policy")
    require_path(config.reward_model, "reward-model")
    require_path(config.data.prompts, "data.prompts")
    if config.ptx_coef > 0:
        require_path(config.data.pretraining, "data.pretraining")
    config.check_generation_layout()
    _check_size(config.size, config.policy, "policy")
    _check_size(config.reward_model_size, config.reward_model, "reward_model")
    config.sampling.check()
    if config.sampling.temperature <= 0:
        raise UserError("sampling.temperature must be positive: PPO needs samples, not a maximum")


def _check_size(name: str, path: Path, role: str) -> None:
    """Raise UserError where a size is named and the checkpoint's is another; vocabularies may
    differ."""
    if not name:
        return
    found = size_of(path, role)
    wanted = named_size(name)
    if dataclasses.replace(found, vocab_size=wanted.vocab_size) != wanted:
        raise UserError(
            f"{path}: the {role} has {found.num_layers} layers of width {found.hidden_size} and a "
            f"context of {found.context_length} tokens, a {name} has {wanted.num_layers} of "
            f"{wanted.hidden_size} and {wanted.context_length}"
        )


def _load_frozen(residency: Residency, config: PPOConfig, run: Run) -> tuple[Network, Network]:
    """Return reference and reward model; the reference is always read from its own path."""
    path = config.reference or config.policy
    reference = residency.frozen(
        "reference",
        size_of(path, "policy"),
        lambda into: _load("language", path, "policy", config, run, into),
    )
    reward_model = residency.frozen(
        "reward_model",
        size_of(config.reward_model, "reward_model"),
        lambda into: _load("scalar", config.reward_model, "reward_model", config, run, into),
    )
    return reference, reward_model


def _load(
    kind: Kind, path: Path, role: str, config: PPOConfig, run: Run, into: Network | None = None
) -> Network:
    """Return a network with the weights at `path`: `into`, or one of the size found there; dropout
    is off in PPO."""
    parallel, size = _parallel_of(kind, config, run), size_of(path, role)
    network = into or build_network(kind, size, parallel, numerics=config.numerics)
    load_weights(network, path, role=role, tokenizer_fingerprint=run.tokenizer.fingerprint())
    return network


def _parallel_of(kind: Kind, config: PPOConfig, run: Run) -> Parallel:
    """Return this rank's place in the layout of the language or of the scalar networks."""
    if kind == "language" or config.critic_layout is None:
        return run.parallel
    try:
        config.critic_layout.check(size_of(config.reward_model, "reward_model"))
        return rearranged(run.parallel, config.critic_layout)
    except UserError as error:
        raise UserError(f"critic_layout: {error}") from None


def _load_prompts(config: PPOConfig, run: Run, policy: Network) -> tuple[list[Example], list[str]]:
    """Return the prompts that leave room for a whole response, and what reading them is to be told
    about."""
    data = config.data
    texts, report = read_prompts(data.prompts, skip_bad_lines=data.skip_bad_lines)
    room = policy.size.context_length - config.sampling.max_new_tokens
    if room < 1:
        raise UserError(
            f"sampling.max_new_tokens {config.sampling.max_new_tokens} leaves no room for a prompt "
            f"in the context of {policy.size.context_length}"
        )
    prompts, lengths = prompt_examples(
        texts,
        run.tokenizer,
        max_prompt_length=min(data.max_prompt_tokens, room),
        prompt_suffix=data.prompt_suffix,
    )
    return prompts, [f"{data.prompts}: {report}; {lengths}"]


def _pretraining_feed(config: PPOConfig, run: Run, policy: Network) -> Feed | None:
    """Return the pretraining sequences that go with every minibatch."""
    if config.ptx_coef <= 0:
        return None
    data = config.data
    tokens = run.token_file(data.pretraining, skip_bad_lines=data.skip_bad_lines)
    return Feed(
        units=tokens.sequences(min(data.pretraining_tokens, policy.size.context_length)),
        batch_size=config.ptx_examples_per_episode * config.minibatch_size,
        micro_batch_tokens=config.micro_batch_tokens,
        seed=config.seed,
        parallel=run.parallel,
    )


def _samples(rollout: Rollout, run: Run, count: int) -> list[dict[str, str | float]]:
    """Return the first responses as text, with their scores."""
    bounds = rollout.cu_seqlens.tolist()
    return [
        {
            "prompt": run.tokenizer.decode(
                rollout.tokens[bounds[i] : bounds[i] + rollout.prompt_lengths[i]].tolist()
            ),
            "response": run.tokenizer.decode(
                rollout.tokens[bounds[i] + rollout.prompt_lengths[i] : bounds[i + 1]].tolist()
            ),
            "score": float(rollout.raw_scores[i]),
        }
        for i in range(min(count, len(rollout)))
    ]
