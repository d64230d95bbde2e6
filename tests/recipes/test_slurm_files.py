"""The job files of recipes/slurm ask for what their recipes need."""

import importlib
import os
import re
import shutil
import subprocess
from pathlib import Path

import pytest

ROOT = Path(__file__).parents[2]
SLURM = ROOT / "recipes" / "slurm"
STAGES = ("sft", "init", "rm", "ppo")
SIZES = ("1_3b", "6b", "175b")
JOBS = sorted(path.stem for path in SLURM.glob("*.sbatch"))


def options_of(job: str) -> dict[str, str]:
    """Return the #SBATCH lines of a job file."""
    text = (SLURM / f"{job}.sbatch").read_text()
    return dict(re.findall(r"^#SBATCH --([a-z-]+)=?(.*)$", text, re.MULTILINE))


def test_every_stage_and_size_has_a_job():
    assert set(JOBS) == {f"{stage}_{size}" for stage in STAGES for size in SIZES}


@pytest.mark.parametrize("job", JOBS)
def test_job_runs_its_recipe_on_gpus_that_its_layouts_divide(job: str):
    options = options_of(job)
    num_gpus = int(options["nodes"]) * int(options["ntasks-per-node"])
    text = (SLURM / f"{job}.sbatch").read_text()
    assert f"\nlaunch recipes/{job}.py " in text
    assert f"on {num_gpus:,} GPUs" in text
    assert options["job-name"] == job
    config = importlib.import_module(f"recipes.{job}").config
    layouts = [config.layout, getattr(config, "critic_layout", None)]
    for layout in filter(None, layouts):
        assert layout.dp(num_gpus) >= 1  # or UserError
        assert layout.tp <= int(options["ntasks-per-node"])  # tensor parallelism stays in a node


@pytest.mark.parametrize("job", JOBS)
def test_job_is_signalled_before_its_time_is_up_and_may_be_requeued(job: str):
    options = options_of(job)
    name, _, seconds = options["signal"].partition("@")
    assert name == "USR1"  # engine/stop.py's
    assert int(seconds) >= 300
    assert "requeue" in options
    assert options["open-mode"] == "append"


# What stands for Slurm's programs: srun runs a script once, by way of this, and the others answer.
FAKES = {
    "srun": """for word in "$@"; do
    case $word in
        rm) shift $((found)); exec "$@" ;;
        *.py) env >"$SEEN/$(basename "$word").env"; mkdir -p "$TRITON_CACHE_DIR"; exit "$STATUS" ;;
    esac
    found=$((found + 1))
done""",
    "scontrol": 'if [ "$1" = show ]; then echo node1; else touch "$SEEN/requeued"; fi',
    "squeue": "echo RUNNING",
}


def launch(folder: Path, status: int = 0, **environment: str) -> dict[str, str]:
    """Run a job's shell with a stand-in for Slurm; return the environment that its recipe saw."""
    for name, body in FAKES.items():
        (folder / name).write_text(f"#!/bin/bash\nfound=0\n{body}\n")
        (folder / name).chmod(0o755)
    (folder / "site.sh").write_text("PYTHON=python\nSRUN_OPTIONS=()\nPREFLIGHT_OPTIONS=()\n")
    dropped = ("TRITON", "TORCHINDUCTOR", "CUDA", "OMP")
    rest = {name: value for name, value in os.environ.items() if not name.startswith(dropped)}
    slurm = {"SLURM_JOB_NAME": "sft", "SLURM_JOB_ID": str(os.getpid()), "SLURM_JOB_NODELIST": "n"}
    own = {"PATH": f"{folder}:{os.environ['PATH']}", "TRIDENT_SITE": str(folder / "site.sh")}
    subprocess.run(
        ["bash", "-c", f". {SLURM}/launch.sh; launch recipes/sft_6b.py"],
        env=rest | slurm | own | {"SEEN": str(folder), "STATUS": str(status)} | environment,
        cwd=folder,
        check=False,
    )
    script = "sft_6b" if status == 0 else "preflight"
    lines = (folder / f"{script}.py.env").read_text().splitlines()
    return dict(line.split("=", 1) for line in lines if "=" in line)


@pytest.mark.skipif(shutil.which("bash") is None, reason="needs bash")
@pytest.mark.parametrize("status", [0, 75])
def test_job_keeps_compiled_kernels_on_the_node_and_removes_them(tmp_path: Path, status: int):
    seen = launch(tmp_path, status)
    caches = Path(f"/tmp/trident-{os.getuid()}-{os.getpid()}")
    assert seen["TRITON_CACHE_DIR"] == f"{caches}/triton"
    assert seen["TORCHINDUCTOR_CACHE_DIR"] == f"{caches}/torchinductor"
    assert seen["CUDA_CACHE_PATH"] == f"{caches}/cuda"
    assert seen["TORCHINDUCTOR_COMPILE_THREADS"] == "1"
    assert "CUDA_DEVICE_MAX_CONNECTIONS" not in seen  # the engine's: it knows the layout
    assert not caches.exists()
    assert (tmp_path / "requeued").exists() == (status == 75)


@pytest.mark.skipif(shutil.which("bash") is None, reason="needs bash")
def test_job_keeps_what_the_site_has_set(tmp_path: Path):
    site = {
        "TRITON_CACHE_DIR": str(tmp_path / "triton"),
        "TORCHINDUCTOR_CACHE_DIR": "/local/inductor",
        "CUDA_CACHE_PATH": "/local/cuda",
        "TORCHINDUCTOR_COMPILE_THREADS": "3",
        "CUDA_DEVICE_MAX_CONNECTIONS": "4",
    }
    assert site.items() <= launch(tmp_path, **site).items()
    assert (tmp_path / "triton").exists()


@pytest.mark.skipif(shutil.which("bash") is None, reason="needs bash")
def test_shell_files_parse():
    for path in (*SLURM.glob("*.sbatch"), *SLURM.glob("*.sh")):
        done = subprocess.run(["bash", "-n", path], capture_output=True, text=True, check=False)
        assert done.returncode == 0, done.stderr
