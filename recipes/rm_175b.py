"""A reward model of 175B, for who has more GPUs; the paper trained some and kept the 6B (C.2).

srun --ntasks=1024 python recipes/rm_175b.py --data.train comparisons.jsonl \
    --data.demonstrations demonstrations.jsonl
They reached a lower loss but were unstable to train and a poor start of a critic (C.2).
"""

from pathlib import Path

from engine.recipe import run_stage
from engine.settings.adam import AdamConfig
from engine.settings.layout import ParallelLayout
from engine.settings.numerics import Numerics
from engine.settings.rm import RMConfig, RMData
from engine.settings.saving import SaveConfig

config = RMConfig(
    directory=Path("runs/rm_175b"),
    size="175b",
    # C.2: GPT-3 finetuned on public NLP sets, "for historical reasons"; GPT-3 and SFT are as good.
    # Our choice: the init policy, since the SFT baseline's selection needs this reward model first.
    init_from=Path("runs/init_175b"),
    data=RMData(
        train=Path("data/comparisons.jsonl"),  # C.2: K = 4 to 9 answers a prompt, all pairs
        demonstrations=Path("data/demonstrations.jsonl"),  # C.2: their mean reward is set to 0
        max_prompt_tokens=1024,  # app. C: prompts over 1k tokens are filtered
        max_tokens=2048,  # app. C: 2k context
    ),
    epochs=1.0,  # C.2: more overfits
    batch_size=64,  # C.2: distinct prompts
    adam=AdamConfig(
        lr=5e-6,  # not stated for this size; our choice: the critic's beside 175B (C.4)
        schedule="cosine",  # C.2
        final_fraction=0.1,  # C.2: to 10%
        warmup=0,  # not stated; our choice: as SFT (C.1)
        beta1=0.9,  # app. C
        beta2=0.95,  # app. C
    ),
    # The paper: fp16 with fp32 masters (app. C). Our choice for A100 and later: bf16, as fast and
    # without a loss scale.
    numerics=Numerics(dtype="bf16", recompute="full"),
    # Our choice: 512 or 1,024 GPUs; on 64 --layout.pp 8.
    layout=ParallelLayout(tp=8, pp=16, sequence_parallel=True),
    # Our choice: a checkpoint is 2.5 TB (14 bytes a parameter); an hour keeps the disks free.
    saving=SaveConfig(save_every_minutes=60.0),
    micro_batch_tokens=8192,  # our choice; a prompt's answers stay together, up to 9 x 2,048
)

if __name__ == "__main__":
    run_stage("engine.rm.train", config, num_gpus=1024)
