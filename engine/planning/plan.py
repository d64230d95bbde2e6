"""What a run will need before it is launched: bytes on every GPU, seconds, PF-days and dollars.

    python recipes/plan.py ppo_175b --gpus 64 --gpu h100

Bytes of weights, gradients and optimizer state are exact; activations are counted tensor by tensor;
seconds follow from datasheets and the assumptions of engine/planning/hardware.py, and leave out
validation, selection, checkpoints and reading of files. The host memory of a checkpoint is counted
at the most it can be. Imports neither torch nor megatron.
"""

from dataclasses import dataclass

from engine.planning.hardware import GIGA, Cluster
from engine.planning.memory import STAGING, PlannedNetwork
from engine.planning.misfits import Misfit, misfits
from engine.planning.ranks import RankMemory
from engine.planning.sizes import Sizes, StageConfig, named_sizes
from engine.planning.stages import Estimate, Phase, estimate_ppo, estimate_rm, estimate_sft
from engine.planning.workload import Workload
from engine.settings.rm import RMConfig
from engine.settings.sft import SFTConfig

PF_DAY = 1e15 * 86_400  # FLOPs


@dataclass(frozen=True, kw_only=True)
class Plan:
    """What one stage will need on one cluster."""

    config: StageConfig
    cluster: Cluster
    estimate: Estimate
    sizes: Sizes
    workload: Workload

    @property
    def fits(self) -> bool:
        """Whether every rank has room in every phase, on the GPU and on the host."""
        return not self.misfits

    @property
    def misfits(self) -> list[Misfit]:
        """What a rank has too little of; none where the plan fits."""
        return misfits(self.ranks, self.estimate.cache, self.cluster)

    @property
    def ranks(self) -> list[RankMemory]:
        """What the ranks of every pipeline stage hold at the most."""
        return self.estimate.ranks

    @property
    def fullest(self) -> RankMemory:
        """The rank that takes most memory."""
        return max(self.ranks, key=lambda rank: rank.peak_bytes)

    @property
    def phases(self) -> list[Phase]:
        """The phases of a step."""
        return self.estimate.phases

    @property
    def step_seconds(self) -> float:
        """Seconds of a step, in PPO of an iteration."""
        return sum(sum(phase.seconds.values()) for phase in self.phases)

    @property
    def total_seconds(self) -> float:
        """Seconds of the run."""
        return self.step_seconds * self.estimate.num_steps

    @property
    def dollars(self) -> float:
        """Price of the run."""
        return self.total_seconds / 3600 * self.cluster.num_gpus * self.cluster.price

    @property
    def total_tokens(self) -> float:
        """Tokens that the run trains on."""
        return self.estimate.tokens * self.estimate.num_steps

    @property
    def pf_days(self) -> float:
        """PF-days of the run as papers count them: 6 N a trained token, 2 N a token that is read
        or generated."""
        return sum(phase.flops for phase in self.phases) * self.estimate.num_steps / PF_DAY

    @property
    def attention_pf_days(self) -> float:
        """PF-days of attention's scores and values, which that count leaves out."""
        flops = sum(phase.attention_flops for phase in self.phases)
        return flops * self.estimate.num_steps / PF_DAY

    @property
    def padded_pf_days(self) -> float:
        """PF-days had every example been filled up to the context; this engine packs instead."""
        return sum(phase.padded_flops for phase in self.phases) * self.estimate.num_steps / PF_DAY

    @property
    def mfu(self) -> float:
        """Share of the peak FLOP/s that the counted FLOPs take, attention's included."""
        flops = sum(phase.flops + phase.attention_flops for phase in self.phases)
        return flops / self.step_seconds / self.cluster.num_gpus / self.cluster.gpu.flops

    def lines(self) -> list[str]:
        """Return the plan as text: memory, time, compute and cost."""
        return [
            *self._header(),
            "",
            *self._memory_lines(),
            "",
            *self._time_lines(),
            "",
            *self._total_lines(),
        ]

    def _header(self) -> list[str]:
        cluster = self.cluster
        lines = [f"{cluster.num_gpus} x {cluster.gpu_name}, {cluster.gpu.memory_bytes / GIGA:g} GB"]
        for role, network in self.estimate.networks.items():
            lines.append(f"{role}: {_describe(network)}")
        return [*lines, *(f"  {line}" for line in self.sizes.lines())]

    def _memory_lines(self) -> list[str]:
        rank, cluster = self.fullest, self.cluster
        phases = list(rank.phases)
        rows = list(dict.fromkeys(row for held in rank.phases.values() for row in held))
        width = max(len(row) for row in [*rows, "memory of the fullest rank, GB"]) + 2
        lines = ["memory of the fullest rank, GB".ljust(width) + _columns(phases)]
        for row in rows:
            held = [rank.phases[phase].get(row, 0) for phase in phases]
            lines.append(f"  {row}".ljust(width) + _columns([_gb(size) for size in held]))
        totals = [sum(rank.phases[phase].values()) for phase in phases]
        lines.append("  total".ljust(width) + _columns([_gb(total) for total in totals]))
        verdict = "fits" if self.fits else "DOES NOT FIT"
        lines.append(
            f"  of {cluster.free_bytes / GIGA:.1f} GB, {cluster.assumptions.reserved_gb:g} GB kept "
            f"for CUDA, NCCL and fragmentation: {verdict}"
        )
        if len(self.ranks) > 1:
            peaks = " ".join(f"{rank.peak_bytes / GIGA:.1f}" for rank in self.ranks)
            lines.append(f"  most by pipeline stage: {peaks}")
        if rank.host:
            parts = ", ".join(f"{row} {_gb(size)}" for row, size in rank.host.items())
            lines.append(f"  in pinned host memory: {_gb(rank.host_bytes)} ({parts})")
        return lines + [f"  {note}" for note in self._notes()]

    def _notes(self) -> list[str]:
        estimate, notes = self.estimate, []
        if estimate.cache is not None:
            notes.append(
                f"key-value cache: room for {estimate.cache.tokens:,} tokens a replica, its slots "
                f"can use {estimate.cache.wanted_tokens:,}"
            )
        for resource in ("key-value cache", "host memory"):  # the table shows the GPU's
            short = [misfit for misfit in self.misfits if misfit.resource == resource]
            if short:
                worst = max(short, key=lambda misfit: misfit.missing)
                notes.append(f"does not fit: {_in_words(worst)}")
        notes.append(
            f"a checkpoint: a rank writes or reads {estimate.saved_bytes / GIGA:.2f} GB at most; "
            f"its copies in host memory are taken to be rounded up {STAGING}-fold, which is the "
            "most; none on the GPU"
        )
        return notes

    def _time_lines(self) -> list[str]:
        lines = [f"seconds of one {self.estimate.step_name}"]
        for phase in self.phases:
            parts = sorted(phase.seconds.items(), key=lambda item: -item[1])
            causes = ", ".join(f"{cause} {seconds:.3g}" for cause, seconds in parts if seconds > 0)
            lines.append(f"  {phase.name:<8}{sum(phase.seconds.values()):>10.3g}   {causes}")
        return lines + [
            f"  {'all':<8}{self.step_seconds:>10.3g}   {self.mfu:.0%} of the peak FLOP/s"
        ]

    def _total_lines(self) -> list[str]:
        estimate, cluster = self.estimate, self.cluster
        hours = self.total_seconds / 3600
        is_papers = self.workload == Workload()
        of_paper = ", of data as the paper's (plan.py takes yours)" if is_papers else ""
        return [
            f"the run: {estimate.num_steps:,} {estimate.step_name}s, "
            f"{_number(self.total_tokens / 1e9)} B tokens trained on{of_paper}",
            f"  {_number(hours)} hours, {_number(hours * cluster.num_gpus)} GPU hours, "
            f"${self.dollars:,.0f} at ${cluster.price:g} a GPU hour",
            f"  {_number(self.pf_days)} PF-days (6 N a trained token, 2 N a read one), attention "
            f"{_number(self.attention_pf_days)} besides",
            f"  {_number(self.padded_pf_days)} PF-days if every example filled the context",
        ]


def plan(
    config: StageConfig,
    cluster: Cluster,
    workload: Workload | None = None,
    sizes: Sizes | None = None,
) -> Plan:
    """Return the plan of a stage; raises UserError for a layout that does not divide the cluster or
    hold the model. sizes: of its networks; none: those that its settings name."""
    workload, sizes = workload or Workload(), sizes or named_sizes(config)
    if isinstance(config, SFTConfig):
        estimate = estimate_sft(config, cluster, workload, sizes)
    elif isinstance(config, RMConfig):
        estimate = estimate_rm(config, cluster, workload, sizes)
    else:
        estimate = estimate_ppo(config, cluster, workload, sizes)
    return Plan(config=config, cluster=cluster, estimate=estimate, sizes=sizes, workload=workload)


def _in_words(misfit: Misfit) -> str:
    if misfit.resource == "key-value cache":
        return f"one sequence may need {misfit.needed:,} tokens of cache"
    return (
        f"a rank of stage {misfit.stage} needs {misfit.needed / GIGA:.2f} GB of {misfit.resource}, "
        f"there are {misfit.available / GIGA:.2f}"
    )


def _describe(network: PlannedNetwork) -> str:
    layout, parts = network.layout, []
    if layout.virtual_pp > 1:
        parts.append(f"virtual {layout.virtual_pp}")
    if layout.sequence_parallel:
        parts.append("sequence parallel")
    parts.append(f"recompute {network.numerics.recompute}")
    return (
        f"{network.num_parameters / 1e9:.2f} B parameters in {network.numerics.dtype}, "
        f"{layout.described(network.dp)}, {', '.join(parts)}"
    )


def _columns(cells: list[str]) -> str:
    return "".join(cell.rjust(10) for cell in cells)


def _gb(num_bytes: int) -> str:
    return f"{num_bytes / GIGA:.2f}" if num_bytes else "-"


def _number(value: float) -> str:
    """Three digits, or all before the point."""
    return f"{value:,.0f}" if value >= 100 else f"{value:.3g}"
