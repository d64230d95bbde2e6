"""Tiny random models of every family that converts, as transformers builds and saves them. Their
config.json has the keys of a public one."""

import re
from pathlib import Path
from typing import Any

import tokenizers
import torch
from transformers import (
    AutoConfig,
    AutoModelForCausalLM,
    PreTrainedModel,
    PreTrainedTokenizerFast,
)
from transformers.models.qwen2.tokenization_qwen2 import PRETOKENIZE_REGEX

VOCAB = 300  # padded to 384 here: masking the padding matters
CONTEXT = 64
_ENDS = {"bos_token_id": 0, "eos_token_id": 0}
_GPT2 = {
    "model_type": "gpt2",
    **{"n_layer": 4, "n_embd": 64, "n_head": 4, "vocab_size": VOCAB, "n_positions": CONTEXT},
    **_ENDS,
}
_COMMON = {
    **{"num_hidden_layers": 4, "hidden_size": 64, "num_attention_heads": 4},
    **{"vocab_size": VOCAB, "max_position_embeddings": CONTEXT},
    **_ENDS,
}
_OPT = {
    "model_type": "opt",
    **_COMMON,
    **{"ffn_dim": 256, "word_embed_proj_dim": 64, "pad_token_id": 1, "activation_function": "relu"},
}
_NEOX = {"model_type": "gpt_neox", **_COMMON, "intermediate_size": 256}
_LLAMA = {"model_type": "llama", **_COMMON, "intermediate_size": 176, "num_key_value_heads": 4}
_QWEN2 = {"model_type": "qwen2", **_COMMON, "intermediate_size": 160, "num_key_value_heads": 2}

CONFIGS: dict[str, dict[str, Any]] = {
    "gpt2": _GPT2,
    "cerebras": _GPT2 | {"activation_function": "gelu", "n_inner": 256},
    "gpt2_wide_silu": _GPT2
    | {"n_inner": 96, "activation_function": "swish", "layer_norm_epsilon": 1e-3},
    "gpt2_relu": _GPT2 | {"activation_function": "relu"},
    "gpt2_by_layer": _GPT2 | {"scale_attn_by_inverse_layer_idx": True},
    "gpt2_untied": _GPT2 | {"tie_word_embeddings": False, "activation_function": "quick_gelu"},
    "opt": _OPT,
    "opt_norm_after": _OPT | {"do_layer_norm_before": False},
    "opt_350m": _OPT | {"do_layer_norm_before": False, "word_embed_proj_dim": 32},
    "opt_wide_embedding": _OPT | {"activation_function": "gelu", "word_embed_proj_dim": 96},
    "opt_without_bias": _OPT | {"enable_bias": False, "activation_function": "gelu"},
    "pythia": _NEOX,
    "neox_biases_of_mlp": _NEOX | {"attention_bias": False},
    "neox_serial": _NEOX
    | {
        "use_parallel_residual": False,
        "hidden_act": "gelu_fast",
        "rotary_pct": 1.0,
        "rotary_emb_base": 500,
        "tie_word_embeddings": True,
    },
    "llama": _LLAMA,
    "llama_31": _LLAMA
    | {
        "num_key_value_heads": 2,
        "tie_word_embeddings": True,
        "rope_theta": 500.0,
        "rope_scaling": {
            "rope_type": "llama3",
            "factor": 8.0,
            "low_freq_factor": 1.0,
            "high_freq_factor": 4.0,
            "original_max_position_embeddings": 16,
        },
    },
    "llama_linear_biases": _LLAMA
    | {
        "attention_bias": True,
        "mlp_bias": True,
        "rope_scaling": {"type": "linear", "factor": 2.0},
    },
    "llama_biases_of_attention": _LLAMA | {"attention_bias": True},
    "llama_biases_of_mlp": _LLAMA | {"mlp_bias": True},
    "mistral": _LLAMA
    | {
        "model_type": "mistral",
        "num_key_value_heads": 2,
        "head_dim": 32,
        "sliding_window": 7,
        "rope_theta": 1e6,
    },
    "mistral_without_window": _LLAMA | {"model_type": "mistral", "sliding_window": None},
    "qwen2": _QWEN2 | {"tie_word_embeddings": True, "rope_theta": 1000000.0},
    "qwen2_windows": _QWEN2
    | {
        "use_sliding_window": True,
        "sliding_window": 5,
        "layer_types": ["full_attention", "sliding_attention"] * 2,
    },
    "qwen2_yarn": _QWEN2
    | {
        "rope_scaling": {
            "type": "yarn",
            "factor": 4.0,
            "original_max_position_embeddings": 16,
        },
    },
    "qwen3": _QWEN2 | {"model_type": "qwen3", "head_dim": 32, "tie_word_embeddings": True},
    "qwen3_biases_of_attention": _QWEN2
    | {"model_type": "qwen3", "head_dim": 32, "attention_bias": True},
}


def build_family(name: str, **changes: Any) -> PreTrainedModel:
    """Return that model, every weight random and none at a value that hides it; changes: of its
    config."""
    config = AutoConfig.for_model(**(CONFIGS[name] | changes))
    model = AutoModelForCausalLM.from_config(config).eval()
    generator = torch.Generator().manual_seed(0)
    for parameter in model.parameters():
        parameter.data.normal_(std=0.15, generator=generator)
        if parameter.dim() == 1:
            parameter.data += 0.5
    return model


def save_family(name: str, folder: Path, **changes: Any) -> PreTrainedModel:
    """Write the model's folder as transformers does, and return it; changes: of its config."""
    model = build_family(name, **changes)
    model.save_pretrained(folder)
    return model


def save_talker(name: str, folder: Path, **changes: Any) -> PreTrainedModel:
    """The same of a model whose greedy answers vary: its norms' weights are near 1, its layers say
    more than the last token does, and no bias of the last norm speaks for one token."""
    model = build_family(name, **changes)
    for parameter_name, parameter in model.named_parameters():
        if parameter.dim() == 1:
            parameter.data += 0.5 if parameter_name.endswith("weight") else -0.5
        elif re.search(r"\.(h|layers)\.", parameter_name):
            parameter.data *= 2
        elif "project_in" in parameter_name:
            parameter.data *= 8  # tokens count beside positions
    model.save_pretrained(folder)
    return model


def save_tokenizer(folder: Path, num_ids: int = VOCAB) -> None:
    """Write a tokenizer of exactly so many ids as transformers does: byte pairs of the words that
    tests/tiny.py writes in, and tokens that no text becomes. Its steps are Qwen2's, which
    AutoTokenizer takes for every Qwen2."""
    tokenizer = tokenizers.Tokenizer(tokenizers.models.BPE())
    tokenizer.normalizer = tokenizers.normalizers.NFC()
    words = tokenizers.pre_tokenizers.Split(tokenizers.Regex(PRETOKENIZE_REGEX), "isolated")
    byte_level = tokenizers.pre_tokenizers.ByteLevel(add_prefix_space=False, use_regex=False)
    tokenizer.pre_tokenizer = tokenizers.pre_tokenizers.Sequence([words, byte_level])
    tokenizer.decoder = tokenizers.decoders.ByteLevel()
    trainer = tokenizers.trainers.BpeTrainer(
        vocab_size=num_ids - 10,
        special_tokens=["<|endoftext|>"],
        initial_alphabet=byte_level.alphabet(),
        show_progress=False,
    )
    tokenizer.train_from_iterator(["the mill is a cheap pub near the river"] * 8, trainer)
    num_reserved = num_ids - tokenizer.get_vocab_size()
    tokenizer.add_special_tokens([f"<|reserved {n}|>" for n in range(num_reserved)])
    whole = PreTrainedTokenizerFast(tokenizer_object=tokenizer, eos_token="<|endoftext|>")
    assert len(whole) == num_ids
    whole.save_pretrained(folder)
