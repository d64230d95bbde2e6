"""A tokenizer of your own text, for a model that starts from nothing.

python recipes/tokenizer.py --files demonstrations.jsonl pretraining.jsonl
Give all files that the stages will read. It makes runs/tokenizer, which every stage's --tokenizer
takes. --fields is what --data.fields is to the stages: the fields of files that have other names.
A model from elsewhere brings its own tokenizer and wants none.
"""

from engine.recipe import run_stage
from engine.settings.tokenizer import TokenizerConfig

if __name__ == "__main__":
    run_stage(
        "engine.prepare.tokenizer_training.train_tokenizer", TokenizerConfig(), has_dry_run=False
    )
