"""What a step of each stage works on: its networks, its batches, and the phases it goes through.

Imports neither torch nor megatron.
"""

import math
from dataclasses import dataclass

from engine.planning.hardware import Cluster
from engine.planning.memory import PlannedNetwork
from engine.planning.ranks import (
    CacheRoom,
    PPONetworks,
    RankMemory,
    cache_room,
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
from engine.planning.sizes import NetworkSize, Sizes
from engine.planning.workload import Batch, Workload
from engine.settings.layout import ParallelLayout
from engine.settings.ppo import PPOConfig
from engine.settings.rm import RMConfig
from engine.settings.sampling import GPU_STEPS_PER_SYNC
from engine.settings.sft import SFTConfig
from models.sizes import Kind


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
    saved_bytes: int
    """What a rank writes of a checkpoint at the most, or reads."""
    cache: CacheRoom | None = None
    """Of a rollout."""


def estimate_sft(config: SFTConfig, cluster: Cluster, workload: Workload, sizes: Sizes) -> Estimate:
    """Estimate SFT, the RLHF initialisation or pretraining."""
    network = _network("language", sizes.policy, config, cluster, has_dropout=config.dropout > 0)
    context, data = network.size.context_length, config.data
    length = min(data.pretraining_tokens, context)
    if data.train is None and data.pretraining is not None:
        batches = [_whole(config.batch_size, length)]
        steps = config.epochs * workload.pretraining_tokens / length / config.batch_size
    else:
        num_pretraining = config.num_pretraining_sequences
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
    reward_model = None
    if sizes.reward_model is not None:
        reward_model = _network("scalar", sizes.reward_model, config, cluster)
    return _training(network, cluster, batches, config.micro_batch_tokens, steps, reward_model)


def estimate_rm(config: RMConfig, cluster: Cluster, workload: Workload, sizes: Sizes) -> Estimate:
    """Estimate the reward model's training; a prompt's answers stay in one row."""
    network = _network("scalar", sizes.reward_model, config, cluster)
    answer = workload.comparison_prompt_tokens + workload.response_tokens
    longest = min(config.data.max_tokens, network.size.context_length)
    keys = workload.completions * answer  # each answer sees its prompt, wherever that is computed
    tokens = keys
    if config.share_prompts:
        tokens -= (workload.completions - 1) * workload.comparison_prompt_tokens
    batch = Batch(
        count=config.batch_size,
        mean_tokens=tokens,
        limit=workload.most_completions * longest,
        span=answer,
        sequences=workload.completions,
        copied_keys=keys / tokens if config.share_prompts else 0.0,
    )
    steps = config.epochs * workload.comparisons / config.batch_size
    return _training(network, cluster, [batch], config.micro_batch_tokens, steps)


def estimate_ppo(config: PPOConfig, cluster: Cluster, workload: Workload, sizes: Sizes) -> Estimate:
    """Estimate PPO or PPO-ptx: rollout, scoring and the updates of an iteration."""
    ppo = _ppo_networks(config, cluster, workload, sizes)
    networks = {"policy": ppo.policy, "critic": ppo.critic}
    if ppo.is_refitted:
        networks["generation"] = ppo.generator
    ranks = ppo_ranks(ppo, cluster)
    cache = cache_room(ppo, ranks)
    moves = _moves(ppo, ranks, cluster)
    rollout = _generation(ppo, config, workload, cache.tokens)
    return Estimate(
        networks=networks,
        ranks=ranks,
        phases=[
            _rollout_phase(ppo, cluster, rollout, moves["rollout"]),
            _score_phase(ppo, cluster, moves["score"], scores_policy=config.scores_policy),
            _update_phase(ppo, cluster, moves["update"], config.num_updates),
        ],
        num_steps=config.iterations,
        step_name="iteration",
        tokens=config.num_updates * sum(batch.tokens for batch in ppo.policy_batches),
        saved_bytes=_most_saved(ppo.policy, has_average=True) + _most_saved(ppo.critic),
        cache=cache,
    )


def _generation(
    ppo: PPONetworks, config: PPOConfig, workload: Workload, cached_tokens: int
) -> Generation:
    """What a replica generates in an iteration, with a cache of so many tokens."""
    sampling, generator, episodes = config.sampling, ppo.generator, ppo.episodes
    slots = min(num_slots(ppo), int(cached_tokens / episodes.mean_tokens))
    return Generation(
        sequences=math.ceil(episodes.count / generator.dp),
        slots=max(generator.layout.pp, slots),
        prompt_tokens=workload.prompt_tokens,
        response_tokens=min(workload.response_tokens, sampling.max_new_tokens),
        most_new_tokens=sampling.max_new_tokens,
        prefill_tokens=sampling.prefill_tokens,
        steps_per_sync=sampling.steps_per_sync or GPU_STEPS_PER_SYNC,
        uses_graphs=sampling.cuda_graphs,
    )


def _rollout_phase(ppo: PPONetworks, cluster: Cluster, work: Generation, moves: Seconds) -> Phase:
    seconds = decode_seconds(ppo.generator, cluster, work)
    if ppo.is_refitted:
        seconds["refit"] = refit_seconds(ppo.generator, cluster)
    return _phase("rollout", seconds | moves, [(ppo.policy, ppo.episodes)], trains=False)


def _score_phase(
    ppo: PPONetworks, cluster: Cluster, moves: Seconds, *, scores_policy: bool
) -> Phase:
    # The policy's log-probs where they are wanted, values, the reference's log-probs, scores. The
    # reward model is the critic's like.
    readers = [ppo.critic, ppo.reference, ppo.critic]
    if scores_policy:
        readers = [ppo.policy, *readers]
    seconds = add_seconds(
        [forward_seconds(network, cluster, ppo.episodes, ppo.budget) for network in readers]
    )
    reads = [(network, ppo.episodes) for network in readers]
    return _phase("score", seconds | moves, reads, trains=False)


def _update_phase(ppo: PPONetworks, cluster: Cluster, moves: Seconds, num_updates: int) -> Phase:
    policy, critic, budget = ppo.policy, ppo.critic, ppo.budget
    one_update = [
        train_seconds(policy, cluster, ppo.policy_batches, budget),
        step_seconds(policy, cluster, ppo.policy_batches, budget, with_average=True),
        train_seconds(critic, cluster, ppo.critic_batches, budget),
        step_seconds(critic, cluster, ppo.critic_batches, budget),
    ]
    one_work = [(policy, batch) for batch in ppo.policy_batches]
    one_work += [(critic, batch) for batch in ppo.critic_batches]
    seconds, work = [], []
    for _ in range(num_updates):
        seconds += one_update
        work += one_work
    return _phase("update", add_seconds(seconds) | moves, work, trains=True)


def _training(
    network: PlannedNetwork,
    cluster: Cluster,
    batches: list[Batch],
    budget: int,
    steps: float,
    reward_model: PlannedNetwork | None = None,
) -> Estimate:
    """Estimate a stage that trains one network."""
    seconds = train_seconds(network, cluster, batches, budget)
    seconds |= step_seconds(network, cluster, batches, budget)
    work = [(network, batch) for batch in batches]
    return Estimate(
        networks={"policy" if network.kind == "language" else "reward model": network},
        ranks=training_ranks(network, batches, budget, reward_model),
        phases=[_phase("train", seconds, work, trains=True)],
        num_steps=math.ceil(steps),
        step_name="step",
        tokens=sum(batch.tokens for batch in batches),
        saved_bytes=_most_saved(network),
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


def _ppo_networks(
    config: PPOConfig, cluster: Cluster, workload: Workload, sizes: Sizes
) -> PPONetworks:
    policy = _network("language", sizes.policy, config, cluster)
    reference = _network("language", sizes.reference or sizes.policy, config, cluster)
    critic = _network("scalar", sizes.reward_model, config, cluster, layout=config.critic_layout)
    generator = policy.in_generation()
    if config.generation_layout is not None:
        config.check_generation_layout()
        generator = _network(
            "language", sizes.policy, config, cluster, layout=config.generation_layout
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
    return PPONetworks(
        policy=policy,
        reference=reference,
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


def _moves(ppo: PPONetworks, ranks: list[RankMemory], cluster: Cluster) -> dict[str, Seconds]:
    """Seconds of an iteration's moves by phase, none of them hidden.

    What the host holds comes in and leaves again. Two models that trade places use both directions
    of the link at once.
    """
    uses = {use for rank in ranks for use in rank.host}
    host = {use: max(rank.host.get(use, 0) for rank in ranks) for use in uses}
    score = gathered = 0.0
    for role, network in (("reference", ppo.reference), ("reward_model", ppo.critic)):
        if getattr(ppo.residency, role) == "sharded":
            gathered += gather_seconds(network, cluster)
        score += 2 * move_seconds(host.get(f"{role} weights", 0), cluster)
    parked = sum(host.get(f"{role} optimizer", 0) for role in ("policy", "critic"))
    away = ppo.residency.critic == "host"
    critic = host.get("critic weights", 0) if away else 0
    return {
        "rollout": {"swap": move_seconds(parked + critic, cluster)},
        "score": {"swap": score + move_seconds(critic, cluster), "gather": gathered},
        "update": {"swap": move_seconds(parked, cluster)},
    }


def _most_saved(network: PlannedNetwork, *, has_average: bool = False) -> int:
    """What a rank writes of a network to a checkpoint, on the stage where that is most."""
    stages = range(network.layout.pp)
    return max(network.saved_bytes(stage, has_average=has_average) for stage in stages)


def _network(
    kind: Kind,
    found: NetworkSize | None,
    config: SFTConfig | RMConfig | PPOConfig,
    cluster: Cluster,
    *,
    layout: ParallelLayout | None = None,
    has_dropout: bool = False,
) -> PlannedNetwork:
    layout = layout or config.layout
    assert found is not None  # of every stage that has the network
    layout.check(found.size)
    return PlannedNetwork(
        kind=kind,
        size=found.size,
        layout=layout,
        numerics=config.numerics,
        dp=layout.dp(cluster.num_gpus),
        has_dropout=has_dropout,
    )


def _whole(count: int, length: int) -> Batch:
    """Sequences of pretraining text, all of one length and predicted throughout."""
    return Batch(count=count, mean_tokens=length, limit=length, span=length)
