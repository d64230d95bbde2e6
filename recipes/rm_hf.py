"""The reward model on a pretrained model's trunk, at its own size, from rankings of K answers.

python recipes/rm_hf.py --data.train comparisons.jsonl
It starts from recipes/sft_hf.py's run; --init-from FOLDER: from another run, or a Hugging Face
folder. --data.demonstrations demonstrations.jsonl sets their mean reward to 0, as in the paper.
"""

from pathlib import Path

from engine.recipe import run_stage
from engine.settings.adam import AdamConfig
from engine.settings.numerics import Numerics
from engine.settings.rm import RMConfig, RMData

config = RMConfig(
    directory=Path("runs/rm_hf"),
    size="",  # that of what it starts from
    init_from=Path("runs/sft_hf"),  # C.2: pretrained and SFT models give similar results
    # Our choice: as recipes/sft_hf.py, what a context of 1,024 holds; app. C has 1k and 2k.
    data=RMData(max_prompt_tokens=768, max_tokens=1024),
    epochs=1.0,  # C.2: more overfits
    batch_size=64,  # C.2: distinct prompts
    adam=AdamConfig(
        lr=9e-6,  # C.2, at 6B; our choice for all from 0.1B to 13B
        schedule="cosine",  # C.2
        final_fraction=0.1,  # C.2: to 10%
        warmup=0,  # not stated; our choice: as SFT (C.1)
        beta1=0.9,  # app. C
        beta2=0.95,  # app. C
    ),
    numerics=Numerics(dtype="bf16"),  # app. C: fp16, fp32 masters; bf16: our choice for A100 on
    micro_batch_tokens=8192,  # our choice; a prompt's answers stay together, up to 9 x 1,024
)

if __name__ == "__main__":
    run_stage("engine.rm.train", config)
