import dataclasses

import pytest
from hypothesis import given
from hypothesis import strategies as st
from transformers import CONFIG_MAPPING, AutoConfig

from models.form import Form, Rotary
from models.huggingface.config import (
    config_of_scorer,
    config_of_size,
    family_of_config,
    family_of_size,
    score_bias_of_config,
    size_of_config,
)
from models.huggingface.families import FAMILIES, FOREIGN_TYPES, GPT2, MISTRAL, OPT, QWEN2
from models.sizes import SIZES, GPTSize
from tests.families import CONFIGS
from tests.fuzzing import fuzzed

# What transformers 4 wrote of public models, key for key, without tokens, dropout and dtype.
PUBLIC = {
    "gpt2-xl": (
        {
            "activation_function": "gelu_new",
            "architectures": ["GPT2LMHeadModel"],
            "layer_norm_epsilon": 1e-05,
            "model_type": "gpt2",
            **{"n_ctx": 1024, "n_embd": 1600, "n_head": 25, "n_layer": 48, "n_positions": 1024},
            "output_past": True,
            "summary_type": "cls_index",
            "vocab_size": 50257,
        },
        GPTSize(num_layers=48, hidden_size=1600, num_heads=25, context_length=1024),
    ),
    "Cerebras-GPT-13B": (
        {
            "activation_function": "gelu",
            "layer_norm_epsilon": 1e-05,
            "model_type": "gpt2",
            **{"n_embd": 5120, "n_head": 40, "n_inner": 20480, "n_layer": 40, "n_positions": 2048},
            "scale_attn_weights": True,
            "vocab_size": 50257,
        },
        dataclasses.replace(SIZES["13b"], form=Form(activation="gelu")),
    ),
    "opt-6.7b": (
        {
            "_remove_final_layer_norm": False,
            "activation_function": "relu",
            "do_layer_norm_before": True,
            "ffn_dim": 16384,
            "hidden_size": 4096,
            "max_position_embeddings": 2048,
            "model_type": "opt",
            **{"num_attention_heads": 32, "num_hidden_layers": 32},
            "vocab_size": 50272,
            "word_embed_proj_dim": 4096,
        },
        dataclasses.replace(SIZES["6b"], vocab_size=50272, form=Form(activation="relu")),
    ),
    "opt-350m": (
        {
            "_remove_final_layer_norm": False,
            "activation_function": "relu",
            "do_layer_norm_before": False,
            "ffn_dim": 4096,
            "hidden_size": 1024,
            "max_position_embeddings": 2048,
            "model_type": "opt",
            **{"num_attention_heads": 16, "num_hidden_layers": 24},
            "vocab_size": 50272,
            "word_embed_proj_dim": 512,
        },
        dataclasses.replace(
            SIZES["350m"],
            vocab_size=50272,
            embedding_width=512,
            form=Form(activation="relu", is_post_norm=True),
        ),
    ),
    "pythia-410m": (
        {
            "hidden_act": "gelu",
            "hidden_size": 1024,
            "intermediate_size": 4096,
            "layer_norm_eps": 1e-05,
            "max_position_embeddings": 2048,
            "model_type": "gpt_neox",
            **{"num_attention_heads": 16, "num_hidden_layers": 24},
            **{"rotary_emb_base": 10000, "rotary_pct": 0.25},
            "tie_word_embeddings": False,
            "use_parallel_residual": True,
            "vocab_size": 50304,
        },
        GPTSize(
            num_layers=24,
            hidden_size=1024,
            num_heads=16,
            vocab_size=50304,
            form=Form(
                activation="gelu", is_parallel=True, is_tied=False, rotary=Rotary(fraction=0.25)
            ),
        ),
    ),
    "Llama-2-7b": (
        {
            "hidden_act": "silu",
            "hidden_size": 4096,
            "intermediate_size": 11008,
            "max_position_embeddings": 4096,
            "model_type": "llama",
            **{"num_attention_heads": 32, "num_hidden_layers": 32, "num_key_value_heads": 32},
            "pretraining_tp": 1,
            "rms_norm_eps": 1e-05,
            "rope_scaling": None,
            "tie_word_embeddings": False,
            "vocab_size": 32000,
        },
        GPTSize(
            num_layers=32,
            hidden_size=4096,
            num_heads=32,
            vocab_size=32000,
            context_length=4096,
            inner_width=11008,
            form=Form(
                norm="rms",
                activation="silu",
                is_gated=True,
                bias="none",
                is_tied=False,
                rotary=Rotary(),
            ),
        ),
    ),
    "Qwen2.5-0.5B": (
        {
            "hidden_act": "silu",
            "hidden_size": 896,
            "intermediate_size": 4864,
            "max_position_embeddings": 32768,
            "max_window_layers": 24,
            "model_type": "qwen2",
            **{"num_attention_heads": 14, "num_hidden_layers": 24, "num_key_value_heads": 2},
            "rms_norm_eps": 1e-06,
            "rope_theta": 1000000.0,
            "sliding_window": 32768,
            "tie_word_embeddings": True,
            "use_mrope": False,
            "use_sliding_window": False,
            "vocab_size": 151936,
        },
        GPTSize(
            num_layers=24,
            hidden_size=896,
            num_heads=14,
            vocab_size=151936,
            context_length=32768,
            query_groups=2,
            inner_width=4864,
            form=Form(
                norm="rms",
                norm_epsilon=1e-6,
                activation="silu",
                is_gated=True,
                bias="qkv",
                rotary=Rotary(base=1e6),
            ),
        ),
    ),
    "Qwen3-0.6B": (
        {
            "attention_bias": False,
            "head_dim": 128,
            "hidden_act": "silu",
            "hidden_size": 1024,
            "intermediate_size": 3072,
            "max_position_embeddings": 40960,
            "max_window_layers": 28,
            "model_type": "qwen3",
            **{"num_attention_heads": 16, "num_hidden_layers": 28, "num_key_value_heads": 8},
            "rms_norm_eps": 1e-06,
            **{"rope_scaling": None, "rope_theta": 1000000},
            **{"sliding_window": None, "use_sliding_window": False},
            "tie_word_embeddings": True,
            "vocab_size": 151936,
        },
        GPTSize(
            num_layers=28,
            hidden_size=1024,
            num_heads=16,
            vocab_size=151936,
            context_length=40960,
            query_groups=8,
            head_width=128,
            inner_width=3072,
            form=Form(
                norm="rms",
                norm_epsilon=1e-6,
                norms_heads=True,
                activation="silu",
                is_gated=True,
                bias="none",
                rotary=Rotary(base=1e6),
            ),
        ),
    ),
}


@pytest.mark.parametrize("name", PUBLIC)
def test_a_public_model_is_read(name):
    config, size = PUBLIC[name]
    assert size_of_config(config) == size
    assert family_of_size(size).model_type == config["model_type"]


@pytest.mark.parametrize("name", CONFIGS)
def test_a_size_goes_through_config_json_and_transformers_and_comes_back(name):
    theirs = AutoConfig.for_model(**CONFIGS[name])
    size = size_of_config(theirs.to_dict())
    assert size_of_config(CONFIGS[name]) == size  # as transformers 4 has it
    config = config_of_size(size, dtype="bfloat16", eos_id=7)
    assert size_of_config(config) == size
    kind = config.pop("model_type")
    read = AutoConfig.for_model(kind, **config)
    assert (str(read.dtype).removeprefix("torch."), read.eos_token_id) == ("bfloat16", 7)
    assert size_of_config(read.to_dict()) == size


def test_models_without_a_difference_have_one_family():
    family = {name: family_of_size(size_of_config(CONFIGS[name])).model_type for name in CONFIGS}
    others = {name: kind for name, kind in family.items() if kind != CONFIGS[name]["model_type"]}
    assert others == {"mistral_without_window": "llama", "gpt2_relu": "opt"}


@pytest.mark.parametrize(
    "form",
    [
        Form(window=8),
        Form(rotary=Rotary(fraction=0.5), is_gated=True, norm="rms", bias="none"),
        Form(norm="rms"),
        Form(is_parallel=True),
        Form(norms_heads=True),
        Form(rotary=Rotary(), norm_epsilon=1e-6, scales_by_layer=True),
    ],
)
def test_a_size_of_no_family_is_an_error_that_says_its_form(form):
    size = dataclasses.replace(SIZES["tiny"], form=form)
    with pytest.raises(ValueError, match="no family of Hugging Face's has all of this"):
        family_of_size(size)


def test_llama_splits_its_width_by_heads_and_mistral_need_not():
    config = CONFIGS["llama"] | {"hidden_size": 72, "num_attention_heads": 5, "head_dim": 16}
    config |= {"num_key_value_heads": 5}
    with pytest.raises(ValueError, match="hidden_size 72 must be a multiple"):
        size_of_config(config)
    size = size_of_config(config | {"model_type": "mistral", "sliding_window": None})
    assert family_of_size(size) is MISTRAL


@pytest.mark.parametrize(
    ("name", "changes", "said"),
    [
        ("gpt2", {"n_layer": "2"}, "n_layer is '2'"),
        ("gpt2", {"n_layer": None}, "n_layer is None"),
        ("gpt2", {"n_head": 7}, "hidden_size 64 must be a multiple of num_heads 7"),
        ("gpt2", {"n_inner": 0}, "n_inner is 0"),
        (
            "gpt2",
            {"activation_function": "tanh"},
            "activation_function is 'tanh'; what converts is",
        ),
        ("gpt2", {"activation_function": ["gelu"]}, "activation_function is"),
        ("gpt2", {"layer_norm_epsilon": 0}, "layer_norm_epsilon is 0"),
        ("gpt2", {"scale_attn_weights": False}, "scale_attn_weights is False; here every GPT-2"),
        ("gpt2", {"add_cross_attention": True}, "add_cross_attention is True"),
        ("gpt2", {"tie_word_embeddings": "no"}, "tie_word_embeddings is 'no'; what converts is"),
        ("opt", {"word_embed_proj_dim": 0}, "word_embed_proj_dim is 0"),
        ("opt", {"layer_norm_elementwise_affine": False}, "layer_norm_elementwise_affine is False"),
        ("opt", {"_remove_final_layer_norm": True}, "_remove_final_layer_norm is True"),
        ("opt", {"ffn_dim": None}, "ffn_dim is None"),
        ("pythia", {"attention_bias": None}, "attention_bias is None"),
        ("llama", {"mlp_bias": "yes"}, "mlp_bias is 'yes'"),
        ("llama", {"num_key_value_heads": 3}, "must be a multiple of query_groups 3"),
        ("llama", {"rope_scaling": {"type": "dynamic", "factor": 2}}, "rope_type is 'dynamic'"),
        ("llama", {"quantization_config": {"load_in_8bit": True}}, "without quantization"),
    ],
)
def test_a_model_that_computes_something_else_is_named_by_its_field(name, changes, said):
    with pytest.raises(ValueError, match=said) as caught:
        size_of_config(CONFIGS[name] | changes)
    assert len(str(caught.value)) < 300


def test_another_name_that_transformers_takes_is_one_and_a_disagreement_names_both():
    config = dict(CONFIGS["gpt2"])
    size = size_of_config(config)
    names = {"num_hidden_layers": "n_layer", "hidden_size": "n_embd"}
    names |= {"num_attention_heads": "n_head", "max_position_embeddings": "n_positions"}
    for alias, name in names.items():
        value = config[name]
        assert size_of_config(config | {alias: value}) == size
        alone = {key: value for key, value in config.items() if key != name} | {alias: value}
        assert size_of_config(alone) == size
        assert getattr(AutoConfig.for_model(**alone), name) == value
        with pytest.raises(ValueError, match=f"{name} is {value} and {alias}, another name .* 2:"):
            size_of_config(config | {alias: 2})
    assert size_of_config(config | {"n_ctx": 2}) == size  # which transformers does not read


@pytest.mark.parametrize("family", FAMILIES)
def test_the_aliases_of_a_family_are_those_of_transformers(family):
    theirs = CONFIG_MAPPING[family.model_type].attribute_map
    numbers = {number.theirs for number in family.numbers}
    assert family.aliases == {alias: n for alias, n in theirs.items() if n in numbers}


@pytest.mark.parametrize("kind", [*FOREIGN_TYPES, "unheard-of", None, 3, ["gpt2"]])
def test_another_type_is_refused_with_those_that_convert(kind):
    with pytest.raises(ValueError, match="only 'gpt2', 'opt', .*'qwen3' convert") as caught:
        family_of_config({"model_type": kind})
    assert FOREIGN_TYPES.get(kind if isinstance(kind, str) else "", "") in str(caught.value)


def test_one_function_under_several_names_is_one():
    for name in ("gelu_pytorch_tanh", "gelu_fast", "gelu_new"):
        config = CONFIGS["gpt2"] | {"activation_function": name, "n_inner": 256, "resid_pdrop": 0.0}
        assert size_of_config(config) == size_of_config(CONFIGS["gpt2"])


ODD = [
    *(0, -1, 1.0, 1e308, float("nan"), 10**9, 1 << 24 | 1, 10**4000, "32", "x" * 10**6, ""),
    *(True, [], [32], {"a": 32}),
]


@pytest.mark.parametrize("family", FAMILIES, ids=lambda family: family.model_type)
@pytest.mark.parametrize("value", ODD, ids=range(len(ODD)))
def test_a_size_that_is_none_is_named_before_anything_is_built(family, value):
    config = next(c for c in CONFIGS.values() if c["model_type"] == family.model_type)
    for number in family.numbers:
        with pytest.raises(ValueError, match=f"{number.theirs} is .* a whole number from") as e:
            size_of_config(config | {number.theirs: value})
        assert len(str(e.value)) < 200


@pytest.mark.fuzz
@fuzzed
@given(
    name=st.sampled_from([*CONFIGS]),
    changes=st.dictionaries(
        st.sampled_from(
            [
                *(key for config in CONFIGS.values() for key in config),
                *("auto_map", "quantization_config", "rope_parameters", "partial_rotary_factor"),
            ]
        ),
        st.none()
        | st.booleans()
        | st.integers()
        | st.floats()
        | st.text(max_size=9)
        | st.lists(st.integers(), max_size=2)
        | st.dictionaries(
            st.sampled_from(["rope_type", "type", "factor", "rope_theta", "mscale", "x"]),
            st.sampled_from(["linear", "yarn", "llama3", 2, 0.5, None, {}, []]),
            max_size=4,
        )
        | st.sampled_from([value for config in CONFIGS.values() for value in config.values()]),
        max_size=4,
    ),
    dropped=st.text(max_size=3) | st.sampled_from([key for c in CONFIGS.values() for key in c]),
)
def test_any_config_is_a_size_or_a_value_error(name, changes, dropped):
    config = {key: value for key, value in (CONFIGS[name] | changes).items() if key != dropped}
    try:
        size = size_of_config(config)
    except ValueError as error:
        assert len(str(error)) < 2000 and len(str(error).splitlines()) == 1
        return
    assert size.num_parameters < 1 << 90
    if size.num_layers < 100:
        written = config_of_size(size, dtype="float32", eos_id=0)
        assert size_of_config(written) == size


def test_what_gpt2_and_opt_share_is_gpt2s_but_for_opts_own_activation():
    assert family_of_size(SIZES["tiny"]) is GPT2
    relu = dataclasses.replace(SIZES["tiny"], form=Form(activation="relu"))
    assert family_of_size(relu) is OPT
    by_layer = Form(activation="relu", scales_by_layer=True)
    assert family_of_size(dataclasses.replace(SIZES["tiny"], form=by_layer)) is GPT2


def test_qwens_sliding_window_goes_around():
    size = size_of_config(CONFIGS["qwen2_windows"])
    assert (size.form.window, size.form.windowed_layers) == (5, "every second")
    assert family_of_size(size) is QWEN2


@pytest.mark.parametrize("name", CONFIGS)
def test_a_scorers_config_is_of_one_label_and_of_the_same_size(name):
    size = size_of_config(CONFIGS[name])
    language = config_of_size(size, dtype="float32", eos_id=0)
    config = config_of_scorer(language, size, pad_id=7, score_bias=0.25)
    assert size_of_config(config) == size and score_bias_of_config(config) == 0.25
    theirs = AutoConfig.for_model(**config)
    assert (theirs.num_labels, theirs.pad_token_id, theirs.score_bias) == (1, 7, 0.25)
    assert "score_bias" not in config_of_scorer(language, size, pad_id=7, score_bias=0.0)


@pytest.mark.parametrize(
    "value", [None, "1", True, [1.0], float("nan"), float("inf"), -1e39, 10**400]
)
def test_a_bias_that_is_no_number_of_fp32_is_named(value):
    with pytest.raises(ValueError, match="score_bias is .* and must be a finite number"):
        score_bias_of_config({"score_bias": value})
    assert score_bias_of_config({}) == 0.0
