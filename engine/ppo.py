"""PPO and PPO-ptx against the reward model (InstructGPT 3.5 and C.4)."""

from engine.advantage import KLController, estimate_advantages
from engine.alarms import Alarms
from engine.cautions.of_settings import ppo_cautions
from engine.checkpoints.checkpointer import Checkpointer
from engine.checkpoints.course import Course, Kept
from engine.data.batches import EpochOrder
from engine.errors import UserError
from engine.evaluation.held_out import load_held_out
from engine.evidence.keeper import Evidence
from engine.feed import Feed
from engine.huggingface.model_source import tokenizer_of
from engine.identity.inputs import Inputs
from engine.metrics import PPO_HEADLINE, Metrics
from engine.ranks.parallel import Parallel
from engine.ranks.start import rearranged
from engine.residency.residency import Residency
from engine.rollout import generate_rollout, load_prompts
from engine.run import Run, join_ranks, require_data, stage, start_run
from engine.score import score_rollout
from engine.settings.ppo import PPOConfig
from engine.training.ema import EMA
from engine.training.network import Network, build_network
from engine.training.optimizer import Optimizer
from engine.training.skipped import end_if_stuck
from engine.update import Learner, learn
from models.sizes import Kind


@stage()
def train(config: PPOConfig) -> dict[str, float]:
    """Run the stage to its end, or from its newest checkpoint on; return the last metrics."""
    # The first rank looks at files for all.
    parallel = join_ranks(config)
    run, inputs = _start(config, parallel)

    # Build. The critic starts from the reward model.
    policy = inputs.start("policy", _build("language", "policy", config, run, inputs))
    critic = inputs.start("reward_model", _build("scalar", "reward_model", config, run, inputs))
    prompts = load_prompts(config, run, inputs.renderer, _contexts(inputs))
    learner = _learner(config, run, policy, critic)
    residency = Residency(
        config.residency, policy=learner.policy, critic=learner.critic, ema=learner.ema
    )
    networks = {"policy": policy, "critic": critic, **_load_frozen(residency, config, run, inputs)}
    if config.generation_layout is not None:
        residency.generate_in(config.generation_layout, numerics=config.numerics)
    held_out = load_held_out(config, run, residency, networks, prompts.valid)
    kl = KLController(config.kl)
    alarms = Alarms(config.alarms, dtype=config.numerics.dtype, num_layers=policy.size.num_layers)
    order = EpochOrder(len(prompts.train), config.rollout_batch_size, config.seed)

    checkpointer = Checkpointer(
        directory=run.checkpoints,
        mark=run.mark,
        parallel=parallel,
        networks={"policy": policy, "critic": critic},
        optimizers={"policy": learner.policy, "critic": learner.critic},
        ema=learner.ema,
        saving=config.saving,
        tokenizer_fingerprint=run.tokenizer.fingerprint(),
        iterations=learner.rollouts,
        goes_back=config.spikes.policy == "rewind",
    )
    progress = checkpointer.resume() or {"step": 0}
    keeps: dict[str, Kept] = {"kl_coef": kl, "alarms": alarms, "skipped_rollouts": learner.rollouts}
    learner.evidence = Evidence("ppo", inputs.config, run, checkpointer, inputs.digests)
    course = Course(checkpointer, config.spikes, progress, config.iterations, keeps)
    inputs.keep(progress["step"], checkpointer)
    run.leave_if_asked()
    values: dict[str, float] = progress.get("metrics", {})

    metrics = Metrics(
        config.directory,
        is_writer=parallel.is_writer,
        num_steps=config.iterations,
        first_step=progress["step"],
        headline=PPO_HEADLINE,
    )
    with metrics, checkpointer:
        metrics.note(
            *inputs.notes,
            *prompts.notes,
            policy.attention,
            cautions=prompts.cautions
            + ppo_cautions(
                config,
                parallel,
                len(prompts.train),
                learner.num_sequences,
                {"adam": policy.size, "critic_adam": critic.size},
            ),
        )
        for iteration in course:
            # 1 prompt
            batch = [prompts.train[i] for i in order.indices(course.position)]
            with (  # 2
                checkpointer.named_after(f"iteration {iteration}"),
                metrics.phase("rollout"),
                residency.rollout() as generator,
            ):
                rollout = generate_rollout(
                    generator,
                    batch,
                    config.sampling,
                    eos_id=run.tokenizer.eos_id,
                    tokenizer=run.tokenizer,
                    seed=config.seed,
                    first_sample_index=course.position * config.rollout_batch_size,
                )
            with metrics.phase("score"), residency.score():  # 3
                scored = score_rollout(rollout, config, **networks)
            with metrics.phase("advantage"):  # 4
                advantages = estimate_advantages(rollout, scored, config, kl_coef=kl.coef)
            with metrics.phase("update"), residency.update():  # 5
                updated = learn(learner, config, rollout, scored, advantages, course)
            # 6 record
            seconds = metrics.phase_seconds
            values = rollout.metrics(seconds["rollout"]) | scored.metrics(rollout)
            values |= advantages.metrics(rollout, scored) | updated
            values["update/tokens_per_s"] = rollout.num_tokens / seconds["update"]
            values["time/step_seconds"] = sum(seconds.values())
            values |= residency.record(config.directory) | {"kl/coef": kl.coef}
            kl.update(values["score/kl"], learner.num_learned(rollout))
            if held_out.is_due(iteration + 1):
                with metrics.phase("valid"):
                    values |= held_out.numbers()
            metrics.log(iteration, values)
            metrics.log_alarms(
                iteration, learner.evidence.said() + held_out.said() + alarms.check(values)
            )
            is_last = iteration + 1 == config.iterations
            end_if_stuck(f"iteration {iteration}", checkpointer.newest, is_last, **learner.skipped)
            if course.set_back(metrics):
                continue
            if is_last or iteration % config.show_every == 0:
                samples = scored.samples(rollout, run.tokenizer, config.num_shown)
                metrics.log_samples(iteration, samples)
            boundary = checkpointer.boundary(iteration + 1, is_last=is_last)
            if boundary.saves:
                checkpointer.save(iteration + 1, {"metrics": values, **course.state_dict()})
            if boundary.leaves:
                checkpointer.finish()
                run.leave(iteration + 1)
    return values


def _start(config: PPOConfig, parallel: Parallel) -> tuple[Run, Inputs]:
    """Return the run and what it is made from; UserError for what cannot work, before anything is
    loaded."""
    tokenizer = tokenizer_of(None, config.policy, config.directory, option="policy")
    require_data(config.data.prompts, "data.prompts")
    if config.ptx_coef > 0:
        try:
            require_data(config.data.pretraining, "data.pretraining")
        except UserError as error:
            raise UserError(f"{error}; or give --ptx-coef 0, which reads none") from None
    config.check_generation_layout()
    config.sampling.check()
    if config.sampling.temperature <= 0:
        raise UserError("--sampling.temperature must be positive: PPO needs samples, not a maximum")
    run = start_run(directory=config.directory, parallel=parallel, tokenizer=tokenizer)
    inputs = Inputs(run, config)
    readers = ("policy", "reference", "reward_model")
    run.tokenizer.draw_below(min(inputs.size(name).vocab_size for name in readers))
    return run, inputs


def _learner(config: PPOConfig, run: Run, policy: Network, critic: Network) -> Learner:
    """Return what learns, with its optimizers and the policy's average as at a run's start."""
    policy_optimizer = Optimizer(
        policy, config.adam, total_steps=config.iterations, spikes=config.spikes
    )
    critic_optimizer = Optimizer(
        critic, config.critic_adam, total_steps=config.iterations, spikes=config.spikes
    )
    return Learner(
        policy=policy_optimizer,
        critic=critic_optimizer,
        ema=EMA(policy_optimizer, config.ema_decay),
        pretraining=_pretraining_feed(config, run, policy),
    )


def _load_frozen(
    residency: Residency, config: PPOConfig, run: Run, inputs: Inputs
) -> dict[str, Network]:
    """Return reference and reward model, as they were when the run began, by role."""

    def load(kind: Kind, name: str, into: Network | None) -> Network:
        network = into or _build(kind, name, config, run, inputs)
        inputs.load(name, network)
        return network

    reference = residency.frozen(
        "reference", inputs.size("reference"), lambda into: load("language", "reference", into)
    )
    reward_model = residency.frozen(
        "reward_model",
        inputs.size("reward_model"),
        lambda into: load("scalar", "reward_model", into),
    )
    return {"reference": reference, "reward_model": reward_model}


def _build(kind: Kind, name: str, config: PPOConfig, run: Run, inputs: Inputs) -> Network:
    """Return a network of the size that the run was given; dropout is off in PPO."""
    parallel = _parallel_of(kind, config, run, inputs)
    return build_network(kind, inputs.size(name), parallel, numerics=config.numerics)


def _contexts(inputs: Inputs) -> dict[str, int]:
    """Return the context in tokens of each network that reads prompts and responses; the critic is
    of the reward model's size."""
    names = ("policy", "reward_model", "reference")
    return {name.replace("_", " "): inputs.size(name).context_length for name in names}


def _parallel_of(kind: Kind, config: PPOConfig, run: Run, inputs: Inputs) -> Parallel:
    """Return this rank's place in the layout of the language or of the scalar networks."""
    if kind == "language" or config.critic_layout is None:
        return run.parallel
    try:
        config.critic_layout.check(inputs.size("reward_model"))
        return rearranged(run.parallel, config.critic_layout)
    except UserError as error:
        raise UserError(f"critic_layout: {error}".replace("--layout.", "")) from None


def _pretraining_feed(config: PPOConfig, run: Run, policy: Network) -> Feed | None:
    """Return the pretraining sequences that go with every minibatch."""
    if config.ptx_coef <= 0:
        return None
    data = config.data
    tokens = run.token_file(
        data.pretraining, skip_bad_lines=data.skip_bad_lines, fields=data.fields
    )
    run.count("data.pretraining", tokens.report)
    return Feed(
        units=tokens.sequences(min(data.pretraining_tokens, policy.size.context_length)),
        batch_size=config.ptx_examples_per_episode * config.minibatch_size,
        micro_batch_tokens=config.micro_batch_tokens,
        seed=config.seed,
        parallel=run.parallel,
    )
