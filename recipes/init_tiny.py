"""The policy that PPO starts from, tiny: demonstrations with a tenth of pretraining text.

python recipes/init_tiny.py --init-from runs/sft_tiny --data.train demonstrations.jsonl \
    --data.pretraining text.jsonl
The tenth is the paper's (C.3); the other values are ours.
"""

from pathlib import Path

from engine.recipe import run_stage
from engine.settings.adam import AdamConfig
from engine.settings.sft import SFTConfig, SFTData

config = SFTConfig(
    directory=Path("runs/init_tiny"),
    size="tiny",
    data=SFTData(
        max_prompt_tokens=128,
        max_tokens=256,
        pretraining_fraction=0.1,
        pretraining_tokens=64,
    ),
    epochs=2.0,
    batch_size=16,
    micro_batch_tokens=4096,
    adam=AdamConfig(lr=3e-3, warmup=20),
    dropout=0.0,
)

if __name__ == "__main__":
    run_stage("engine.sft.train", config)
