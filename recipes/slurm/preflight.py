"""Are the nodes of a job fit for it? Names those that are not, and ends with status 1.

srun python recipes/slurm/preflight.py --nodes $(scontrol show hostnames)
torchrun --standalone --nproc-per-node=8 recipes/slurm/preflight.py --min-free-gib 70
recipes/slurm/launch.sh runs it before each stage.
"""

from engine.preflight.check import preflight
from engine.preflight.facts import PreflightConfig
from engine.recipe import run_stage

if __name__ == "__main__":
    run_stage(preflight, PreflightConfig(), has_dry_run=False)
