"""A step that was skipped, rerun: the first module and operation whose numbers are not finite.

python recipes/replay.py --step runs/sft/skipped/step_00000012_policy
torchrun --standalone --nproc-per-node=8 recipes/replay.py --step ...

On one process, where the network fits, or on as many ranks as the run had, in its layout. Exit
status 0: something is not finite again, and named; 1: all is finite here.
"""

from engine.recipe import run_stage
from engine.settings.replay import ReplayConfig

if __name__ == "__main__":
    run_stage("engine.replay.replay.replay", ReplayConfig(), has_dry_run=False)
