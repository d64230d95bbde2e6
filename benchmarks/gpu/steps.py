"""What the minutes of a GPU are spent on, the most valuable first.

Checks time nothing and run side by side: every kernel against fp64, every test that needs a GPU.
Measurements follow, those of the targets first, each alone on the device.
"""

import re
from collections.abc import Iterator
from pathlib import Path

from benchmarks.gpu.spend import Step
from benchmarks.kernels import OPERATIONS

ROOT = Path(__file__).parents[2]


def all_steps(device: str, out: Path, *, is_quick: bool) -> list[Step]:
    """Return the steps of a device ("cpu" or "cuda") in their order; quick ones are small."""
    return [
        *_kernel_checks(device, out),
        *_tests(device),
        *_measurements(device, out, is_quick=is_quick),
    ]


def _kernel_checks(device: str, out: Path) -> Iterator[Step]:
    for name in OPERATIONS:
        command = ("-m", "benchmarks.gpu.kernel_checks", "--operation", name)
        yield Step(
            name=f"check {name}",
            command=(*command, "--device", device, "--out", str(out)),
            limit=90,
            is_timed=False,
        )


def _tests(device: str) -> Iterator[Step]:
    """One process a test file: an illegal access ends the tests of its file alone."""
    pytest = ("-m", "pytest", "-q", "-m", "gpu", "-rs", "--durations=3")
    paths = files_with_gpu_tests()
    if device == "cpu":  # they are collected, which shows that their imports hold
        command = (*pytest, "--collect-only", *paths)
        yield Step(name="test all, collected", command=command, limit=120, is_timed=False)
        return
    for path in paths:
        name = path.removeprefix("tests/").removesuffix(".py")
        yield Step(name=f"test {name}", command=(*pytest, path), limit=120, is_timed=False)


def files_with_gpu_tests() -> list[str]:
    """Return the test files that have the marker, from the project's root."""
    paths = sorted((ROOT / "tests").rglob("test_*.py"))
    marked = re.compile(r"mark\.gpu\b")
    return [str(p.relative_to(ROOT)) for p in paths if marked.search(p.read_text())]


def _measurements(device: str, out: Path, *, is_quick: bool) -> Iterator[Step]:
    def step(name: str, limit: float, program: str, *arguments: str) -> Step:
        common = ("--device", device, "--out", str(out))
        return Step(
            name=name, command=("-m", f"benchmarks.{program}", *arguments, *common), limit=limit
        )

    quick = ("--quick",) if is_quick else ()
    for name in ("logprobs", "linear_loss", "gae", "ppo_loss"):
        yield step(f"time {name}", 60, "kernels", "--ops", name, *quick)
    if device == "cpu" or is_quick:
        yield step("generation", 60, "generation", "--num-samples", "1", "--workload", "fixed")
        yield step("train_step", 60, "train_step", "--size", "tiny", "--num-samples", "2")
        small = ("--num-episodes", "8", "--minibatch-size", "4", "--response-tokens", "16")
        yield step("ppo_step", 90, "ppo_step", "--size", "tiny", "--num-samples", "1", *small)
        yield step("residency", 60, "residency", "--size", "tiny", "--num-samples", "1")
        yield step("plan_accuracy", 60, "plan_accuracy", "--size", "tiny", "--no-ppo")
        return
    yield step(
        "generation 125m",
        60,
        "generation",
        "--size",
        "125m",
        "--num-samples",
        "2",
        "--workload",
        "fixed",
    )
    yield step("train_step 125m", 60, "train_step", "--size", "125m")
    yield step("ppo_step 125m", 60, "ppo_step", "--size", "125m", "--num-samples", "2")
    yield step("train_step 1.3b", 90, "train_step", "--size", "1.3b", "--num-samples", "4")
    yield step("generation 1.3b", 90, "generation", "--size", "1.3b", "--workload", "fixed")
    yield step("ppo_step 1.3b", 120, "ppo_step", "--size", "1.3b", "--num-samples", "2")
    yield step("residency 1.3b", 90, "residency", "--size", "1.3b", "--num-samples", "1")
    yield step("plan_accuracy 1.3b", 90, "plan_accuracy", "--size", "1.3b", "--no-ppo")
