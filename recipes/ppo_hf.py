"""PPO of a model that came from a folder, at its own size (section 3.5, C.4).

python recipes/ppo_hf.py --data.prompts prompts.jsonl
It starts from the runs of recipes/sft_hf.py and rm_hf.py; --policy, --reward-model and --reference
take other runs and Hugging Face folders. PPO-ptx: --ptx-coef 27.8 --data.pretraining text.jsonl.
"""

from pathlib import Path

from engine.recipe import run_stage
from engine.settings.adam import AdamConfig
from engine.settings.kl import KLConfig
from engine.settings.numerics import Numerics
from engine.settings.ppo import PPOConfig, PPOData
from engine.settings.sampling import SamplingConfig
from engine.settings.saving import SaveConfig

config = PPOConfig(
    directory=Path("runs/ppo_hf"),
    policy=Path("runs/sft_hf"),  # also the KL reference (C.4)
    reward_model=Path("runs/rm_hf"),  # critic too (C.4)
    # Our choice: a context of 1,024 (GPT-2) holds both; app. C has 1k and 1k.
    data=PPOData(max_prompt_tokens=768, pretraining_tokens=1024),
    sampling=SamplingConfig(temperature=1.0, max_new_tokens=256),  # C.4: temperature
    iterations=500,  # C.4: 256k episodes
    rollout_batch_size=512,  # C.4
    minibatch_size=64,  # C.4
    ppo_epochs=1,  # C.4
    kl=KLConfig(coef=0.02, control="fixed"),  # C.4: beta
    gamma=1.0,  # C.4: no discount
    lam=0.95,  # not stated; our choice: Stiennon et al. 2020
    cliprange=0.2,  # C.4
    ptx_coef=0.0,  # C.4: 27.8; our choice: no folder brings the text that it was pretrained on
    ema_decay=0.992,  # C.4; an optimizer step: our choice
    # C.4: constant after 10 iterations of warm-up from a tenth; the critic's lr. Betas: app. C.
    # Policy's lr: not stated; our choice: on E.9's grid, stable without ptx up to 8.05e-6.
    adam=AdamConfig(lr=5.49e-6, schedule="constant", warmup=10, warmup_start=0.1),
    critic_adam=AdamConfig(lr=9e-6, schedule="constant", warmup=10, warmup_start=0.1),
    numerics=Numerics(dtype="bf16"),  # app. C: fp16, fp32 masters; bf16: our choice for A100 on
    micro_batch_tokens=8192,  # our choice
    saving=SaveConfig(save_every=50),  # our choice
)

if __name__ == "__main__":
    run_stage("engine.ppo.train", config)
