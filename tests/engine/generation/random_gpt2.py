"""A GPT-2 with random weights, large enough that every part of it decides what is generated."""

from pathlib import Path

import numpy as np
import torch
from transformers import GPT2Config, GPT2LMHeadModel

from engine.huggingface.convert import load_huggingface
from engine.huggingface.model_folder import read_size
from engine.ranks.start import start_parallel
from engine.settings.layout import ParallelLayout
from engine.settings.numerics import Numerics
from engine.training.network import Network, build_network

CONTEXT = 224
VOCAB = 300  # padded to 384 here: masking the padding matters


def save_gpt2(folder: Path) -> GPT2LMHeadModel:
    """Write a random GPT-2 of four layers as transformers does, and return it."""
    config = GPT2Config(
        n_layer=4,
        n_embd=64,
        n_head=4,
        vocab_size=VOCAB,
        n_positions=CONTEXT,
        bos_token_id=0,
        eos_token_id=0,
    )
    model = GPT2LMHeadModel(config).eval()
    generator = torch.Generator().manual_seed(0)
    for parameter in model.parameters():
        parameter.data.normal_(std=0.15, generator=generator)
    model.save_pretrained(folder)
    return model


def load_gpt2(folder: Path, layout: ParallelLayout | None = None, dtype: str = "fp32") -> Network:
    """Return that model as a network of ours, in a layout of all ranks."""
    parallel = start_parallel(layout or ParallelLayout(), seed=1)
    numerics = Numerics(dtype=dtype)  # type: ignore[arg-type]
    network = build_network("language", read_size(folder), parallel, numerics=numerics)
    load_huggingface(network, folder)
    return network


def random_prompts(num_prompts: int, longest: int, seed: int = 0) -> list[np.ndarray]:
    """Return prompts of 1 to `longest` tokens, the shortest and the longest among them."""
    rng = np.random.default_rng(seed)
    lengths = [1, longest, *rng.integers(1, longest + 1, num_prompts)][:num_prompts]
    return [rng.integers(0, VOCAB, length) for length in lengths]
