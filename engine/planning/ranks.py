"""What a rank of every pipeline stage holds in every phase of a run, on the GPU and on the host.

Imports neither torch nor megatron.
"""

import math
from collections.abc import Sequence
from dataclasses import dataclass

from engine.planning.hardware import Cluster
from engine.planning.memory import PlannedNetwork
from engine.planning.workload import Batch
from engine.residency.expected import PHASES, ExpectedBytes, ModelBytes, expected_bytes
from engine.settings.residency import ResidencyConfig
from engine.settings.sampling import SamplingConfig

BytesByUse = dict[str, int]
"""What the bytes are for, to bytes: the rows of a plan's table."""

CHECKPOINT = "checkpoint"  # the row of host memory


@dataclass(frozen=True, kw_only=True)
class RankMemory:
    """What the ranks of a pipeline stage hold at the most."""

    stage: int
    """Of the run's layout, the policy's in PPO."""
    phases: dict[str, BytesByUse]
    """Phase to what its bytes on the GPU are for."""
    host: BytesByUse
    """Pinned host memory, that of checkpoints at the most it can be."""

    @property
    def peak_phase(self) -> str:
        """The phase that takes most."""
        return max(self.phases, key=lambda phase: sum(self.phases[phase].values()))

    @property
    def peak_bytes(self) -> int:
        """Bytes of that phase."""
        return sum(self.phases[self.peak_phase].values())

    @property
    def host_bytes(self) -> int:
        """Bytes of pinned host memory."""
        return sum(self.host.values())


def training_ranks(
    network: PlannedNetwork,
    batches: Sequence[Batch],
    budget: int,
    reward_model: PlannedNetwork | None = None,
) -> list[RankMemory]:
    """Return the ranks of SFT, RM or pretraining by stage.

    They hold one network, and the reward model by which its epoch is selected, where there is one.
    """
    found = []
    for stage in range(network.layout.pp):
        rows = {
            "weights": network.weight_bytes(stage),
            "gradients": network.gradient_bytes(stage),
            "fp32 masters": network.master_bytes(stage),
            "Adam moments": network.moment_bytes(stage),
        }
        if reward_model is not None:
            rows["reward model"] = reward_model.weight_bytes(stage)
        rows |= _working_bytes(network, stage, batches, budget)
        host = {CHECKPOINT: network.checkpoint_host_bytes(stage)}
        found.append(RankMemory(stage=stage, phases={"train": rows}, host=host))
    return found


@dataclass(frozen=True, kw_only=True)
class PPONetworks:
    """PPO's networks and what they work on."""

    policy: PlannedNetwork
    reference: PlannedNetwork
    """In the policy's layout."""
    critic: PlannedNetwork
    """The reward model is its like."""
    generator: PlannedNetwork
    """The policy as it generates, or its copy in a generation layout."""
    is_refitted: bool
    """Whether a copy of the policy generates."""
    residency: ResidencyConfig
    sampling: SamplingConfig
    episodes: Batch
    """An iteration's."""
    policy_batches: Sequence[Batch]
    """An optimizer step's: episodes, and pretraining text where there is any."""
    critic_batches: Sequence[Batch]
    budget: int
    most_tokens: int
    """Of a prompt with its response."""


def ppo_ranks(ppo: PPONetworks, cluster: Cluster) -> list[RankMemory]:
    """Return what the ranks of every stage of the policy hold at the most.

    The critic's stages may be cut otherwise. One rank is then the fullest in one phase, another in
    another or on the host.
    """
    policy_pp, critic_pp = ppo.policy.layout.pp, ppo.critic.layout.pp
    cuts = math.lcm(policy_pp, critic_pp)
    by_stage: dict[int, list[RankMemory]] = {}
    for cut in range(cuts):
        stage, critic_stage = cut * policy_pp // cuts, cut * critic_pp // cuts
        by_stage.setdefault(stage, []).append(_ppo_rank(ppo, cluster, stage, critic_stage))
    return [_most(ranks) for ranks in by_stage.values()]


def _most(ranks: list[RankMemory]) -> RankMemory:
    """What the fullest rank of a stage holds, phase by phase and on the host."""
    phases = {
        phase: max((rank.phases[phase] for rank in ranks), key=lambda rows: sum(rows.values()))
        for phase in ranks[0].phases
    }
    host = max(ranks, key=lambda rank: rank.host_bytes).host
    return RankMemory(stage=ranks[0].stage, phases=phases, host=host)


@dataclass(frozen=True, kw_only=True)
class CacheRoom:
    """The key-value cache of the rank that has least room for it."""

    stage: int
    tokens: int
    """That it holds."""
    wanted_tokens: int
    """That its slots can use."""
    sequence_tokens: int
    """Of the longest sequence, which it must hold."""


def cache_room(ppo: PPONetworks, ranks: Sequence[RankMemory]) -> CacheRoom:
    """Return the room that the ranks of a replica have for keys and values."""
    a_token = ppo.generator.cache_bytes_a_token()
    held = {rank.stage: rank.phases["rollout"]["key-value cache"] // a_token for rank in ranks}
    stage = min(held, key=lambda stage: held[stage])
    return CacheRoom(
        stage=stage,
        tokens=held[stage],
        wanted_tokens=num_slots(ppo) * ppo.most_tokens,
        sequence_tokens=ppo.most_tokens,
    )


def _model_bytes(
    network: PlannedNetwork, stage: int, *, is_trained: bool, average: bool = False
) -> ModelBytes:
    """Return what one of PPO's models takes on a rank."""
    optimizer = network.master_bytes(stage) + network.moment_bytes(stage)
    if average:
        optimizer += network.average_bytes(stage)
    return ModelBytes(
        weights=network.weight_bytes(stage),
        gradients=network.gradient_bytes(stage) if is_trained else 0,
        optimizer=optimizer if is_trained else 0,
        layer=network.layer_weight_bytes(),
        ends=network.end_bytes(stage),
        dp=network.dp,
    )


def _ppo_rank(ppo: PPONetworks, cluster: Cluster, stage: int, critic_stage: int) -> RankMemory:
    models = {
        "policy": _model_bytes(ppo.policy, stage, is_trained=True, average=True),
        "reference": _model_bytes(ppo.reference, stage, is_trained=False),
        "critic": _model_bytes(ppo.critic, critic_stage, is_trained=True),
        "reward_model": _model_bytes(ppo.critic, critic_stage, is_trained=False),
    }
    if ppo.is_refitted:
        models["generation"] = _model_bytes(ppo.generator, 0, is_trained=False)
    expected = expected_bytes(ppo.residency, models)
    phases = {phase: _held(expected, ppo, stage, phase) for phase in PHASES}
    phases["rollout"] |= _generation_bytes(ppo, cluster, stage, sum(phases["rollout"].values()))
    pairs = ((ppo.policy, stage), (ppo.critic, critic_stage))
    phases["score"]["workspace"] = max(
        network.workspace_bytes(at, ppo.episodes.rows(network.dp, ppo.budget)[1], trains=False)
        for network, at in ((ppo.reference, stage), *pairs)
    )
    work = [
        _working_bytes(network, at, batches, ppo.budget)
        for (network, at), batches in zip(
            pairs, (ppo.policy_batches, ppo.critic_batches), strict=True
        )
    ]
    largest: BytesByUse = max(work, key=lambda rows: sum(rows.values()))  # one after the other
    phases["update"] |= largest
    host = {row: size for row, size in expected.host.items() if size}
    # One network is saved after the other, and pinned memory is kept.
    host[CHECKPOINT] = ppo.policy.checkpoint_host_bytes(stage, has_average=True)
    host[CHECKPOINT] += ppo.critic.checkpoint_host_bytes(critic_stage)
    return RankMemory(stage=stage, phases=phases, host=host)


def _held(expected: ExpectedBytes, ppo: PPONetworks, stage: int, phase: str) -> BytesByUse:
    """The rows of what a phase holds; the policy's optimizer and its average apart."""
    rows = {row: sizes[phase] for row, sizes in expected.device.items() if sizes[phase]}
    if "policy optimizer" in rows:
        average = ppo.policy.average_bytes(stage)
        rows["policy optimizer"] -= average
        rows["policy average"] = average
    return rows


def _working_bytes(
    network: PlannedNetwork, stage: int, batches: Sequence[Batch], budget: int
) -> BytesByUse:
    """Activations and workspace of forward and backward passes over rows of these batches."""
    # The most there can be: examples of the greatest length, and no row longer than the budget, or
    # than a single example that is over it.
    most = [math.ceil(batch.count / network.dp) * batch.limit for batch in batches]
    count = sum(math.ceil(tokens / budget) for tokens in most)
    longest = max(batch.limit for batch in batches)
    tokens = min(max(budget, longest), max(most))
    copied_keys = max(batch.copied_keys for batch in batches)
    return {
        "activations": network.activation_bytes(stage, count, tokens, copied_keys),
        "workspace": network.workspace_bytes(stage, tokens, copied_keys, trains=True),
    }


def _generation_bytes(ppo: PPONetworks, cluster: Cluster, stage: int, held: int) -> BytesByUse:
    """The key-value cache and the workspace of decoding; see engine/generation/cache.py."""
    network, sampling = ppo.generator, ppo.sampling
    width, size, tp = network.element_bytes, network.size, network.layout.tp
    slots = num_slots(ppo)
    # Inputs, queries, the MLP's wide tensors and the output of a step's tokens; fp32 logits and
    # their copy for sampling.
    tokens = slots / network.layout.pp + sampling.prefill_tokens
    wide = size.qkv_width + size.num_heads * size.head_dim + size.fc1_width + size.ffn_size
    workspace = tokens * width * (4 * size.hidden_size + wide / tp)
    if ppo.is_refitted or stage == network.layout.pp - 1:
        workspace += 2 * 4 * slots / network.layout.pp * network.size.padded_vocab_size / tp
    free = max(0, cluster.free_bytes - held - round(workspace))
    wanted = slots * ppo.most_tokens * network.cache_bytes_a_token()
    limit = sampling.cache_gib * 2**30 if sampling.cache_gib else sampling.cache_fraction * free
    return {"key-value cache": round(min(limit, wanted)), "workspace": round(workspace)}


def num_slots(ppo: PPONetworks) -> int:
    """Return the sequences that a replica decodes together, its stages' groups in all."""
    pp, dp = ppo.generator.layout.pp, ppo.generator.dp
    sequences = min(ppo.sampling.num_slots, math.ceil(ppo.episodes.count / dp))
    return math.ceil(sequences / pp) * pp
