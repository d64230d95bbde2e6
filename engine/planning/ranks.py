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

Rows = dict[str, int]
"""What the bytes are for, to bytes."""

CHECKPOINT = "checkpoint"  # the row of host memory


@dataclass(frozen=True, kw_only=True)
class RankMemory:
    """What the ranks of a pipeline stage hold at the most."""

    stage: int
    """Of the run's layout, the policy's in PPO."""
    phases: dict[str, Rows]
    """Phase to what its bytes on the GPU are for."""
    host: Rows
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
    judge: PlannedNetwork | None = None,
) -> list[RankMemory]:
    """Return the ranks of SFT, RM or pretraining by stage: one network, and perhaps the reward
    model that judges its epochs, always resident."""
    found = []
    for stage in range(network.layout.pp):
        rows = {
            "weights": network.weight_bytes(stage),
            "gradients": network.gradient_bytes(stage),
            "fp32 masters": network.master_bytes(stage),
            "Adam moments": network.moment_bytes(stage),
        }
        if judge is not None:
            rows["reward model"] = judge.weight_bytes(stage)
        rows |= _working_bytes(network, stage, batches, budget)
        host = {CHECKPOINT: network.checkpoint_host_bytes(stage)}
        found.append(RankMemory(stage=stage, phases={"train": rows}, host=host))
    return found


@dataclass(frozen=True, kw_only=True)
class Four:
    """PPO's networks and what they work on."""

    policy: PlannedNetwork
    """The reference is its like."""
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


def ppo_ranks(four: Four, cluster: Cluster) -> list[RankMemory]:
    """Return what the ranks of every stage of the policy hold at the most. The critic's stages may
    be cut otherwise, so that one rank is the fullest in one phase or on the host, another in
    another."""
    policy_pp, critic_pp = four.policy.layout.pp, four.critic.layout.pp
    cuts = math.lcm(policy_pp, critic_pp)
    by_stage: dict[int, list[RankMemory]] = {}
    for cut in range(cuts):
        stage, critic_stage = cut * policy_pp // cuts, cut * critic_pp // cuts
        by_stage.setdefault(stage, []).append(_ppo_rank(four, cluster, stage, critic_stage))
    return [_most(ranks) for ranks in by_stage.values()]


def _most(ranks: list[RankMemory]) -> RankMemory:
    """What the fullest rank of a stage holds, phase by phase and on the host."""
    phases = {
        phase: max((rank.phases[phase] for rank in ranks), key=lambda rows: sum(rows.values()))
        for phase in ranks[0].phases
    }
    host = max(ranks, key=lambda rank: rank.host_bytes).host
    return RankMemory(stage=ranks[0].stage, phases=phases, host=host)


def cache_tokens(rank: RankMemory, generator: PlannedNetwork) -> int:
    """Return the tokens that a rank's key-value cache holds."""
    return rank.phases["rollout"]["key-value cache"] // generator.cache_bytes_a_token()


def model_bytes(
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


def _ppo_rank(four: Four, cluster: Cluster, stage: int, critic_stage: int) -> RankMemory:
    models = {
        "policy": model_bytes(four.policy, stage, is_trained=True, average=True),
        "reference": model_bytes(four.policy, stage, is_trained=False),
        "critic": model_bytes(four.critic, critic_stage, is_trained=True),
        "reward_model": model_bytes(four.critic, critic_stage, is_trained=False),
    }
    if four.is_refitted:
        models["generation"] = model_bytes(four.generator, 0, is_trained=False)
    expected = expected_bytes(four.residency, models)
    phases = {phase: _held(expected, four, stage, phase) for phase in PHASES}
    phases["rollout"] |= _generation_bytes(four, cluster, stage, sum(phases["rollout"].values()))
    pairs = ((four.policy, stage), (four.critic, critic_stage))
    tokens = [four.episodes.rows(network.dp, four.budget)[1] for network, _ in pairs]
    phases["score"]["workspace"] = max(
        network.workspace_bytes(at, row, trains=False)
        for (network, at), row in zip(pairs, tokens, strict=True)
    )
    work = [
        _working_bytes(network, at, batches, four.budget)
        for (network, at), batches in zip(
            pairs, (four.policy_batches, four.critic_batches), strict=True
        )
    ]
    largest: Rows = max(work, key=lambda rows: sum(rows.values()))  # one after the other
    phases["update"] |= largest
    host = {row: size for row, size in expected.host.items() if size}
    # One network is saved after the other, and pinned memory is kept.
    host[CHECKPOINT] = four.policy.checkpoint_host_bytes(stage, has_average=True)
    host[CHECKPOINT] += four.critic.checkpoint_host_bytes(critic_stage)
    return RankMemory(stage=stage, phases=phases, host=host)


def _held(expected: ExpectedBytes, four: Four, stage: int, phase: str) -> Rows:
    """The rows of what a phase holds; the policy's optimizer and its average apart."""
    rows = {row: sizes[phase] for row, sizes in expected.device.items() if sizes[phase]}
    if "policy optimizer" in rows:
        average = four.policy.average_bytes(stage)
        rows["policy optimizer"] -= average
        rows["policy average"] = average
    return rows


def _working_bytes(
    network: PlannedNetwork, stage: int, batches: Sequence[Batch], budget: int
) -> Rows:
    """Activations and workspace of forward and backward passes over rows of these batches."""
    # The most there can be: examples of the greatest length, and no row longer than the budget, or
    # than a single example that is over it.
    most = [math.ceil(batch.count / network.dp) * batch.limit for batch in batches]
    count = sum(math.ceil(tokens / budget) for tokens in most)
    longest = max(batch.limit for batch in batches)
    tokens = min(max(budget, longest), max(most))
    return {
        "activations": network.activation_bytes(stage, count, tokens),
        "workspace": network.workspace_bytes(stage, tokens, trains=True),
    }


def _generation_bytes(four: Four, cluster: Cluster, stage: int, held: int) -> Rows:
    """The key-value cache and the workspace of decoding; see engine/generation/cache.py."""
    network, sampling = four.generator, four.sampling
    width, hidden, tp = network.element_bytes, network.size.hidden_size, network.layout.tp
    slots = num_slots(four)
    # Inputs, queries, the MLP's wide tensors and the output of a step's tokens; fp32 logits and
    # their copy for sampling.
    tokens = slots / network.layout.pp + sampling.prefill_tokens
    workspace = tokens * width * hidden * (4 + 12 / tp)
    if four.is_refitted or stage == network.layout.pp - 1:
        workspace += 2 * 4 * slots / network.layout.pp * network.size.padded_vocab_size / tp
    free = max(0, cluster.free_bytes - held - round(workspace))
    wanted = slots * four.most_tokens * network.cache_bytes_a_token()
    limit = sampling.cache_gib * 2**30 if sampling.cache_gib else sampling.cache_fraction * free
    return {"key-value cache": round(min(limit, wanted)), "workspace": round(workspace)}


def num_slots(four: Four) -> int:
    """Return the sequences that a replica decodes together, its stages' groups in all."""
    pp, dp = four.generator.layout.pp, four.generator.dp
    sequences = min(four.sampling.num_slots, math.ceil(four.episodes.count / dp))
    return math.ceil(sequences / pp) * pp
