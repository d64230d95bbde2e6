"""A recipe small enough for tests: files, checkpoints to start from, configs of the three stages.

The weights are random and large, so that every part of a network matters to its output; a network
that has just been initialised hardly looks at its attention.
"""

import dataclasses
import gc
import json
import random
from collections.abc import Iterable, Mapping
from pathlib import Path
from typing import Any

import pytest
import tokenizers
import torch

from engine import ppo, rm, sft
from engine.checkpoints.checkpointer import Checkpointer
from engine.checkpoints.found import size_of
from engine.checkpoints.weights import load_weights
from engine.data.tokenizer import load_tokenizer
from engine.metrics import Metrics, read_metrics
from engine.ranks.parallel import Parallel
from engine.ranks.start import start_parallel
from engine.settings.adam import AdamConfig
from engine.settings.kl import KLConfig
from engine.settings.layout import ParallelLayout
from engine.settings.numerics import Numerics
from engine.settings.ppo import PPOConfig, PPOData
from engine.settings.rm import RMConfig, RMData
from engine.settings.sampling import SamplingConfig
from engine.settings.saving import SaveConfig
from engine.settings.sft import SFTConfig, SFTData
from engine.training.network import Network, build_network
from models.sizes import GPTSize, Kind

SIZE = GPTSize(num_layers=4, hidden_size=32, num_heads=4, vocab_size=100, context_length=64)
WORDS = ["the", "mill", "is", "a", "cheap", "pub", "near", "the", "river", "and", "serves", "fish"]
# Adam's epsilon lies above the rounding of gradients that are exactly 0 in real numbers (of
# attention's key biases, of a ranking loss's bias), which Adam scales up to whole steps.
ADAM = AdamConfig(lr=1e-3, epsilon=1e-6)
EVERY_STEP = SaveConfig(save_every=1)
# So that runs on a GPU can be compared to the last bit, as those on a CPU are.
NUMERICS = Numerics(deterministic=torch.cuda.is_available())
ROLES = {"policy": "language", "reference": "language", "reward_model": "scalar"}


def write_lines(path: Path, records: Iterable[dict[str, Any]]) -> Path:
    """Write a .jsonl file and return its path."""
    path.write_text("".join(json.dumps(record) + "\n" for record in records))
    return path


def write_files(folder: Path) -> None:
    """Write a tokenizer and the files of the three stages; no two records are of one length."""
    draw = random.Random(0)

    def text(fewest: int, most: int) -> str:
        return " ".join(draw.choices(WORDS, k=draw.randint(fewest, most)))

    write_tokenizer(folder / "tokenizer.json", vocab_size=SIZE.vocab_size)
    write_lines(
        folder / "demonstrations.jsonl",
        ({"prompt": text(2, 6), "response": text(1, 9)} for _ in range(40)),
    )
    write_lines(
        folder / "comparisons.jsonl",
        (
            {
                "prompt": text(2, 5),
                "completions": [text(1, 6) for _ in range(num_completions)],
                # The last two are tied where there are more than two.
                "ranks": [*range(1, num_completions), max(num_completions - 1, 2)],
            }
            for num_completions in (2, 4, 3, 5) * 6
        ),
    )
    write_lines(folder / "prompts.jsonl", ({"prompt": text(2, 8)} for _ in range(24)))
    write_lines(folder / "pretraining.jsonl", ({"text": text(5, 60)} for _ in range(60)))
    write_lines(folder / "pretraining_valid.jsonl", ({"text": text(5, 60)} for _ in range(9)))


def write_tokenizer(path: Path, *, vocab_size: int) -> Path:
    """Train a small byte-pair tokenizer on WORDS."""
    tokenizer = tokenizers.Tokenizer(tokenizers.models.BPE())
    tokenizer.decoder = tokenizers.decoders.Fuse()
    trainer = tokenizers.trainers.BpeTrainer(
        vocab_size=vocab_size, special_tokens=["<|endoftext|>"], show_progress=False
    )
    texts = [" ".join(WORDS[i:] + WORDS[:i]) + "\n" for i in range(len(WORDS))]
    tokenizer.train_from_iterator(texts, trainer)
    tokenizer.save(str(path))
    return path


def write_checkpoints(folder: Path, size: GPTSize = SIZE) -> None:
    """Write a run a role, by one rank: folder/{policy,reference,reward_model}."""
    parallel = start_parallel(ParallelLayout(), seed=0)
    tokenizer = load_tokenizer(folder / "tokenizer.json")
    for seed, (name, kind) in enumerate(ROLES.items()):
        network = random_network(kind, parallel, size=size, seed=seed)
        role = "policy" if kind == "language" else name
        Checkpointer(
            directory=folder / name / "checkpoints",
            parallel=parallel,
            saving=SaveConfig(save_in_background=False),
            networks={role: network},
            optimizers={},
            tokenizer_fingerprint=tokenizer.fingerprint(),
        ).save(0, {})
        tokenizer.save(folder / name / "tokenizer")


def random_network(
    kind: Kind, parallel: Parallel, *, size: GPTSize = SIZE, seed: int = 0, dtype: str = "fp32"
) -> Network:
    """Return a frozen network whose weights are all drawn from the seed, on one rank."""
    network = build_network(kind, size, parallel, numerics=Numerics(dtype=dtype))
    generator = torch.Generator().manual_seed(seed)
    with torch.no_grad():
        for module in network.modules:
            for name, parameter in module.named_parameters():
                noise = 0.15 * torch.randn(parameter.shape, generator=generator)
                is_scale = "layernorm.weight" in name
                parameter.copy_(1.0 + noise if is_scale else noise)
    return network


def sft_config(files: Path, directory: Path, **changes: Any) -> SFTConfig:
    """Three steps on demonstrations with a quarter of pretraining text."""
    config = SFTConfig(
        directory=directory,
        init_from=files / "policy",
        data=SFTData(
            train=files / "demonstrations.jsonl",
            pretraining=files / "pretraining.jsonl",
            pretraining_fraction=0.25,
            pretraining_tokens=32,
            valid_fraction=0.25,
        ),
        epochs=0.6,
        batch_size=8,
        micro_batch_tokens=96,
        adam=ADAM,
        numerics=NUMERICS,
        dropout=0.0,
    )
    return dataclasses.replace(config, **changes)


def rm_config(files: Path, directory: Path, **changes: Any) -> RMConfig:
    """Three steps on comparisons of two to five completions."""
    config = RMConfig(
        directory=directory,
        init_from=files / "policy",
        data=RMData(
            train=files / "comparisons.jsonl",
            demonstrations=files / "demonstrations.jsonl",
            num_demonstrations=10,
            valid_fraction=0.25,
        ),
        epochs=1.0,
        batch_size=6,
        micro_batch_tokens=256,
        adam=ADAM,
        numerics=NUMERICS,
    )
    return dataclasses.replace(config, **changes)


def ppo_config(files: Path, directory: Path, **changes: Any) -> PPOConfig:
    """Two iterations of two optimizer steps, and a look at what is held out behind the second;
    another reference, so that the KL is never 0."""
    config = PPOConfig(
        directory=directory,
        policy=files / "policy",
        reference=files / "reference",
        reward_model=files / "reward_model",
        data=PPOData(
            prompts=files / "prompts.jsonl",
            pretraining=files / "pretraining.jsonl",
            pretraining_valid=files / "pretraining_valid.jsonl",
            pretraining_tokens=32,
            valid_fraction=0.35,
        ),
        sampling=SamplingConfig(max_new_tokens=24, num_slots=4, cache_gib=0.01),
        iterations=2,
        eval_every=2,
        rollout_batch_size=8,
        minibatch_size=4,
        micro_batch_tokens=128,
        kl=KLConfig(control="adaptive", horizon=100),
        eos_rule="penalty",
        ptx_examples_per_episode=1,
        adam=dataclasses.replace(ADAM, schedule="constant"),
        critic_adam=dataclasses.replace(ADAM, schedule="constant"),
        numerics=NUMERICS,
    )
    return dataclasses.replace(config, **changes)


def weights_of(run: Path, role: str, kind: Kind | None = None) -> dict[str, torch.Tensor]:
    """Return a run's newest weights of a role by name, joined on one rank.

    A scalar network of a run's policy is what a reward model of seed 0 starts from.
    """
    parallel = start_parallel(ParallelLayout(), seed=0)
    kind = kind or ("language" if role in ("policy", "ema") else "scalar")
    network = build_network(kind, size_of(run, role), parallel, numerics=Numerics())
    load_weights(network, run, role=role)
    (module,) = network.modules
    return {name: p.detach().clone() for name, p in module.named_parameters()}


def train(config: SFTConfig | RMConfig | PPOConfig) -> None:
    """Run the stage of a config without drawing its curves, which takes longer than training."""
    stages = {SFTConfig: sft.train, RMConfig: rm.train, PPOConfig: ppo.train}
    gc.freeze()  # megatron collects garbage on every save, and most objects here are the libraries'
    try:
        with pytest.MonkeyPatch.context() as patch:
            patch.setattr("engine.metrics.plot_curves", lambda run_dir: None)
            stages[type(config)](config)  # type: ignore[operator]
    finally:
        gc.unfreeze()  # what is still frozen when Python ends, nanobind's libraries report as leaks


class Killed(Exception):
    """Ends a run from inside, as a signal would."""


def train_until(config: SFTConfig | RMConfig | PPOConfig, step: int) -> None:
    """Run a stage that dies when step `step` (from 0) is logged, before that step can be saved."""
    log = Metrics.log

    def log_and_die(self: Metrics, current: int, values: Mapping[str, float]) -> None:
        log(self, current, values)
        if current == step:
            raise Killed

    with pytest.MonkeyPatch.context() as patch, pytest.raises(Killed):
        patch.setattr(Metrics, "log", log_and_die)
        train(config)


def without_measured(row: Mapping[str, float]) -> dict[str, float]:
    """Return a step's metrics without the clock's and the memory's."""
    measured = ("seconds", "tokens_per_s")
    return {
        k: v for k, v in row.items() if not k.endswith(measured) and not k.startswith("memory/")
    }


def rows_of(run: Path) -> list[dict[str, float]]:
    """Return a run's metrics by step, without what the clock and the memory say."""
    return [without_measured(row) for row in read_metrics(run)]
