"""A Hugging Face model as one of our checkpoints, and one of ours for Hugging Face.

python recipes/convert_hf.py import --source gpt2/ --out runs/gpt2
python recipes/convert_hf.py export --source runs/sft --out sft_hf/

A reward model is a sequence classifier of one label; a critic becomes one too:
python recipes/convert_hf.py import --source rm_hf/ --out runs/rm --tokenizer runs/sft/tokenizer
python recipes/convert_hf.py export --source runs/ppo --role critic --out critic_hf/

A model too large for one process, here on eight:
torchrun --nproc-per-node=8 recipes/convert_hf.py import --source ... --out ... --layout.tp 8
"""

import tyro

from engine.recipe import run_stage
from engine.settings.convert import ConvertConfig

if __name__ == "__main__":
    default = ConvertConfig(direction=tyro.MISSING)
    run_stage("engine.huggingface.convert.convert", default, has_dry_run=False)
