"""Runs that begin with one weight so large that finite numbers overflow in a known place."""

import dataclasses
from pathlib import Path

import pytest
import torch

from engine.checkpoints.checkpointer import Checkpointer
from engine.checkpoints.weights import load_weights
from engine.data.tokenizer import load_tokenizer
from engine.errors import UserError
from engine.ranks.start import start_parallel
from engine.settings.layout import ParallelLayout
from engine.settings.numerics import Numerics
from engine.settings.saving import SaveConfig
from engine.training.network import build_network
from tests.tiny import ADAM, SIZE, ppo_config, rm_config, sft_config, train

STUCK = dataclasses.replace(ADAM, max_skipped_steps=2)
HUGE = {"fp32": 3e38, "bf16": 3e38, "fp16": 6e4}
PLACE = "decoder.layers.2.mlp.linear_fc1"


def plant(  # noqa: PLR0913 - where, each named
    files: Path, into: Path, role: str, value: float, name: str = PLACE, row: int = 3
) -> Path:
    """Write a run as a role's in `files`, with half a row of a matrix at `value`; return it."""
    kind = "language" if role == "policy" else "scalar"
    network = build_network(
        kind, SIZE, start_parallel(ParallelLayout(), seed=0), numerics=Numerics()
    )
    load_weights(network, files / role, role=role)
    with torch.no_grad():
        network.modules[0].get_submodule(name).weight[row, ::2] = value
    tokenizer = load_tokenizer(files / "tokenizer.json")
    Checkpointer(
        directory=into / "checkpoints",
        parallel=network.parallel,
        saving=SaveConfig(save_in_background=False),
        networks={role: network},
        optimizers={},
        tokenizer_fingerprint=tokenizer.fingerprint(),
    ).save(0, {})
    tokenizer.save(into / "tokenizer")
    return into


def stuck_run(stage: str, files: Path, folder: Path, dtype: str = "fp32", **changes) -> str:
    """Run a stage from a planted weight until it ends in words; return them. Its folder is
    folder / "run"."""
    role = "reward_model" if stage == "ppo" else "policy"
    return ended(
        stage, files, plant(files, folder / "planted", role, HUGE[dtype]), dtype, **changes
    )


def ended(stage: str, files: Path, planted: Path, dtype: str = "fp32", **changes) -> str:
    """Run a stage from a planted run beside it, until it ends in words; return them."""
    run, common = planted.parent / "run", {"numerics": Numerics(dtype=dtype), **changes}
    if stage == "sft":
        config = sft_config(files, run, init_from=planted, adam=STUCK, epochs=2.0, **common)
    elif stage == "rm":
        config = rm_config(files, run, init_from=planted, adam=STUCK, **common)
    else:
        adams = {"adam": STUCK, "critic_adam": STUCK}
        config = ppo_config(files, run, reward_model=planted, iterations=4, **adams, **common)
    with pytest.raises(UserError) as error:
        train(config)
    return str(error.value)
