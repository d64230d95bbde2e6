"""The job files of recipes/slurm ask for what their recipes need."""

import importlib
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


@pytest.mark.skipif(shutil.which("bash") is None, reason="needs bash")
def test_shell_files_parse():
    for path in (*SLURM.glob("*.sbatch"), *SLURM.glob("*.sh")):
        done = subprocess.run(["bash", "-n", path], capture_output=True, text=True, check=False)
        assert done.returncode == 0, done.stderr
