"""A step that was skipped, rerun: the first module and operation whose numbers are not finite.

python recipes/replay.py --step runs/sft/skipped/step_00000012_policy
python recipes/replay.py --step runs/ppo/skipped/step_00000012_rollout
torchrun --standalone --nproc-per-node=8 recipes/replay.py --step ...

A rollout, on which an iteration of PPO took no step, is scored again: in its place in the run's
folder, whose sources have reference and reward model. Replays run on one process, where the
networks fit one by one, or on as many ranks as the run had, in its layout. Exit
status 0: something is not finite again, and named; 1: all is finite here.
"""

from engine.recipe import run_stage
from engine.settings.replay import ReplayConfig

if __name__ == "__main__":
    run_stage("engine.replay.replay.replay", ReplayConfig(), has_dry_run=False)
