"""Answers of any checkpoint, ours or a Hugging Face GPT-2: a file of prompts, or a dialogue.

python recipes/generate.py --source runs/ppo --prompts prompts.jsonl --out responses.jsonl
python recipes/generate.py --source runs/ppo --role ema --sampling.temperature 0.7

Answers are kept in responses.jsonl.partial as they come, in any order; when all are there they
become responses.jsonl, sorted by prompt and sample. The same command, on any layout, goes on where
a stopped one was: it draws what is missing, and draws the same. With another model, other prompts
or settings it says so and stops, also where responses.jsonl is finished; --overwrite replaces that.

A model too large for one process, here on eight:
torchrun --nproc-per-node=8 recipes/generate.py --source ... --prompts ... --layout.tp 8
"""

from engine.recipe import run_stage
from engine.settings.generate import GenerateConfig

if __name__ == "__main__":
    run_stage("engine.answers.answer.generate_text", GenerateConfig(), has_dry_run=False)
