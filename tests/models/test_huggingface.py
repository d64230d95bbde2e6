import dataclasses

import pytest
import torch
from hypothesis import given
from hypothesis import strategies as st
from transformers import GPT2Config, GPT2LMHeadModel

from models.huggingface import (
    TIED_HEAD,
    canonical_name,
    config_of_size,
    from_shards,
    huggingface_name,
    size_of_config,
    tensor_shapes,
    to_shard,
)
from models.sizes import GPTSize
from tests.fuzzing import fuzzed

SIZE = GPTSize(num_layers=2, hidden_size=32, num_heads=4, vocab_size=300, context_length=16)
QKV = "decoder.layers.1.self_attention.linear_qkv"
OURS = [
    "embedding.word_embeddings.weight",
    "embedding.position_embeddings.weight",
    "decoder.final_layernorm.weight",
    "decoder.final_layernorm.bias",
    *(
        f"decoder.layers.{layer}.{module}.{kind}"
        for layer in range(2)
        for module in (
            "input_layernorm",
            "self_attention.linear_qkv",
            "self_attention.linear_proj",
            "pre_mlp_layernorm",
            "mlp.linear_fc1",
            "mlp.linear_fc2",
        )
        for kind in ("weight", "bias")
    ),
]


def gpt2_config(**changes) -> GPT2Config:
    shape = {"n_layer": 2, "n_embd": 32, "n_head": 4, "vocab_size": 300, "n_positions": 16}
    return GPT2Config(**shape, bos_token_id=0, eos_token_id=0, **changes)


@pytest.fixture(scope="module")
def theirs() -> dict[str, torch.Tensor]:
    torch.manual_seed(0)
    state = GPT2LMHeadModel(gpt2_config()).state_dict()
    return {name: torch.randn_like(tensor) for name, tensor in state.items() if name != TIED_HEAD}


def test_tensor_shapes_are_those_of_transformers(theirs):
    expected = {name: tuple(tensor.shape) for name, tensor in theirs.items()}
    assert dict(tensor_shapes(SIZE)) == expected


def test_our_names_cover_theirs(theirs):
    assert sorted(map(huggingface_name, OURS)) == sorted(theirs)
    assert huggingface_name("output_layer.weight") == "transformer.wte.weight"


def test_a_foreign_parameter_is_refused():
    with pytest.raises(ValueError, match="scalar_head.weight"):
        huggingface_name("scalar_head.weight")


@pytest.mark.parametrize("tp", [1, 2, 4])
def test_round_trip_is_exact(theirs, tp):
    for name in OURS:
        tensor = theirs[huggingface_name(name)]
        shards = [to_shard(name, tensor, SIZE, tp=tp, tp_rank=rank) for rank in range(tp)]
        assert torch.equal(from_shards(name, shards, SIZE), tensor), name


@pytest.mark.parametrize("tp", [1, 2])
def test_projections_of_a_rank_are_those_of_its_heads(theirs, tp):
    x = torch.randn(5, 32)
    weight = theirs["transformer.h.1.attn.c_attn.weight"]
    bias = theirs["transformer.h.1.attn.c_attn.bias"]
    # As in GPT2Attention: Conv1D, split into query, key and value, each of them into heads.
    whole = [part.unflatten(1, (4, 8)) for part in (x @ weight + bias).split(32, dim=1)]
    for rank in range(tp):
        our_weight = to_shard(f"{QKV}.weight", weight, SIZE, tp=tp, tp_rank=rank)
        our_bias = to_shard(f"{QKV}.bias", bias, SIZE, tp=tp, tp_rank=rank)
        # As in megatron's get_query_key_value_tensors: heads first, then query, key and value.
        mixed = torch.nn.functional.linear(x, our_weight, our_bias).unflatten(1, (4 // tp, 3 * 8))
        heads = slice(rank * 4 // tp, (rank + 1) * 4 // tp)
        for ours, part in zip(mixed.split(8, dim=2), whole, strict=True):
            torch.testing.assert_close(ours, part[:, heads])


def test_partial_sums_of_a_row_parallel_layer_add_up(theirs):
    name = "decoder.layers.0.mlp.linear_fc2.weight"
    weight = theirs["transformer.h.0.mlp.c_proj.weight"]  # [in, out]
    x = torch.randn(5, 128)
    parts = [
        x[:, rank * 64 : (rank + 1) * 64] @ to_shard(name, weight, SIZE, tp=2, tp_rank=rank).T
        for rank in range(2)
    ]
    torch.testing.assert_close(sum(parts), x @ weight)


def test_rows_beyond_the_vocabulary_are_zero(theirs):
    name = "embedding.word_embeddings.weight"
    embedding = theirs["transformer.wte.weight"]
    first, second = (to_shard(name, embedding, SIZE, tp=2, tp_rank=rank) for rank in range(2))
    assert first.shape == second.shape == (384 // 2, 32)
    assert torch.equal(torch.cat([first, second])[:300], embedding)
    assert not second[300 - 192 :].any()


def test_stored_names_with_and_without_prefix_and_masks():
    assert canonical_name("h.0.ln_1.bias") == "transformer.h.0.ln_1.bias"
    assert canonical_name("transformer.wte.weight") == "transformer.wte.weight"
    assert canonical_name(TIED_HEAD) == TIED_HEAD
    assert canonical_name("h.11.attn.bias") is None
    assert canonical_name("transformer.h.0.attn.masked_bias") is None
    assert canonical_name("h.0.attn.c_attn.bias") == "transformer.h.0.attn.c_attn.bias"


def test_config_round_trip():
    assert size_of_config(gpt2_config().to_dict()) == SIZE
    config = config_of_size(SIZE, dtype=torch.bfloat16, eos_id=7)
    assert size_of_config(config) == SIZE
    read = GPT2Config.from_dict(config)
    assert (read.dtype, read.eos_token_id, read.n_inner) == (torch.bfloat16, 7, None)


@pytest.mark.parametrize(
    ("field", "value"),
    [
        ("model_type", "opt"),
        ("n_layer", "2"),
        ("n_layer", None),
        ("vocab_size", 0),
        ("n_inner", 96),
        ("activation_function", "gelu"),
        ("layer_norm_epsilon", 1e-6),
        ("scale_attn_weights", False),
        ("scale_attn_by_inverse_layer_idx", True),
        ("add_cross_attention", True),
        ("tie_word_embeddings", False),
    ],
)
def test_a_model_that_computes_something_else_is_named_by_its_field(field, value):
    config = gpt2_config().to_dict() | {field: value}
    with pytest.raises(ValueError, match=f"{field} is {value!r}"):
        size_of_config(config)


def test_the_same_function_under_another_name_is_accepted():
    config = gpt2_config().to_dict()
    same = {"activation_function": "gelu_pytorch_tanh", "n_inner": 128, "resid_pdrop": 0.0}
    assert size_of_config(config | same) == SIZE
    assert size_of_config(config | {"n_positions": 2048}) == dataclasses.replace(
        SIZE, context_length=2048
    )


CONFIG = config_of_size(SIZE, dtype=torch.float32, eos_id=0)
ODD = [
    *(0, -1, 1.0, 1e308, float("nan"), 10**9, 1 << 24 | 1, 10**4000, "32", "x" * 10**6, ""),
    *(True, None, [], [32], {"a": 32}),
]


@pytest.mark.parametrize("field", ["n_layer", "n_embd", "n_head", "vocab_size", "n_positions"])
@pytest.mark.parametrize("value", ODD, ids=range(len(ODD)))
def test_a_size_that_is_none_is_named_before_anything_is_built(field, value):
    with pytest.raises(ValueError, match=f"{field} is .* a whole number from 1 to 16777216") as e:
        size_of_config(CONFIG | {field: value})
    assert len(str(e.value)) < 200


@pytest.mark.parametrize("field", ["n_inner", "layer_norm_epsilon", "activation_function"])
def test_a_value_of_a_megabyte_is_cut(field):
    with pytest.raises(ValueError, match=field) as caught:
        size_of_config(CONFIG | {field: "x" * 10**6})
    assert len(str(caught.value)) < 200


@pytest.mark.fuzz
@fuzzed
@given(
    changes=st.dictionaries(
        st.sampled_from([*CONFIG, "auto_map", "n_inner", "quantization_config"]),
        st.none()
        | st.booleans()
        | st.integers()
        | st.floats()
        | st.text(max_size=9)
        | st.lists(st.integers(), max_size=2)
        | st.dictionaries(st.text(max_size=3), st.integers(), max_size=2)
        | st.sampled_from(list(CONFIG.values())),
        max_size=4,
    ),
    dropped=st.none() | st.sampled_from([*CONFIG]),
)
def test_any_config_is_a_size_or_a_value_error(changes, dropped):
    config = {name: value for name, value in (CONFIG | changes).items() if name != dropped}
    try:
        size = size_of_config(config)
    except ValueError as error:
        assert len(str(error)) < 2000 and len(str(error).splitlines()) == 1
        return
    assert (size.num_layers, size.hidden_size) == (config["n_layer"], config["n_embd"])
    assert size.num_parameters < 1 << 80
