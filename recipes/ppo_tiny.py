"""PPO-ptx, tiny; --ptx-coef 0 is PPO.

python recipes/ppo_tiny.py --data.prompts prompts.jsonl --data.pretraining text.jsonl
Values are ours.
"""

from pathlib import Path

from engine.recipe import run_stage
from engine.settings.adam import AdamConfig
from engine.settings.ppo import PPOConfig, PPOData
from engine.settings.sampling import SamplingConfig

config = PPOConfig(
    directory=Path("runs/ppo_tiny"),
    policy=Path("runs/init_tiny"),
    reward_model=Path("runs/rm_tiny"),
    data=PPOData(max_prompt_tokens=128, pretraining_tokens=128),
    sampling=SamplingConfig(max_new_tokens=96, num_slots=64),
    iterations=24,
    rollout_batch_size=64,
    minibatch_size=32,
    micro_batch_tokens=4096,
    ptx_coef=1.0,
    ptx_examples_per_episode=1,
    adam=AdamConfig(lr=3e-4, schedule="constant", warmup=3),
    critic_adam=AdamConfig(lr=1e-3, schedule="constant", warmup=3),
)

if __name__ == "__main__":
    run_stage("engine.ppo.train", config)
