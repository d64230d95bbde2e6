"""The families of Hugging Face's folders that are forms of our GPT: one table each. Imports neither
torch nor megatron.

A table says what a family's config.json calls the fields of our size, and which of its fields have
one value only. And it says what the tensors are called. config.py and tensors.py go by it.
Facts are those of transformers' configuration_*.py and modeling_*.py.
"""

from collections.abc import Mapping
from dataclasses import dataclass, field
from typing import Any, Literal

from models.form import Form
from models.sizes import GPTSize


@dataclass(frozen=True)
class Number:
    """A whole number of config.json."""

    theirs: str
    ours: str
    """The field of GPTSize."""
    default: int | None = -1
    """Where config.json lacks it; None: our usual one, also where it is null; -1: it must not."""


@dataclass(frozen=True)
class Choice:
    """Fields of config.json that say one field of our form together."""

    theirs: tuple[str, ...]
    ours: str
    taken: tuple[tuple[tuple[Any, ...], Any], ...]
    """(their values, ours): what converts; the first of several for one of ours is written."""
    default: tuple[Any, ...]
    """Their values where config.json lacks them."""


@dataclass(frozen=True, kw_only=True)
class Family:
    """What one family's folders have."""

    name: str
    model_type: str
    architecture: str
    """The class of its language model, which an export names."""
    scorer: str
    """The class that scores texts, of a reward model or critic: the same trunk under `score`."""
    numbers: tuple[Number, ...]
    choices: tuple[Choice, ...]
    form: Form
    """What is the same in all its models."""
    epsilon: tuple[str, float] | None
    """The field of the norms' epsilon, and its default; None: it is the form's."""
    fixed: Mapping[str, Any] = field(default_factory=dict)
    """Fields that decide what is computed and have one value here, which is their default."""
    rotary: Mapping[str, tuple[str, ...]] | None = None
    """Where a rotation's base and fraction stand, by their names in rope_parameters."""
    rotary_fraction: float = 1.0
    """Where config.json has none."""
    window: Literal["", "all", "by layer"] = ""
    """Whether sliding_window is of all layers, or of those that other fields name."""
    aliases: Mapping[str, str] = field(default_factory=dict)
    """Other names that transformers takes for some of numbers (its attribute_map)."""
    splits_hidden: bool = False
    """hidden_size is a multiple of the heads, whatever their width."""

    trunk: str
    """Before the names of all tensors but the head's; files of a bare trunk leave it out."""
    layers: str
    """Before a layer's number."""
    tensors: Mapping[str, str | tuple[str, ...]]
    """Their names of ours, without .weight and .bias; several are joined in this order."""
    head: tuple[str, ...] = ("lm_head",)
    """The head's name in files, and others that it may have."""
    score: str = "score"
    """The scorer's head in files: a matrix of one row for each label, and no bias."""
    is_conv: bool = False
    """Matrices of layers are Conv1D's: [in, out]."""
    qkv_by_head: bool = False
    """One tensor's rows are [head][query, key, value][dim], as ours, not [query, key, value]."""
    first_position: int = 0
    """The row of the first token's position."""
    constants: str = r"$^"
    """What files may hold below the trunk that is no weight, as a regular expression."""


def _flag(theirs: str, ours: str, default: bool) -> Choice:
    return Choice((theirs,), ours, (((False,), False), ((True,), True)), (default,))


def _activation(theirs: str, default: str) -> Choice:
    return Choice((theirs,), "activation", _ACTIVATIONS, (default,))


# transformers.activations.ACT2CLS. Its tanh approximations are one formula.
_ACTIVATIONS = tuple(
    ((theirs,), ours)
    for ours, names in (
        (
            "gelu_tanh",
            ("gelu_new", "gelu_pytorch_tanh", "gelu_fast", "gelu_python_tanh", "gelu_accurate"),
        ),
        ("gelu", ("gelu", "gelu_python")),
        ("quick_gelu", ("quick_gelu",)),
        ("relu", ("relu",)),
        ("silu", ("silu", "swish")),
    )
    for theirs in names
)
_NUMBERS = (
    Number("num_hidden_layers", "num_layers"),
    Number("hidden_size", "hidden_size"),
    Number("num_attention_heads", "num_heads"),
    Number("vocab_size", "vocab_size"),
    Number("max_position_embeddings", "context_length"),
)
_ROTARY = {"rope_theta": ("rope_theta",), "partial_rotary_factor": ("partial_rotary_factor",)}
_MASKS = r"(masked_)?bias"  # constant causal masks [1, 1, length, length] of older files
_INVERSES = r"(layers\.\d+\.(self_attn|attention)\.)?rotary_emb\.(inv_freq|(cos|sin)_cached)"

GPT2 = Family(
    name="GPT-2",
    model_type="gpt2",
    architecture="GPT2LMHeadModel",
    scorer="GPT2ForSequenceClassification",
    numbers=(
        Number("n_layer", "num_layers"),
        Number("n_embd", "hidden_size"),
        Number("n_head", "num_heads"),
        Number("vocab_size", "vocab_size"),
        Number("n_positions", "context_length"),
        Number("n_inner", "inner_width", None),
    ),
    choices=(
        _activation("activation_function", "gelu_new"),
        _flag("scale_attn_by_inverse_layer_idx", "scales_by_layer", False),
        _flag("tie_word_embeddings", "is_tied", True),
    ),
    form=Form(),
    epsilon=("layer_norm_epsilon", 1e-5),
    fixed={"scale_attn_weights": True, "add_cross_attention": False},
    aliases={
        "num_hidden_layers": "n_layer",
        "hidden_size": "n_embd",
        "num_attention_heads": "n_head",
        "max_position_embeddings": "n_positions",
    },
    trunk="transformer.",
    layers="h.",
    tensors={
        "embedding.word_embeddings": "wte",
        "embedding.position_embeddings": "wpe",
        "decoder.final_layernorm": "ln_f",
        "input_layernorm": "ln_1",
        "self_attention.linear_qkv": "attn.c_attn",
        "self_attention.linear_proj": "attn.c_proj",
        "pre_mlp_layernorm": "ln_2",
        "mlp.linear_fc1": "mlp.c_fc",
        "mlp.linear_fc2": "mlp.c_proj",
    },
    is_conv=True,
    constants=rf"h\.\d+\.(attn|crossattention)\.{_MASKS}",
)

OPT = Family(
    name="OPT",
    model_type="opt",
    architecture="OPTForCausalLM",
    scorer="OPTForSequenceClassification",
    numbers=(
        *_NUMBERS,
        Number("ffn_dim", "inner_width"),
        Number("word_embed_proj_dim", "embedding_width", None),
    ),
    choices=(
        _activation("activation_function", "relu"),
        Choice(
            ("do_layer_norm_before",), "is_post_norm", (((True,), False), ((False,), True)), (True,)
        ),
        Choice(("enable_bias",), "bias", (((True,), "all"), ((False,), "none")), (True,)),
        _flag("tie_word_embeddings", "is_tied", True),
    ),
    form=Form(),
    epsilon=None,
    fixed={"layer_norm_elementwise_affine": True, "_remove_final_layer_norm": False},
    trunk="model.decoder.",
    layers="layers.",
    tensors={
        "embedding.word_embeddings": "embed_tokens",
        "embedding.position_embeddings": "embed_positions",
        "embedding.project_in": "project_in",
        "project_out": "project_out",
        "decoder.final_layernorm": "final_layer_norm",
        "input_layernorm": "self_attn_layer_norm",
        "self_attention.linear_qkv": ("self_attn.q_proj", "self_attn.k_proj", "self_attn.v_proj"),
        "self_attention.linear_proj": "self_attn.out_proj",
        "pre_mlp_layernorm": "final_layer_norm",
        "mlp.linear_fc1": "fc1",
        "mlp.linear_fc2": "fc2",
    },
    first_position=2,  # OPTLearnedPositionalEmbedding.offset: fairseq kept two for padding
    constants=r"version|embed_positions\._float_tensor",
)

GPT_NEOX = Family(
    name="GPT-NeoX",
    model_type="gpt_neox",
    architecture="GPTNeoXForCausalLM",
    scorer="GPTNeoXForSequenceClassification",
    numbers=(*_NUMBERS, Number("intermediate_size", "inner_width")),
    choices=(
        _activation("hidden_act", "gelu"),
        _flag("use_parallel_residual", "is_parallel", True),
        Choice(("attention_bias",), "bias", (((True,), "all"), ((False,), "mlp")), (True,)),
        _flag("tie_word_embeddings", "is_tied", False),
    ),
    form=Form(),
    epsilon=("layer_norm_eps", 1e-5),
    rotary={
        "rope_theta": ("rotary_emb_base", "rope_theta"),
        "partial_rotary_factor": ("rotary_pct", "partial_rotary_factor"),
    },
    rotary_fraction=0.25,
    trunk="gpt_neox.",
    layers="layers.",
    tensors={
        "embedding.word_embeddings": "embed_in",
        "decoder.final_layernorm": "final_layer_norm",
        "input_layernorm": "input_layernorm",
        "self_attention.linear_qkv": "attention.query_key_value",
        "self_attention.linear_proj": "attention.dense",
        "pre_mlp_layernorm": "post_attention_layernorm",
        "mlp.linear_fc1": "mlp.dense_h_to_4h",
        "mlp.linear_fc2": "mlp.dense_4h_to_h",
    },
    head=("embed_out", "lm_head"),
    qkv_by_head=True,
    constants=rf"layers\.\d+\.attention\.{_MASKS}|{_INVERSES}",
)

_LLAMA_TENSORS: dict[str, str | tuple[str, ...]] = {
    "embedding.word_embeddings": "embed_tokens",
    "decoder.final_layernorm": "norm",
    "input_layernorm": "input_layernorm",
    "self_attention.linear_qkv": ("self_attn.q_proj", "self_attn.k_proj", "self_attn.v_proj"),
    "self_attention.linear_proj": "self_attn.o_proj",
    "self_attention.q_layernorm": "self_attn.q_norm",
    "self_attention.k_layernorm": "self_attn.k_norm",
    "pre_mlp_layernorm": "post_attention_layernorm",
    "mlp.linear_fc1": ("mlp.gate_proj", "mlp.up_proj"),
    "mlp.linear_fc2": "mlp.down_proj",
}


def _like_llama(
    name: str,
    model_type: str,
    *,
    default_groups: int | None,
    default_head_dim: int | None = None,
    choices: tuple[Choice, ...] = (),
    **others: Any,
) -> Family:
    return Family(
        name=name,
        model_type=model_type,
        architecture=f"{name}ForCausalLM",
        scorer=f"{name}ForSequenceClassification",
        numbers=(
            *_NUMBERS,
            Number("intermediate_size", "inner_width"),
            Number("num_key_value_heads", "query_groups", default_groups),
            Number("head_dim", "head_width", default_head_dim),
        ),
        choices=(
            _activation("hidden_act", "silu"),
            _flag("tie_word_embeddings", "is_tied", False),
            *choices,
        ),
        epsilon=("rms_norm_eps", 1e-6),
        rotary=_ROTARY,
        trunk="model.",
        layers="layers.",
        tensors=_LLAMA_TENSORS,
        constants=_INVERSES,
        **others,
    )


_BARE = Form(norm="rms", is_gated=True, bias="none")
LLAMA = _like_llama(
    "Llama",
    "llama",
    default_groups=None,
    choices=(
        Choice(
            ("attention_bias", "mlp_bias"),
            "bias",
            (
                ((False, False), "none"),
                ((True, True), "all"),
                ((True, False), "attention"),
                ((False, True), "mlp"),
            ),
            (False, False),
        ),
    ),
    form=_BARE,
    splits_hidden=True,  # LlamaConfig.validate_architecture
)
MISTRAL = _like_llama("Mistral", "mistral", default_groups=8, form=_BARE, window="all")
QWEN2 = _like_llama(
    "Qwen2",
    "qwen2",
    default_groups=32,
    form=Form(norm="rms", is_gated=True, bias="qkv"),
    window="by layer",
)
QWEN3 = _like_llama(
    "Qwen3",
    "qwen3",
    default_groups=32,
    default_head_dim=128,
    choices=(
        Choice(("attention_bias",), "bias", (((False,), "none"), ((True,), "attention")), (False,)),
    ),
    form=Form(norm="rms", is_gated=True, norms_heads=True),
    window="by layer",
)

FAMILIES = (GPT2, OPT, GPT_NEOX, LLAMA, MISTRAL, QWEN2, QWEN3)
"""All that convert, in the order in which an export tries them."""


def export_order(size: GPTSize) -> tuple[Family, ...]:
    """Return the families in the order in which an export tries them. What GPT-2 and OPT both have
    is GPT-2's, but with OPT's own activation OPT's: of public models no other has it."""
    return (OPT, *FAMILIES) if size.form.activation == "relu" else FAMILIES


# Why models of other types do not convert. Those that are not here are refused without a reason.
FOREIGN_TYPES = {
    "gptj": "its attention and MLP share one norm, and its rotations pair neighbouring dimensions",
    "gpt_neo": "its attention is not scaled, and its queries, keys and values have no bias",
    "codegen": "its attention and MLP share one norm",
    "openai-gpt": "its norms come after, and none at the end",
    "gpt_bigcode": "its one head of keys and values lies with learned positions",
    "bloom": "its positions are ALiBi's, and its embeddings have a norm",
    "mpt": "its positions are ALiBi's",
    "falcon": "its attention and MLP share one norm or have two, by version",
    "RefinedWeb": "it is Falcon's older form",
    "gemma": "its norms add 1 to their weights, and its embeddings are scaled",
    "gemma2": "its norms add 1 to their weights, and its logits are capped",
    "gemma3_text": "its norms add 1 to their weights, and its embeddings are scaled",
    "phi": "its attention and MLP share one norm, and its head has a bias",
    "phi3": "its queries, keys and values are one tensor, as are gate and up",
    "stablelm": "its gated MLP goes with layer norms",
    "starcoder2": "its layer norms go with rotations and query groups",
    "cohere": "its attention and MLP share one norm, and its logits are scaled",
    "olmo": "its norms have no weights",
    "olmo2": "its norms come after attention and MLP",
    "smollm3": "some of its layers have no positions",
    "mixtral": "its MLPs are mixtures of experts",
    "qwen2_moe": "its MLPs are mixtures of experts",
    "qwen3_moe": "its MLPs are mixtures of experts",
    "deepseek_v3": "its MLPs are mixtures of experts",
    "gpt_oss": "its MLPs are mixtures of experts",
    "llama4": "its MLPs are mixtures of experts",
    "t5": "it has an encoder",
    "bart": "it has an encoder",
    "bert": "it does not predict the next token",
}
