"""The SFT baseline of InstructGPT at 175B (section 3.5, C.1): 16 epochs, the best by reward.

srun --ntasks=1024 python recipes/sft_175b.py --init-from runs/gpt3_175b \
    --data.train demonstrations.jsonl
PPO does not start from it but from recipes/init_175b.py. recipes/README.md has the whole order.
"""

from pathlib import Path

from engine.recipe import run_stage
from engine.settings.adam import AdamConfig
from engine.settings.layout import ParallelLayout
from engine.settings.numerics import Numerics
from engine.settings.saving import SaveConfig
from engine.settings.sft import SelectionConfig, SFTConfig, SFTData

config = SFTConfig(
    directory=Path("runs/sft_175b"),
    size="175b",
    init_from=Path("runs/gpt3_175b"),  # pretrained GPT-3 (3.5); any GPT-2 checkpoint of that shape
    data=SFTData(
        train=Path("data/demonstrations.jsonl"),
        max_prompt_tokens=1024,  # app. C: prompts over 1k tokens are filtered
        max_tokens=2048,  # app. C: 2k context
    ),
    epochs=16.0,  # C.1
    batch_size=8,  # C.1
    adam=AdamConfig(
        lr=5.03e-6,  # C.1
        schedule="cosine",  # C.1
        final_fraction=0.1,  # C.1: to 10%
        warmup=0,  # C.1: none
        beta1=0.9,  # app. C
        beta2=0.95,  # app. C
    ),
    dropout=0.2,  # C.1: residual dropout
    save_every_epoch=True,  # our choice: every epoch can be looked at again
    selection=SelectionConfig(reward_model=Path("runs/rm_6b")),  # C.1: chosen by reward
    # The paper: fp16 with fp32 masters (app. C). Our choice for A100 and later: bf16, as fast and
    # without a loss scale.
    numerics=Numerics(dtype="bf16"),
    # Our choice: 512 GPUs (dp 4) or 1,024 (dp 8: one sequence each); on 64 --layout.pp 8.
    layout=ParallelLayout(tp=8, pp=16, sequence_parallel=True),
    # Our choice: a checkpoint is 2.5 TB (14 bytes a parameter); an hour keeps the disks free.
    saving=SaveConfig(save_every_minutes=60.0),
    micro_batch_tokens=2048,  # our choice
)

if __name__ == "__main__":
    run_stage("engine.sft.train", config, num_gpus=1024)
