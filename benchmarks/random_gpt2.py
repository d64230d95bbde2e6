"""transformers' GPT-2 with random weights, as fast as plain settings make it."""

from typing import Any

import torch
from transformers import GPT2Config, GPT2LMHeadModel

from models.sizes import GPTSize


def gpt2_config(size: GPTSize, **changes: Any) -> GPT2Config:
    """Return the config of a size: attention by torch's SDPA, GELU in torch's one kernel for the
    same formula."""
    config = GPT2Config(
        n_layer=size.num_layers,
        n_embd=size.hidden_size,
        n_head=size.num_heads,
        vocab_size=size.vocab_size,
        n_positions=size.context_length,
        activation_function="gelu_pytorch_tanh",
        **changes,
    )
    config._attn_implementation = "sdpa"
    return config


def random_gpt2(size: GPTSize, device: torch.device, dtype: torch.dtype) -> GPT2LMHeadModel:
    """Return a GPT-2 as transformers initialises it, the same at every call on a device, in
    evaluation mode; it never stops by itself."""
    torch.manual_seed(0)
    with device:  # drawn there: a CPU takes a minute for 1.3 billion numbers
        model = GPT2LMHeadModel(gpt2_config(size, bos_token_id=0, eos_token_id=0))
    settings = model.generation_config
    settings.bos_token_id = settings.eos_token_id = None
    settings.pad_token_id = 0
    return model.to(device, dtype).eval()
