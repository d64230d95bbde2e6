"""The policy that PPO starts from and is held to, at 175B (InstructGPT C.3, E.8).

srun --ntasks=1024 python recipes/init_175b.py --init-from runs/gpt3_175b \
    --data.train demonstrations.jsonl --data.pretraining text.jsonl
"""

from pathlib import Path

from engine.recipe import run_stage
from engine.settings.adam import AdamConfig
from engine.settings.layout import ParallelLayout
from engine.settings.numerics import Numerics
from engine.settings.saving import SaveConfig
from engine.settings.sft import SFTConfig, SFTData

config = SFTConfig(
    directory=Path("runs/init_175b"),
    size="175b",
    init_from=Path("runs/gpt3_175b"),  # C.3: pretrained GPT-3, not the SFT baseline
    data=SFTData(
        train=Path("data/demonstrations.jsonl"),
        pretraining=Path("data/pretraining.jsonl"),
        pretraining_fraction=0.1,  # C.3: 10%; of the sequences and of the loss: our choice
        pretraining_tokens=2048,  # not stated; our choice: the context, as in GPT-3's training
        max_prompt_tokens=1024,  # app. C: prompts over 1k tokens are filtered
        max_tokens=2048,  # app. C: 2k context
    ),
    epochs=2.0,  # C.3
    batch_size=8,  # C.3
    adam=AdamConfig(
        lr=2.45e-6,  # C.3
        schedule="cosine",  # C.3
        final_fraction=0.1,  # C.3: to 10%
        warmup=0,  # not stated; our choice: as the SFT baseline (C.1)
        beta1=0.9,  # app. C
        beta2=0.95,  # app. C
    ),
    dropout=0.2,  # not stated; our choice: as the SFT baseline (C.1)
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
