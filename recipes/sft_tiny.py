"""Supervised fine-tuning of a model of about a million parameters, which may start from nothing.

python recipes/sft_tiny.py --tokenizer t.model --data.train demonstrations.jsonl
With --data.pretraining text.jsonl and no --data.train it pretrains. Values are ours.
"""

from pathlib import Path

from engine.recipe import run_stage
from engine.settings.adam import AdamConfig
from engine.settings.sft import SFTConfig, SFTData

config = SFTConfig(
    directory=Path("runs/sft_tiny"),
    size="tiny",
    data=SFTData(max_prompt_tokens=128, max_tokens=256, pretraining_tokens=256),
    epochs=2.0,
    batch_size=16,
    micro_batch_tokens=4096,
    adam=AdamConfig(lr=3e-3, warmup=20),
    dropout=0.0,
)

if __name__ == "__main__":
    run_stage("engine.sft.train", config)
