"""What the minutes of a GPU are spent on.

Checks time nothing and run side by side: every kernel against fp64, every test that needs a GPU.
Measurements follow, those of the targets first, each alone on the device.
"""

import re
from collections.abc import Iterator
from pathlib import Path

from benchmarks.gpu.spend import Step
from benchmarks.kernels import OPERATIONS

ROOT = Path(__file__).parents[2]

# (name, seconds after which it counts as hung, program of benchmarks/ with its arguments)
FULL: tuple[tuple[str, float, str], ...] = (
    # The targets' (targets.py), at the targets' sizes.
    (
        "time logprobs",
        60,
        "kernels --ops logprobs --modes forward+backward --size tokens=32768 --limit 6 --no-plots",
    ),
    (
        "time linear_loss",
        90,
        "kernels --ops linear_loss --size tokens=131072,hidden=4096 --limit 5 --no-plots",
    ),
    (
        "time gae, policy_loss",
        60,
        "kernels --ops gae policy_loss value_loss --size sequences=512,length=1024 tokens=131072"
        " --limit 5 --no-plots",
    ),
    ("decode", 90, "generation --size 1.3b --workload decode --num-samples 2"),
    (
        "train_step",
        60,
        "train_step --size 1.3b --num-samples 5 --micro-batch-tokens 16384 --providers trident"
        " --profile OUT/profile.txt",
    ),
    (
        "ppo_step",
        150,  # its three providers load their libraries one after the other
        "ppo_step --size 1.3b --response-tokens 256 --num-samples 2 --seconds 18",
    ),
    ("residency", 60, "residency --size 1.3b --quick"),
    # What else a run should know.
    ("plain torch beside train_step", 90, "train_step --size 1.3b --num-samples 3"),
    ("tune_kernels", 60, "tune_kernels"),
    ("plan_accuracy", 60, "plan_accuracy --size 1.3b --no-ppo"),
    ("generation", 90, "generation --size 1.3b --workload mixed --num-samples 2"),
    ("125m train_step", 60, "train_step --size 125m --num-samples 5"),
    ("125m ppo_step", 120, "ppo_step --size 125m --num-samples 2 --seconds 15"),
    ("time all kernels", 300, "kernels --quick --limit 5"),
    ("whole residency", 90, "residency --size 1.3b --num-samples 1"),
)
"""On a GPU, the most valuable first."""
RUNS = (
    *("tests/engine/test_resume.py", "tests/engine/test_planted_numbers.py"),
    *("tests/engine/training/test_recheck.py", "tests/engine/training/test_skipped.py"),
    *("tests/engine/replay/test_replay.py", "tests/engine/evaluation/test_held_out.py"),
)
"""Tests whose runs take the GPU where there is one."""
QUICK: tuple[tuple[str, float, str], ...] = (
    ("time logprobs", 60, "kernels --ops logprobs --quick --limit 5 --no-plots"),
    ("time linear_loss", 60, "kernels --ops linear_loss --quick --limit 5 --no-plots"),
    (
        "time gae, policy_loss",
        60,
        "kernels --ops gae policy_loss value_loss --quick --limit 5 --no-plots",
    ),
    ("decode", 90, "generation --workload decode --num-samples 1 --batch 4 --context 160"),
    ("train_step", 90, "train_step --size tiny --num-samples 2 --num-sequences 4"),
    (
        "ppo_step",
        90,
        "ppo_step --size tiny --num-samples 1 --num-episodes 8 --minibatch-size 4"
        " --response-tokens 16 --lengths fixed",
    ),
    ("residency", 60, "residency --size tiny --quick"),
    ("tune_kernels", 60, "tune_kernels"),
    ("plan_accuracy", 60, "plan_accuracy --size tiny --no-ppo --num-sequences 4"),
)
"""The same programs at sizes that a CPU does in seconds."""


def all_steps(device: str, out: Path, *, is_quick: bool) -> list[Step]:
    """Return the steps of a device ("cpu" or "cuda") in their order; quick ones are small."""
    return [
        *_kernel_checks(device, out),
        *_tests(device),
        *_measurements(device, out, is_quick=is_quick),
        *([_runs_of_one_rank()] if device == "cuda" else []),
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
    for path in sorted(paths, key=_looks_at_whole_device):
        name = path.removeprefix("tests/").removesuffix(".py")
        is_alone = _looks_at_whole_device(path)
        yield Step(name=f"test {name}", command=(*pytest, path), limit=180, is_timed=is_alone)


def _looks_at_whole_device(path: str) -> bool:
    """True for tests that no other process may run beside: they ask how much memory is free."""
    return "mem_get_info" in (ROOT / path).read_text()


def _runs_of_one_rank() -> Step:
    """Whole runs on the GPU: stopped, resumed, spoiled, replayed; tests that a CPU passes, too."""
    beside = ("-n", "12", "--dist", "worksteal")
    chosen = ("-k", "not rank and not layout")  # those start several
    command = ("-m", "pytest", "-q", *beside, *chosen, *RUNS)
    return Step(name="runs of one rank", command=command, limit=240)


def files_with_gpu_tests() -> list[str]:
    """Return the test files that have the marker, from the project's root."""
    paths = sorted((ROOT / "tests").rglob("test_*.py"))
    marked = re.compile(r"mark\.gpu\b")
    return [str(p.relative_to(ROOT)) for p in paths if marked.search(p.read_text())]


def _measurements(device: str, out: Path, *, is_quick: bool) -> Iterator[Step]:
    common = ("--device", device, "--out", str(out))
    for name, limit, command in QUICK if is_quick else FULL:
        program, *arguments = command.split(" ")
        arguments = [argument.replace("OUT", str(out)) for argument in arguments]
        yield Step(
            name=name, command=("-m", f"benchmarks.{program}", *arguments, *common), limit=limit
        )
