"""SFT of a pretrained model from its folder, at its own size; PPO starts from it too.

python recipes/sft_hf.py --init-from FOLDER --data.train demonstrations.jsonl
FOLDER: Hugging Face's, or a run. With --data.pretraining text.jsonl --data.pretraining-fraction 0.1
it is the paper's init policy (C.3). Several GPUs: torchrun, and --layout.tp for large models.
"""

from pathlib import Path

from engine.recipe import run_stage
from engine.settings.adam import AdamConfig
from engine.settings.numerics import Numerics
from engine.settings.sft import SFTConfig, SFTData

config = SFTConfig(
    directory=Path("runs/sft_hf"),
    size="",  # the folder's
    # Our choice: a context of 1,024 (GPT-2) holds them; app. C has 1k and 2k.
    data=SFTData(max_prompt_tokens=768, max_tokens=1024, pretraining_tokens=1024),
    epochs=2.0,  # C.3, of PPO's start; C.1: 16, the best by reward (--selection.reward-model)
    batch_size=32,  # C.1
    adam=AdamConfig(
        lr=9.65e-6,  # C.1, at 1.3B and 6B; our choice for all from 0.1B to 13B
        schedule="cosine",  # C.1
        final_fraction=0.1,  # C.1: to 10%
        warmup=0,  # C.1: none
        beta1=0.9,  # app. C
        beta2=0.95,  # app. C
    ),
    dropout=0.0,  # C.1: 0.2; our choice: Llama, Qwen and Pythia were trained without, and 2 epochs
    numerics=Numerics(dtype="bf16"),  # app. C: fp16, fp32 masters; bf16: our choice for A100 on
    micro_batch_tokens=8192,  # our choice
)

if __name__ == "__main__":
    run_stage("engine.sft.train", config)
