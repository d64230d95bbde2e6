"""What a step of each stage works on: its networks, its batches, and the phases it goes through.

Imports neither torch nor megatron.
"""

import math
from dataclasses import dataclass

from engine.errors import UserError
from engine.planning.hardware import GIGA, Cluster
from engine.planning.memory import STAGING, PlannedNetwork
from engine.planning.parameters import Kind
from engine.planning.ranks import (
    Four,
    RankMemory,
    cache_tokens,
    num_slots,
    ppo_ranks,
    training_ranks,
)
from engine.planning.seconds import (
    Generation,
    Seconds,
    add_seconds,
    decode_seconds,
    forward_seconds,
    gather_seconds,
    layer_flops,
    move_seconds,
    refit_seconds,
    step_seconds,
    train_seconds,
)
from engine.planning.workload import Batch, Workload
from engine.settings.layout import ParallelLayout
from engine.settings.ppo import PPOConfig
from engine.settings.rm import RMConfig
from engine.settings.sft import SFTConfig
from engine.settings.size import named_size

REWARD_MODEL = "6b"  # what selects SFT's epoch: its setting names a run, and the paper's is this


@dataclass(frozen=True, kw_only=True)
class Phase:
    """One part of a step."""

    name: str
    seconds: Seconds
    """By cause."""
    flops: float
    """6 N a trained token, 2 N a read one (Kaplan et al. 2020): what papers count."""
    attention_flops: float
    """FLOPs of attention's scores and values, which that count leaves out."""
    padded_flops: float
    """The same count, had every example been filled up to the context."""


@dataclass(frozen=True, kw_only=True)
class Estimate:
    """A stage's steps and what they take."""

    networks: dict[str, PlannedNetwork]
    """The distinct ones, by role."""
    ranks: list[RankMemory]
    phases: list[Phase]
    """Of one step."""
    num_steps: int
    step_name: str
    tokens: float
    """Tokens that a step trains on."""
    notes: list[str]


def estimate_sft(config: SFTConfig, cluster: Cluster, workload: Workload) -> Estimate:
    """Estimate SFT, the RLHF initialisation or pretraining."""
    network = _network("language", config.size, config, cluster, has_dropout=config.dropout > 0)
    context, data = network.size.context_length, config.data
    length = min(data.pretraining_tokens, context)
    fraction = data.pretraining_fraction
    if data.train is None and data.pretraining is not None:
        batches = [_whole(config.batch_size, length)]
        steps = config.epochs * workload.pretraining_tokens / length / config.batch_size
    else:
        # The pretraining's share of the sequences is rounded, and at least one (engine/sft.py).
        num_pretraining = max(1, round(fraction * config.batch_size)) if fraction else 0
        tokens = workload.demonstration_prompt_tokens + workload.demonstration_tokens
        demonstrations = Batch(
            count=config.batch_size - num_pretraining,
            mean_tokens=tokens,
            limit=min(data.max_tokens, context),
            span=tokens,
            target_share=workload.demonstration_tokens / tokens,
        )
        batches = [demonstrations]
        if num_pretraining:
            batches.append(_whole(num_pretraining, length))
        steps = config.epochs * workload.demonstrations / demonstrations.count
    judge = None
    if config.selection.reward_model is not None:
        judge = _network("scalar", REWARD_MODEL, config, cluster)
    return _training(network, cluster, batches, config.micro_batch_tokens, steps, judge)


def estimate_rm(config: RMConfig, cluster: Cluster, workload: Workload) -> Estimate:
    """Estimate the reward model's training; a prompt's answers stay in one row."""
    network = _network("scalar", config.size, config, cluster)
    answer = workload.comparison_prompt_tokens + workload.response_tokens
    longest = min(config.data.max_tokens, network.size.context_length)
    batch = Batch(
        count=config.batch_size,
        mean_tokens=workload.completions * answer,
        limit=workload.most_completions * longest,
        span=answer,
    )
    steps = config.epochs * workload.comparisons / config.batch_size
    return _training(network, cluster, [batch], config.micro_batch_tokens, steps)


def estimate_ppo(config: PPOConfig, cluster: Cluster, workload: Workload) -> Estimate:
    """Estimate PPO or PPO-ptx: rollout, scoring and the updates of an iteration."""
    four = _four(config, cluster, workload)
    policy, critic, episodes = four.policy, four.critic, four.episodes
    generator = four.generator
    ranks = ppo_ranks(four, cluster)
    num_updates = config.ppo_epochs * config.rollout_batch_size // config.minibatch_size
    cached = min(cache_tokens(rank, generator) for rank in ranks)
    rollout = decode_seconds(
        generator,
        cluster,
        Generation(
            sequences=math.ceil(episodes.count / generator.dp),
            slots=max(
                generator.layout.pp, min(num_slots(four), int(cached / episodes.mean_tokens))
            ),
            prompt_tokens=workload.prompt_tokens,
            response_tokens=min(workload.response_tokens, config.sampling.max_new_tokens),
            most_new_tokens=config.sampling.max_new_tokens,
            prefill_tokens=config.sampling.prefill_tokens,
            steps_per_sync=config.sampling.steps_per_sync or 8,
            uses_graphs=config.sampling.cuda_graphs,
        ),
    )
    networks = {"policy": policy, "critic": critic}
    if four.is_refitted:
        rollout["refit"] = refit_seconds(generator, cluster)
        networks["generation"] = generator
    budget = config.micro_batch_tokens
    readers = [policy, critic, policy, critic]
    readers = readers if config.scores_policy else readers[1:]
    score = add_seconds(
        [forward_seconds(network, cluster, episodes, budget) for network in readers]
    )
    step = [
        train_seconds(policy, cluster, four.policy_batches, budget),
        step_seconds(policy, cluster, four.policy_batches, budget, with_average=True),
        train_seconds(critic, cluster, four.critic_batches, budget),
        step_seconds(critic, cluster, four.critic_batches, budget),
    ]
    moves = _moves(four, ranks, cluster)
    reads = [(policy, episodes), (critic, episodes)]
    trains = [(policy, batch) for batch in four.policy_batches]
    trains += [(critic, batch) for batch in four.critic_batches]
    return Estimate(
        networks=networks,
        ranks=ranks,
        phases=[
            _phase("rollout", rollout | moves["rollout"], reads[:1], trains=False),
            _phase(
                "score",
                score | moves["score"],
                [(network, episodes) for network in readers],
                trains=False,
            ),
            _phase(
                "update",
                add_seconds(step * num_updates) | moves["update"],
                trains * num_updates,
                trains=True,
            ),
        ],
        num_steps=config.iterations,
        step_name="iteration",
        tokens=num_updates * sum(batch.tokens for batch in four.policy_batches),
        notes=[
            *_cache_notes(four, cached),
            _saving_note(
                [policy.saved_bytes(stage, has_average=True) for stage in range(policy.layout.pp)],
                [critic.saved_bytes(stage) for stage in range(critic.layout.pp)],
            ),
        ],
    )


def _training(
    network: PlannedNetwork,
    cluster: Cluster,
    batches: list[Batch],
    budget: int,
    steps: float,
    judge: PlannedNetwork | None = None,
) -> Estimate:
    """Estimate a stage that trains one network."""
    seconds = train_seconds(network, cluster, batches, budget)
    seconds |= step_seconds(network, cluster, batches, budget)
    work = [(network, batch) for batch in batches]
    return Estimate(
        networks={"policy" if network.kind == "language" else "reward model": network},
        ranks=training_ranks(network, batches, budget, judge),
        phases=[_phase("train", seconds, work, trains=True)],
        num_steps=math.ceil(steps),
        step_name="step",
        tokens=sum(batch.tokens for batch in batches),
        notes=[
            *([f"the reward model is taken to be a {REWARD_MODEL}"] if judge else []),
            _saving_note([network.saved_bytes(stage) for stage in range(network.layout.pp)]),
        ],
    )


def _phase(
    name: str, seconds: Seconds, work: list[tuple[PlannedNetwork, Batch]], *, trains: bool
) -> Phase:
    """A phase in which networks go through batches, forward or forward and backward."""
    passes = 3 if trains else 1
    flops = attention_flops = padded_flops = 0.0
    for network, batch in work:
        a_token = 2.0 * passes * network.num_counted
        flops += a_token * batch.tokens
        padded_flops += a_token * batch.padded(network.size.context_length).tokens
        _, attention = layer_flops(network, batch.span)
        attention_flops += passes * network.size.num_layers * attention * batch.tokens
    return Phase(
        name=name,
        seconds=seconds,
        flops=flops,
        attention_flops=attention_flops,
        padded_flops=padded_flops,
    )


def _four(config: PPOConfig, cluster: Cluster, workload: Workload) -> Four:
    if not config.size or not config.reward_model_size:
        raise UserError("a plan of PPO needs --size and --reward-model-size, named sizes")
    if config.rollout_batch_size % config.minibatch_size:
        raise UserError(
            f"rollout_batch_size {config.rollout_batch_size} must be a multiple of "
            f"minibatch_size {config.minibatch_size}"
        )
    policy = _network("language", config.size, config, cluster)
    critic = _network(
        "scalar", config.reward_model_size, config, cluster, layout=config.critic_layout
    )
    generator = policy.in_generation()
    if config.generation_layout is not None:
        config.check_generation_layout()
        generator = _network(
            "language", config.size, config, cluster, layout=config.generation_layout
        )
    response = min(workload.response_tokens, config.sampling.max_new_tokens)
    tokens = workload.prompt_tokens + response
    context = policy.size.context_length
    longest = min(context, config.data.max_prompt_tokens + config.sampling.max_new_tokens)

    def episodes(count: int) -> Batch:
        return Batch(
            count=count,
            mean_tokens=tokens,
            limit=longest,
            span=tokens,
            target_share=response / tokens,
        )

    minibatch = episodes(config.minibatch_size)
    policy_batches = [minibatch]
    if config.ptx_coef > 0:
        count = config.ptx_examples_per_episode * config.minibatch_size
        policy_batches.append(_whole(count, min(config.data.pretraining_tokens, context)))
    return Four(
        policy=policy,
        critic=critic,
        generator=generator,
        is_refitted=config.generation_layout is not None,
        residency=config.residency,
        sampling=config.sampling,
        episodes=episodes(config.rollout_batch_size),
        policy_batches=policy_batches,
        critic_batches=[minibatch],
        budget=config.micro_batch_tokens,
        most_tokens=longest,
    )


def _moves(four: Four, ranks: list[RankMemory], cluster: Cluster) -> dict[str, Seconds]:
    """Seconds of an iteration's moves by phase, none of them hidden: what the host holds comes in
    and leaves again; two models that trade places use both directions of the link at once."""
    host = {row: max(rank.host.get(row, 0) for rank in ranks) for row in _rows(ranks)}
    score = gathered = 0.0
    for role, network in (("reference", four.policy), ("reward_model", four.critic)):
        if getattr(four.residency, role) == "sharded":
            gathered += gather_seconds(network, cluster)
        score += 2 * move_seconds(host.get(f"{role} weights", 0), cluster)
    parked = sum(host.get(f"{role} optimizer", 0) for role in ("policy", "critic"))
    away = four.residency.critic == "host"
    critic = host.get("critic weights", 0) if away else 0
    return {
        "rollout": {"swap": move_seconds(parked + critic, cluster)},
        "score": {"swap": score + move_seconds(critic, cluster), "gather": gathered},
        "update": {"swap": move_seconds(parked, cluster)},
    }


def _rows(ranks: list[RankMemory]) -> set[str]:
    return {row for rank in ranks for row in rank.host}


def _cache_notes(four: Four, cached: int) -> list[str]:
    wanted = num_slots(four) * four.most_tokens
    notes = [f"key-value cache: room for {cached:,} tokens a replica, its slots can use {wanted:,}"]
    if cached < four.most_tokens:
        notes.append(f"does not fit: one sequence may need {four.most_tokens:,} tokens of cache")
    return notes


def _saving_note(*by_stage: list[int]) -> str:
    """by_stage: what a rank writes of each network."""
    most = sum(max(saved) for saved in by_stage)
    return (
        f"a checkpoint: a rank writes or reads {most / GIGA:.2f} GB at most; its copies in host "
        f"memory are taken to be rounded up {STAGING}-fold, which is the most; none on the GPU"
    )


def _network(
    kind: Kind,
    size: str,
    config: SFTConfig | RMConfig | PPOConfig,
    cluster: Cluster,
    *,
    layout: ParallelLayout | None = None,
    has_dropout: bool = False,
) -> PlannedNetwork:
    layout = layout or config.layout
    shape = named_size(size)
    layout.check(shape)
    return PlannedNetwork(
        kind=kind,
        size=shape,
        layout=layout,
        numerics=config.numerics,
        dp=layout.dp(cluster.num_gpus),
        has_dropout=has_dropout,
    )


def _whole(count: int, length: int) -> Batch:
    """Sequences of pretraining text, all of one length and predicted throughout."""
    return Batch(count=count, mean_tokens=length, limit=length, span=length)
