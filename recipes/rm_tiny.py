"""The reward model, tiny, from rankings of K answers.

python recipes/rm_tiny.py --data.train comparisons.jsonl --data.demonstrations demonstrations.jsonl
Values are ours.
"""

from pathlib import Path

from engine.recipe import run_stage
from engine.settings.adam import AdamConfig
from engine.settings.rm import RMConfig, RMData

config = RMConfig(
    directory=Path("runs/rm_tiny"),
    init_from=Path("runs/sft_tiny"),
    data=RMData(max_prompt_tokens=128, max_tokens=256, num_demonstrations=256),
    epochs=2.0,
    batch_size=8,
    micro_batch_tokens=8192,
    adam=AdamConfig(lr=1e-3, warmup=5),
)

if __name__ == "__main__":
    run_stage("engine.rm.train", config)
