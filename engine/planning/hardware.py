"""What the GPUs of a cluster can do by their datasheets, and what share of it a plan counts on.

Imports neither torch nor megatron.
"""

from dataclasses import dataclass, field

from engine.errors import UserError
from engine.settings.checks import check_numbers

TERA, GIGA = 10**12, 10**9


@dataclass(frozen=True, kw_only=True)
class GPU:
    """One GPU in its usual node: the vendor's datasheet values, a GB being 10^9 bytes, and
    bandwidths in one direction."""

    flops: float
    """Peak dense bf16 FLOP/s (datasheets print twice as much, with sparsity)."""
    memory_bytes: int
    """Device memory. Drivers report a few percent more; that stays as a margin."""
    memory_bandwidth: float
    """Bytes/s between the GPU and its memory."""
    nvlink_bandwidth: float
    """Bytes/s to the GPUs of the same NVLink domain."""
    nvlink_domain: int = 8
    """GPUs that NVLink joins."""
    network_bandwidth: float
    """Bytes/s to other nodes, a GPU."""
    host_bandwidth: float
    """Bytes/s between the GPU and pinned host memory, over PCIe or NVLink-C2C."""
    host_memory_bytes: int
    """Host memory a GPU, of the vendor's reference node."""
    dollars_per_hour: float
    """Price of a GPU hour: our assumption, in the range of public offers; --dollars-per-hour."""


# Nodes: DGX A100 (8 x HDR InfiniBand, PCIe 4), DGX H100 and H200 (8 x NDR, PCIe 5), DGX B200
# (8 x NDR, PCIe 5), GB200 NVL72 (a Grace CPU's NVLink-C2C of 2 x 450 GB/s serves two GPUs).
GPUS = {
    "a100": GPU(
        flops=312 * TERA,
        memory_bytes=80 * GIGA,
        memory_bandwidth=2.039 * TERA,
        nvlink_bandwidth=300 * GIGA,
        network_bandwidth=25 * GIGA,
        host_bandwidth=32 * GIGA,
        host_memory_bytes=250 * GIGA,
        dollars_per_hour=2.0,
    ),
    "h100": GPU(
        flops=989 * TERA,
        memory_bytes=80 * GIGA,
        memory_bandwidth=3.35 * TERA,
        nvlink_bandwidth=450 * GIGA,
        network_bandwidth=50 * GIGA,
        host_bandwidth=64 * GIGA,
        host_memory_bytes=250 * GIGA,
        dollars_per_hour=3.0,
    ),
    "h200": GPU(
        flops=989 * TERA,
        memory_bytes=141 * GIGA,
        memory_bandwidth=4.8 * TERA,
        nvlink_bandwidth=450 * GIGA,
        network_bandwidth=50 * GIGA,
        host_bandwidth=64 * GIGA,
        host_memory_bytes=250 * GIGA,
        dollars_per_hour=3.5,
    ),
    "b200": GPU(
        flops=2250 * TERA,
        memory_bytes=180 * GIGA,
        memory_bandwidth=8.0 * TERA,
        nvlink_bandwidth=900 * GIGA,
        network_bandwidth=50 * GIGA,
        host_bandwidth=64 * GIGA,
        host_memory_bytes=250 * GIGA,
        dollars_per_hour=6.0,
    ),
    "gb200": GPU(
        flops=2500 * TERA,
        memory_bytes=186 * GIGA,
        memory_bandwidth=8.0 * TERA,
        nvlink_bandwidth=900 * GIGA,
        nvlink_domain=72,
        network_bandwidth=50 * GIGA,
        host_bandwidth=225 * GIGA,
        host_memory_bytes=240 * GIGA,
        dollars_per_hour=7.0,
    ),
}


@dataclass(frozen=True, kw_only=True)
class Assumptions:
    """What a plan counts on beyond the datasheets. All are assumptions of ours, not measurements of
    this engine."""

    compute: float = 0.62
    """Share of the peak FLOP/s that a layer's kernels reach on long rows, before communication and
    bubbles: with it a plan meets the 13.75 s that Korthikanti et al. 2022 (Table 5) measured for
    a step of 175B on 64 A100."""
    memory: float = 0.6
    """Share of the memory bandwidth that decoding and optimizer steps reach."""
    links: float = 0.8
    """Share of the bandwidth of NVLink, network and host link that long messages reach."""
    latency_us: float = 10.0
    """Microseconds that a collective, or a hop between pipeline stages, takes at the least."""
    layer_launch_us: float = 550.0
    """Microseconds of the host to launch a decoding layer outside of CUDA graphs: on an H100 a step
    of 1.3B, whose work takes 7 ms, took 13.7 ms without graphs, 24 layers, the head and a sample
    (benchmarks/results). Without collectives, which that had none of."""
    graph_launch_us: float = 20.0
    """Microseconds of the host to launch a decoding step's CUDA graph; estimated, to be measured on
    a GPU."""
    look_us: float = 400.0
    """Microseconds in which the device waits while the host looks at what was drawn, schedules and
    uploads the next steps; estimated, to be measured on a GPU."""
    reserved_gb: float = 5.0
    """GB that are nobody's: CUDA context, NCCL's buffers, cuBLAS's workspaces, fragmentation."""

    def __post_init__(self) -> None:
        check_numbers(
            self,
            "assumptions.",
            positive="compute memory links",
            not_negative="latency_us layer_launch_us graph_launch_us look_us reserved_gb",
            shares="compute memory links",
        )


@dataclass(frozen=True, kw_only=True)
class Cluster:
    """The GPUs a plan is made for."""

    gpu: GPU
    num_gpus: int
    gpu_name: str = "GPU"
    dollars_per_hour: float | None = None
    """Price of a GPU hour; none: the GPU's."""
    assumptions: Assumptions = field(default_factory=Assumptions)

    @property
    def price(self) -> float:
        """Dollars a GPU hour."""
        return self.gpu.dollars_per_hour if self.dollars_per_hour is None else self.dollars_per_hour

    @property
    def flops(self) -> float:
        """FLOP/s of a GPU that a plan counts on."""
        return self.gpu.flops * self.assumptions.compute

    @property
    def memory_bandwidth(self) -> float:
        """Bytes/s of a GPU's memory that a plan counts on."""
        return self.gpu.memory_bandwidth * self.assumptions.memory

    @property
    def host_bandwidth(self) -> float:
        """Bytes/s between GPU and host that a plan counts on."""
        return self.gpu.host_bandwidth * self.assumptions.links

    @property
    def latency(self) -> float:
        """Seconds that any message takes at the least."""
        return self.assumptions.latency_us * 1e-6

    def link_bandwidth(self, span: int) -> float:
        """Return the bytes/s a GPU can count on within a group that spans so many consecutive
        ranks."""
        within = span <= self.gpu.nvlink_domain
        link = self.gpu.nvlink_bandwidth if within else self.gpu.network_bandwidth
        return link * self.assumptions.links

    @property
    def free_bytes(self) -> int:
        """Bytes of a GPU that a plan may fill."""
        return self.gpu.memory_bytes - round(self.assumptions.reserved_gb * GIGA)


def named_cluster(
    gpu: str,
    num_gpus: int,
    *,
    dollars_per_hour: float | None = None,
    assumptions: Assumptions | None = None,
) -> Cluster:
    """Return a cluster of a GPU of the table; raises UserError for a name that is not there."""
    if gpu not in GPUS:
        raise UserError(f"no GPU is named {gpu!r}; the GPUs are {', '.join(GPUS)}")
    if num_gpus < 1:
        raise UserError(f"--gpus must be at least 1, got {num_gpus}")
    if dollars_per_hour is not None and not dollars_per_hour >= 0:
        raise UserError(f"--dollars-per-hour must not be negative, got {dollars_per_hour}")
    return Cluster(
        gpu=GPUS[gpu],
        gpu_name=gpu,
        num_gpus=num_gpus,
        dollars_per_hour=dollars_per_hour,
        assumptions=assumptions or Assumptions(),
    )
