"""What the preflight asks of a job's nodes. Imports neither torch nor megatron."""

from dataclasses import dataclass
from pathlib import Path

from engine.settings.checks import check_numbers


@dataclass(frozen=True, kw_only=True)
class PreflightConfig:
    """What the nodes must have. The limits are our choice; 0 asks for nothing."""

    directory: Path = Path("runs")
    """Where runs are written: each rank writes a file there and reads it back."""
    nodes: tuple[str, ...] = ()
    """The job's nodes in the order of their ranks, so that a silent one has a name."""
    timeout_s: float = 120.0
    """Longest wait for all ranks to answer, and for the measurement of the links."""
    payload_mib: int = 64
    """What one all-reduce of the measurement sums up."""
    min_free_gib: float = 0.0
    """Free memory of a rank's GPU; without one, of its node."""
    min_disk_gib: float = 0.0
    """Free space under `directory`."""
    min_node_gb_s: float = 0.0
    """Bus bandwidth of an all-reduce among a node's ranks, in 10^9 bytes a second."""
    min_link_gb_s: float = 0.0
    """The same between two ranks of neighbouring nodes."""
    slow_share: float = 0.5
    """A bandwidth below this share of the median of all nodes is slow, whatever the limits."""
    max_skew_s: float = 2.0
    """Distance of a node's clock from the median of all."""

    def __post_init__(self) -> None:
        check_numbers(
            self,
            counts="payload_mib",
            positive="timeout_s max_skew_s",
            not_negative="min_free_gib min_disk_gib min_node_gb_s min_link_gb_s",
            shares="slow_share",
        )
