"""PPO-ptx of InstructGPT at 175B, 6B reward model and critic (section 3.5, C.4); --ptx-coef 0: PPO.

srun --ntasks=1024 python recipes/ppo_175b.py --policy runs/init_175b \
    --reward-model runs/rm_6b --data.prompts prompts.jsonl --data.pretraining text.jsonl
"""

from pathlib import Path

from engine.recipe import run_stage
from engine.settings.adam import AdamConfig
from engine.settings.kl import KLConfig
from engine.settings.layout import ParallelLayout
from engine.settings.numerics import Numerics
from engine.settings.ppo import PPOConfig, PPOData
from engine.settings.residency import ResidencyConfig
from engine.settings.sampling import SamplingConfig
from engine.settings.saving import SaveConfig

config = PPOConfig(
    directory=Path("runs/ppo_175b"),
    policy=Path("runs/init_175b"),  # C.4: the init policy, also the KL reference
    size="175b",
    reward_model=Path("runs/rm_6b"),  # C.4: critic too
    reward_model_size="6b",  # C.4: for every policy
    # Prompts: app. C. Pretraining sequences: not stated; the context, as the paper's compute says.
    data=PPOData(max_prompt_tokens=1024, pretraining_tokens=2048),
    # C.4: temperature 1; app. C: up to 1k tokens; slots: our choice.
    sampling=SamplingConfig(temperature=1.0, max_new_tokens=1024, num_slots=256),
    iterations=500,  # C.4: 256k episodes
    rollout_batch_size=512,  # C.4
    minibatch_size=64,  # C.4
    ppo_epochs=1,  # C.4
    kl=KLConfig(coef=0.02, control="fixed"),  # C.4: beta
    gamma=1.0,  # C.4: no discount
    lam=0.95,  # not stated; our choice: Stiennon et al. 2020
    cliprange=0.2,  # C.4
    ptx_coef=27.8,  # C.4: gamma of eq. 2
    ptx_examples_per_episode=8,  # C.4
    ema_decay=0.992,  # C.4; an optimizer step: our choice
    # C.4: constant after 10 iterations of warm-up from a tenth; the critic's lr. Betas: app. C.
    # Policy's lr: not stated; our choice: the lower of E.9's 2.55e-6 and 3.74e-6.
    adam=AdamConfig(lr=2.55e-6, schedule="constant", warmup=10, warmup_start=0.1),
    critic_adam=AdamConfig(lr=5e-6, schedule="constant", warmup=10, warmup_start=0.1),
    numerics=Numerics(dtype="bf16"),  # app. C: fp16, fp32 masters; bf16: our choice for A100 on
    # Our choice: 512 or 1,024 GPUs. On 64: --layout.pp 8 --numerics.recompute full.
    layout=ParallelLayout(tp=8, pp=16, sequence_parallel=True),
    critic_layout=ParallelLayout(tp=8, pp=8, sequence_parallel=True),
    residency=ResidencyConfig(reference="host", reward_model="host", optimizer="host"),
    micro_batch_tokens=2048,  # our choice
    # Our choice: a checkpoint is 2.5 TB (14 bytes a parameter); an hour keeps the disks free.
    saving=SaveConfig(save_every=50, save_every_minutes=60.0),
)

if __name__ == "__main__":
    run_stage("engine.ppo.train", config, num_gpus=1024)
