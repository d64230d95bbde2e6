"""Four random models, and one PPO iteration on them by the functions that engine.ppo.train calls.

Nothing is read from or written to files. Where no token ends a response, every response has the
full number of tokens. Phases are timed from one synchronisation to the next.
"""

from collections.abc import Callable, Sequence
from dataclasses import dataclass

import numpy as np
from torch.profiler import record_function

from benchmarks.timing import wall_clock
from engine.advantage import Advantages, estimate_advantages
from engine.data.examples import Example
from engine.data.pretraining import TokenSequences
from engine.feed import Feed
from engine.ranks.parallel import Parallel
from engine.residency.residency import Residency
from engine.rollout import Rollout, generate_rollout
from engine.score import Scored, score_rollout
from engine.settings.ppo import PPOConfig
from engine.training.ema import EMA
from engine.training.network import Network, build_network
from engine.training.optimizer import Optimizer
from engine.update import Learner, learning_examples, run_updates
from models.sizes import GPTSize, Kind

NO_EOS = -1
PHASES = ("rollout", "score", "advantage", "update")


@dataclass(frozen=True, kw_only=True)
class Scene:
    """Four models under a residency."""

    residency: Residency
    learner: Learner
    reference: Network
    reward_model: Network


@dataclass(frozen=True, kw_only=True)
class Iteration:
    """What one iteration gave and took."""

    rollout: Rollout
    scored: Scored
    seconds: dict[str, float]
    """By phase."""
    values: dict[str, float]
    """The metrics that engine.ppo.train logs."""
    num_updates: int
    """Optimizer steps."""

    @property
    def total_seconds(self) -> float:
        """Of all phases."""
        return sum(self.seconds.values())


def build(
    config: PPOConfig,
    sizes: tuple[GPTSize, GPTSize],
    parallel: Parallel,
    feed: Feed | None = None,
    fill: Callable[[Network], None] | None = None,
) -> Scene:
    """Return freshly initialised models; reference and reward model hold the weights of policy and
    critic. sizes: of policy and reference, of critic and reward model; feed: pretraining text;
    fill: gives policy and critic other weights."""
    kinds: tuple[Kind, Kind] = ("language", "scalar")

    def make(kind: Kind) -> Network:
        size = sizes[kinds.index(kind)]
        return build_network(kind, size, parallel, numerics=config.numerics)

    def start(kind: Kind) -> Network:
        network = make(kind)
        if fill is not None:
            fill(network)
        return network

    policy, critic = (
        Optimizer(start(kind), adam, total_steps=config.iterations)
        for kind, adam in zip(kinds, (config.adam, config.critic_adam), strict=True)
    )

    def load(kind: Kind, into: Network | None) -> Network:
        if into is not None:
            into.mark_changed()  # they are in the partner's memory already
            return into
        network = make(kind)
        partner = (policy, critic)[kinds.index(kind)].network
        for mine, theirs in zip(network.modules, partner.modules, strict=True):
            for parameter, source in zip(mine.parameters(), theirs.parameters(), strict=True):
                parameter.data.copy_(source.data)
        return network

    learner = Learner(
        policy=policy, critic=critic, ema=EMA(policy, config.ema_decay), pretraining=feed
    )
    residency = Residency(config.residency, policy=policy, critic=critic, ema=learner.ema)
    return Scene(
        residency=residency,
        learner=learner,
        reference=residency.frozen("reference", sizes[0], lambda into: load("language", into)),
        reward_model=residency.frozen("reward_model", sizes[1], lambda into: load("scalar", into)),
    )


def random_prompts(size: GPTSize, count: int, length: int) -> list[Example]:
    """Return prompts of random tokens, the same at every call."""
    tokens = np.random.default_rng(0).integers(0, size.vocab_size, (count, length))
    return [Example(tokens=row, prompt_length=length) for row in tokens]


def random_feed(config: PPOConfig, size: GPTSize, parallel: Parallel, length: int) -> Feed:
    """Return pretraining sequences of random tokens, as many as an iteration's step reads."""
    batch_size = config.ptx_examples_per_episode * config.minibatch_size
    tokens = np.random.default_rng(1).integers(0, size.vocab_size, batch_size * length)
    return Feed(
        units=TokenSequences(tokens, length),
        batch_size=batch_size,
        micro_batch_tokens=config.micro_batch_tokens,
        seed=config.seed,
        parallel=parallel,
    )


def run_iteration(
    scene: Scene,
    config: PPOConfig,
    prompts: Sequence[Example],
    iteration: int,
    eos_id: int = NO_EOS,
) -> Iteration:
    """Run phases 2 to 5 on one rollout batch; iterations count from 0. eos_id: the token that ends
    a response."""
    learner, residency = scene.learner, scene.residency
    policy, critic = learner.policy.network, learner.critic.network
    version = policy.weights_version
    clock = wall_clock(policy.parallel.device)
    made: list[Rollout] = []
    scored: list[Scored] = []
    advantages: list[Advantages] = []
    updated: list[dict[str, float]] = []

    def rollout() -> None:
        with residency.rollout() as generator:
            made.append(
                generate_rollout(
                    generator,
                    prompts,
                    config.sampling,
                    eos_id=eos_id,
                    seed=config.seed,
                    first_sample_index=iteration * len(prompts),
                )
            )

    def score() -> None:
        with residency.score():
            scored.append(
                score_rollout(
                    made[0],
                    config,
                    policy=policy,
                    reference=scene.reference,
                    critic=critic,
                    reward_model=scene.reward_model,
                )
            )

    def advantage() -> None:
        advantages.append(estimate_advantages(made[0], scored[0], config, kl_coef=config.kl.coef))

    def update() -> None:
        with residency.update():
            examples = learning_examples(made[0], scored[0], advantages[0])
            whitening = advantages[0].whitening
            updated.append(run_updates(learner, config, examples, whitening, iteration))

    calls: tuple[Callable[[], None], ...] = (rollout, score, advantage, update)
    seconds = {}
    for phase, call in zip(PHASES, calls, strict=True):
        with record_function(phase):  # which a profiler shows
            seconds[phase] = clock(call) / 1e3
    values = made[0].metrics(seconds["rollout"]) | scored[0].metrics(made[0])
    values |= advantages[0].metrics(made[0], scored[0]) | updated[0]
    return Iteration(
        rollout=made[0],
        scored=scored[0],
        seconds=seconds,
        values=values,
        num_updates=policy.weights_version - version,
    )
