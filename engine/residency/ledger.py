"""Who holds how many bytes in which phase, on the device and on the host: counted, expected and, on
a GPU, measured."""

from collections.abc import Callable, Mapping
from pathlib import Path

import torch

from engine.files import replacing
from engine.residency.expected import PHASES, ExpectedBytes

Count = Callable[[], int]
"""Returns the bytes that an entry holds at the moment."""

_REST = "cache, activations"


class Ledger:
    """The bytes of this rank. An entry is "role part".

    Entries are counted from the tensors themselves whenever something has moved, and the most in a
    phase is kept.
    """

    def __init__(self, device: torch.device) -> None:
        self.on_device: dict[str, Count] = {}
        """Entries whose bytes are device memory, in the order in which they are listed."""
        self.on_host: dict[str, Count] = {}
        """Entries whose bytes are host memory."""
        self.expected: ExpectedBytes | None = None
        self.peaks: dict[str, int] = {}
        """The most bytes of all device entries at once, by phase."""
        self.measured: dict[str, int] = {}
        """The most bytes that torch's allocator gave out, and outside_bytes, by phase: on a GPU."""
        self.outside_bytes = 0
        """The most bytes of this phase beside torch's allocator: a lasting key-value cache."""
        self._device = device
        self._held: dict[str, dict[str, int]] = {}  # the most of each device entry, by phase
        self._phase: str | None = None

    def begin(self, phase: str) -> None:
        """Start counting a phase."""
        self._phase = phase
        self._held[phase] = dict.fromkeys(self.on_device, 0)
        self.peaks[phase] = self.outside_bytes = 0
        if self._device.type == "cuda":
            torch.cuda.reset_peak_memory_stats(self._device)
        self.observe()

    def observe(self) -> None:
        """Count what is held now."""
        if self._phase is None:
            return
        now = _counted(self.on_device)
        held = self._held[self._phase]
        self._held[self._phase] = {name: max(held[name], count) for name, count in now.items()}
        self.peaks[self._phase] = max(self.peaks[self._phase], sum(now.values()))

    def end(self, phase: str) -> None:
        """Close a phase, which may have failed before it was begun."""
        if self._phase is None:
            self.begin(phase)
        self.observe()
        if self._device.type == "cuda":
            allocated = torch.cuda.max_memory_allocated(self._device)
            self.measured[phase] = allocated + self.outside_bytes
        self._phase = None

    def metrics(self) -> dict[str, float]:
        """Return bytes by role and phase: memory/PHASE_ROLE_bytes, memory/host_ROLE_bytes, and the
        most at once."""
        values: dict[str, float] = {}
        for phase, held in self._held.items():
            for role, num_bytes in _by_role(held).items():
                values[f"memory/{phase}_{role}_bytes"] = num_bytes
            values[f"memory/{phase}_peak_bytes"] = self.measured.get(phase, self.peaks[phase])
        host = _counted(self.on_host)
        for role, num_bytes in _by_role(host).items():
            values[f"memory/host_{role}_bytes"] = num_bytes
        values["memory/host_bytes"] = sum(host.values())
        return {key: float(value) for key, value in values.items()}

    def table(self) -> str:
        """Return the ledger as text: a line an entry, a column a phase, and the host."""
        host = _counted(self.on_host)
        lines = {
            name: [*(self._held.get(phase, {}).get(name, 0) for phase in PHASES), host.get(name, 0)]
            for name in dict.fromkeys([*self.on_device, *host])
        }
        lines = {name: line for name, line in lines.items() if any(line)}
        peaks = [self.peaks.get(phase, 0) for phase in PHASES]
        if self.measured:
            measured = [self.measured.get(phase, 0) for phase in PHASES]
            rest = (max(0, m - p) for m, p in zip(measured, peaks, strict=True))
            lines[_REST] = [*rest, 0]
            peaks = [max(pair) for pair in zip(measured, peaks, strict=True)]
        lines["most at once"] = [*peaks, sum(host.values())]
        if self.expected is not None:
            totals = [self.expected.device_total(phase) for phase in PHASES]
            lines[f"expected, without {_REST}"] = [*totals, self.expected.host_total]
        scale, divisor = _scale(max(max(line) for line in lines.values()))
        width = max(map(len, lines))
        table = [f"{scale:<{width}} " + " ".join(f"{name:>9}" for name in (*PHASES, "host"))]
        for name, line in lines.items():
            cells = " ".join(f"{_cell(num_bytes, divisor):>9}" for num_bytes in line)
            table.append(f"{name:<{width}} {cells}")
        return "\n".join(table)

    def write(self, path: Path, *, rank: int) -> None:
        """Write the table to a file, in place of an earlier one."""
        with replacing(path) as stream:
            stream.write(f"{self._title(rank)}\n\n{self.table()}\n".encode())

    def _title(self, rank: int) -> str:
        if self._device.type != "cuda":
            return f"Memory of rank {rank}: weights, gradients and optimizer state in CPU tensors"
        properties = torch.cuda.get_device_properties(self._device)
        size = properties.total_memory / 2**30
        return f"Memory of rank {rank}, {properties.name} of {size:.1f} GiB"


def _counted(entries: Mapping[str, Count]) -> dict[str, int]:
    return {name: count() for name, count in entries.items()}


def _by_role(entries: Mapping[str, int]) -> dict[str, int]:
    """Sum the entries "role part" of each role."""
    totals: dict[str, int] = {}
    for name, num_bytes in entries.items():
        role = name.split()[0]
        totals[role] = totals.get(role, 0) + num_bytes
    return totals


def _scale(most: int) -> tuple[str, int]:
    return ("GiB", 2**30) if most >= 2**30 else ("MiB", 2**20)


def _cell(num_bytes: int, divisor: int) -> str:
    return f"{num_bytes / divisor:.3f}" if num_bytes else "-"
