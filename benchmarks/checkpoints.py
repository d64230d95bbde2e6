"""Times what checkpoints cost a run: until they are on the disk, and in the steps beside them.

    python -m benchmarks.checkpoints --device cpu --out benchmarks/results
    python -m benchmarks.checkpoints --device cuda --num-layers 24 --hidden-size 2048

First one network's state, weights and Adam's, is saved in turns: by this engine, by it without
checksums, by torch's distributed checkpoints and by torch.save, each until the disk has it (fsync).
Beside that stands for how long training waits: ours until the snapshot is taken, torch's
`async_save` until it returns.

Then training takes blocks of steps, in turns: without a save; with one begun after the first step
and written in the background; with one that training waits for. The cost is a block's time over
that of a block without. A save that is still being written when its block ends is waited for
outside of the block, and its record says so.
"""

import argparse
import contextlib
import dataclasses
import os
import shutil
import statistics
import tempfile
import time
from collections.abc import Callable, Iterator
from pathlib import Path
from typing import Any
from unittest import mock

import numpy as np
import torch
import torch.distributed as dist
import torch.distributed.checkpoint as dcp
from rich.table import Table

from benchmarks.command_line import command, count, mistakes_in_one_line
from benchmarks.screen import print_whole, screen
from benchmarks.timing import append_record, machine, records_path, synchronize
from engine.checkpoints import tensor_file
from engine.checkpoints.checkpointer import Checkpointer
from engine.data.examples import Example
from engine.errors import UserError
from engine.feed import pack_for
from engine.losses import NegativeLogLikelihood
from engine.ranks.start import start_parallel
from engine.settings.adam import AdamConfig
from engine.settings.layout import ParallelLayout
from engine.settings.numerics import Numerics
from engine.settings.saving import SaveConfig
from engine.training.network import Network, build_network
from engine.training.optimizer import Optimizer
from engine.training.passes import forward_backward
from models.sizes import GPTSize, size_as_json

BLOCKS = ("no save", "in the background", "waited for")


@dataclasses.dataclass(kw_only=True)
class Training:
    """A network in training, and where it is saved."""

    network: Network
    optimizer: Optimizer
    folder: Path
    num_tokens: int

    def __post_init__(self) -> None:
        parallel, context = self.network.parallel, self.network.size.context_length
        rng = np.random.default_rng(0)
        rows = [
            rng.integers(0, self.network.size.vocab_size, min(context, self.num_tokens))
            for _ in range(max(1, self.num_tokens // context))
        ]
        self._num_targets = sum(len(row) - 1 for row in rows)
        examples = [Example(tokens=row, prompt_length=1) for row in rows]
        self._batches = pack_for(examples, parallel, self.num_tokens)
        self._position = 0

    def step(self) -> None:
        """Take one optimizer step."""
        self.optimizer.zero_gradients()
        forward_backward(self.network, self._batches, NegativeLogLikelihood(self._num_targets))
        self.optimizer.step(self._position)
        self._position += 1

    def checkpointer(self, name: str, *, in_background: bool = True) -> Checkpointer:
        """Return what saves it in a folder of that name."""
        return Checkpointer(
            directory=self.folder / name,
            parallel=self.network.parallel,
            networks={"policy": self.network},
            optimizers={"policy": self.optimizer},
            saving=SaveConfig(keep=1000, save_in_background=in_background),
        )

    def state(self) -> dict[str, torch.Tensor]:
        """Return the tensors of a checkpoint by name, for those who save them otherwise."""
        weights = [p.detach() for m in self.network.modules for p in m.parameters()]
        tensors = weights + self.optimizer.state_tensors()
        return {f"tensor_{n}": tensor for n, tensor in enumerate(tensors)}


def savers(training: Training) -> dict[str, Callable[[], tuple[float, float]]]:
    """Return, by provider, what saves once: seconds that training waits, and seconds until the disk
    has it all."""
    ours = training.checkpointer("trident")
    bare = training.checkpointer("without_checksums")
    folder = training.folder

    def trident(checkpointer: Checkpointer) -> tuple[float, float]:
        with _fresh(checkpointer.directory):
            began = time.perf_counter()
            checkpointer.save(1, {})
            waited = time.perf_counter() - began
            checkpointer.finish()
            return waited, time.perf_counter() - began

    def without_checksums() -> tuple[float, float]:
        with mock.patch.object(tensor_file.xxhash, "xxh3_128", NoChecksum):
            return trident(bare)

    def distributed() -> tuple[float, float]:
        with _fresh(folder / "dcp") as path:
            began = time.perf_counter()
            dcp.save(training.state(), checkpoint_id=path, no_dist=True)
            seconds = time.perf_counter() - began
        return seconds, seconds

    group = dist.new_group([0], backend="gloo")  # async_save wants one

    def distributed_async() -> tuple[float, float]:
        with _fresh(folder / "dcp_async") as path:
            began = time.perf_counter()
            future: Any = dcp.async_save(training.state(), checkpoint_id=path, process_group=group)
            waited = time.perf_counter() - began
            future.result()
            return waited, time.perf_counter() - began

    def whole_file() -> tuple[float, float]:
        with _fresh(folder / "torch_save") as path:
            path.mkdir()
            began = time.perf_counter()
            with (path / "state.pt").open("wb") as stream:
                torch.save(training.state(), stream)
                stream.flush()
                os.fsync(stream.fileno())
            seconds = time.perf_counter() - began
        return seconds, seconds

    return {
        "trident": lambda: trident(ours),
        "trident, without checksums": without_checksums,
        "torch.distributed.checkpoint": distributed,
        "torch.distributed.checkpoint, async_save": distributed_async,
        "torch.save": whole_file,
    }


class NoChecksum:
    """A checksum that reads nothing."""

    def update(self, data: object) -> None:
        """Pass over the data."""

    def hexdigest(self) -> str:
        """Return as many digits as XXH3 has."""
        return "0" * 32


def measure_saves(training: Training, num_samples: int) -> Iterator[dict[str, Any]]:
    """Yield a record a provider, whose saves took turns; the first of each is not counted."""
    training.optimizer.prepare_state()
    num_bytes = sum(tensor.nbytes for tensor in training.state().values())
    seconds: dict[str, list[tuple[float, float]]] = {}
    providers = savers(training)
    for sample in range(num_samples + 1):
        for provider, save in providers.items():
            found = save()
            if sample:
                seconds.setdefault(provider, []).append(found)
    for provider, found in seconds.items():
        waited, whole = (sorted(column) for column in zip(*found, strict=True))
        yield {
            "benchmark": "checkpoints",
            "provider": provider,
            "num_bytes": num_bytes,
            "waited_s": statistics.median(waited),
            "on_disk_s": statistics.median(whole),
            "on_disk_range_s": [whole[0], whole[-1]],
            "num_samples": num_samples,
        }


def measure_steps(training: Training, num_steps: int, num_samples: int) -> Iterator[dict[str, Any]]:
    """Yield a record a kind of block, which took turns; the first of each is not counted."""
    device = training.network.parallel.device
    checkpointers = {
        "in the background": training.checkpointer("background"),
        "waited for": training.checkpointer("waited", in_background=False),
    }
    seconds: dict[str, list[float]] = {name: [] for name in BLOCKS}
    num_outlived = 0
    for sample in range(num_samples + 1):
        for name in BLOCKS:
            checkpointer = checkpointers.get(name)
            synchronize(device)
            began = time.perf_counter()
            training.step()
            if checkpointer is not None:
                checkpointer.save(sample, {})
            for _ in range(num_steps - 1):
                training.step()
            synchronize(device)
            took = time.perf_counter() - began
            if checkpointer is not None:
                ended = time.perf_counter()
                checkpointer.finish()
                num_outlived += time.perf_counter() - ended > 0.1
                shutil.rmtree(checkpointer.directory)
            if sample:
                seconds[name].append(took)
    # Of each round by itself: a machine's clocks drift over minutes.
    for name in BLOCKS:
        added = [a / b - 1 for a, b in zip(seconds[name], seconds["no save"], strict=True)]
        yield {
            "benchmark": "checkpoints",
            "provider": f"steps, {name}",
            "num_steps": num_steps,
            "block_s": statistics.median(seconds[name]),
            "added": statistics.median(added),
            "added_range": [min(added), max(added)],
            "num_outlived": num_outlived if name == "in the background" else 0,
            "num_samples": num_samples,
        }


@contextlib.contextmanager
def _fresh(path: Path) -> Iterator[Path]:
    """Yield a path where nothing is, and remove what was made there, which is not timed."""
    shutil.rmtree(path, ignore_errors=True)
    yield path
    shutil.rmtree(path, ignore_errors=True)


@mistakes_in_one_line()
def main() -> None:
    """Run the command line."""
    parser = command("checkpoints")
    parser.add_argument("--device", choices=("cpu", "cuda"), required=True)
    parser.add_argument("--num-layers", type=count, default=6)
    parser.add_argument("--hidden-size", type=count, default=768)
    parser.add_argument("--num-tokens", type=count, default=1024, help="of a step")
    parser.add_argument("--num-steps", type=count, default=8, help="of a block, with one save")
    parser.add_argument("--num-samples", type=count, default=5, help="saves, and blocks, of a kind")
    parser.add_argument("--dtype", choices=("fp32", "bf16"))
    parser.add_argument("--folder", type=Path, help="where to save; a new temporary folder")
    parser.add_argument("--out", type=Path, help="append records to a file in this folder")
    options = parser.parse_args()
    with tempfile.TemporaryDirectory(dir=options.folder) as name:
        training = _training(options, Path(name))
        device = training.network.parallel.device
        records = [
            *measure_saves(training, options.num_samples),
            *measure_steps(training, options.num_steps, options.num_samples),
        ]
    size = size_as_json(training.network.size)
    origin = machine(device)  # one date for all: they took turns
    table = Table("provider", "training waits, s", "on the disk, s", "MB/s", "steps take")
    for record in records:
        if options.out:
            known = {**record, "size": size, "num_tokens": options.num_tokens}
            append_record(records_path(options.out, device), known | origin)
        if "on_disk_s" in record:
            rate = record["num_bytes"] / record["on_disk_s"] / 1e6
            row = f"{record['waited_s']:.3f}", f"{record['on_disk_s']:.3f}", f"{rate:,.0f}", ""
        else:
            low, high = record["added_range"]
            row = "", "", "", f"{record['added']:+.2%} ({low:+.2%} to {high:+.2%})"
        table.add_row(record["provider"], *row)
    print_whole(screen(), table)


def _training(options: argparse.Namespace, folder: Path) -> Training:
    if options.device == "cuda" and not torch.cuda.is_available():
        raise UserError("--device cuda: torch sees no GPU")
    size = GPTSize(
        num_layers=options.num_layers,
        hidden_size=options.hidden_size,
        num_heads=max(1, options.hidden_size // 64),
        context_length=1024,
    )
    dtype = options.dtype or ("bf16" if options.device == "cuda" else "fp32")
    parallel = start_parallel(ParallelLayout(), seed=0)
    network = build_network("language", size, parallel, numerics=Numerics(dtype=dtype))
    optimizer = Optimizer(network, AdamConfig(lr=1e-5), total_steps=100)
    return Training(
        network=network, optimizer=optimizer, folder=folder, num_tokens=options.num_tokens
    )


if __name__ == "__main__":
    main()
