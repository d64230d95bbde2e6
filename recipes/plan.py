"""What a recipe will need, before it is launched: memory of every GPU, time, PF-days and dollars.

python recipes/plan.py ppo_175b --gpus 64 --gpu h100
python recipes/plan.py ppo_175b --gpus 512 --search
python recipes/plan.py ppo_175b --gpus 512 --numerics.recompute none --workload.response-tokens 300

Answers in about a second and needs no torch. The recipe's own options follow those of the plan.
"""

from pathlib import Path

from engine.plan_command import plan_command

if __name__ == "__main__":
    plan_command(Path(__file__).parent)
