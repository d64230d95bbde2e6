"""Are the nodes of a job fit for it? Names those that are not, and ends with status 1.

srun python recipes/slurm/preflight.py --nodes $(scontrol show hostnames)
torchrun --standalone --nproc-per-node=8 recipes/slurm/preflight.py --min-free-gib 70
recipes/slurm/launch.sh runs it before each stage.
"""

from engine.recipe import run_stage
from engine.settings.preflight import PreflightConfig

if __name__ == "__main__":
    run_stage("engine.preflight.check.preflight", PreflightConfig(), has_dry_run=False)
