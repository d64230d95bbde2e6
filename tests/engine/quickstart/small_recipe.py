"""A user's data folder and the quickstart's recipe, both cut down to seconds."""

import dataclasses
import gzip
import json
from pathlib import Path

from engine.quickstart.places import demonstrations, fact_lists, render_facts
from recipes.quickstart import config as recipe
from tests.tiny import write_lines


def data_folder(folder: Path) -> Path:
    """Write a user's data folder: a few dozen places, K = 4 completions of each, a little text."""
    for name in ("sft", "comparisons", "prompts", "pretrain"):
        (folder / name).mkdir(parents=True)
    for ending, split, count in (("train", "train", 60), ("val", "valid", 8)):
        pairs = demonstrations(split, count, seed=0)
        write_lines(
            folder / f"sft/e2e.{ending}.jsonl", ({"prompt": p, "response": r} for p, r in pairs)
        )
        write_lines(
            folder / f"comparisons/e2e.{ending}.jsonl",
            (
                {"prompt": p, "completions": [r, r[:20], r[:9], "no"], "ranks": [1, 2, 3, 4]}
                for p, r in pairs
            ),
        )
        facts = fact_lists("prompts" if ending == "train" else "valid", 12, seed=1)
        write_lines(
            folder / f"prompts/e2e.{ending}.jsonl", ({"prompt": render_facts(f)} for f in facts)
        )
        text = "\n".join(json.dumps({"text": f"the river near the mill {n}"}) for n in range(400))
        (folder / f"pretrain/{ending}.jsonl.gz").write_bytes(gzip.compress(text.encode()))
    return folder


def tiny_config(home: Path, data: Path, **changes):
    """Return the recipe's config, cut down to seconds."""
    ppo = dataclasses.replace(
        recipe.ppo,
        iterations=2,
        rollout_batch_size=8,
        minibatch_size=4,
        sampling=dataclasses.replace(recipe.ppo.sampling, max_new_tokens=8),
        data=dataclasses.replace(recipe.ppo.data, pretraining_tokens=32),
    )
    pretrain = dataclasses.replace(
        recipe.pretrain, data=dataclasses.replace(recipe.pretrain.data, pretraining_tokens=32)
    )
    return dataclasses.replace(
        recipe,
        directory=home,
        data=data,
        vocab_size=400,
        num_pretraining_tokens=2_000,
        num_demonstrations=60,
        num_judged=6,
        pretrain=pretrain,
        ppo=ppo,
        **changes,
    )
