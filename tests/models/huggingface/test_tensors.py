import dataclasses

import pytest
import torch
from torch import Tensor

from models.form import Form
from models.huggingface.config import family_of_config, size_of_config
from models.huggingface.families import GPT2, GPT_NEOX, LLAMA, OPT, QWEN2, Family
from models.huggingface.tensors import (
    EMBEDDING,
    HEAD,
    canonical_name,
    from_shards,
    last_norm_bias,
    parameter_names,
    stored_tensors,
    to_shard,
)
from models.sizes import GPTSize
from tests.families import CONFIGS, VOCAB, build_family

QKV = "decoder.layers.1.self_attention.linear_qkv"
FC1 = "decoder.layers.1.mlp.linear_fc1.weight"


@pytest.fixture(scope="module", params=CONFIGS)
def model(request) -> tuple[Family, GPTSize, dict[str, Tensor]]:
    """A family's model: its table, its size and transformers' tensors, a tied head left out."""
    built = build_family(request.param)
    config = built.config.to_dict()
    family, size = family_of_config(config), size_of_config(config)
    state = {canonical_name(name, family): tensor for name, tensor in built.state_dict().items()}
    if size.form.is_tied:
        del state[f"{family.head[0]}.weight"]
    return family, size, state


def whole(name: str, model) -> list[Tensor]:
    family, size, state = model
    return [state[stored.name] for stored in stored_tensors(name, family, size)]


def shards(name: str, model, tp: int) -> list[Tensor]:
    family, size, _ = model
    return [
        to_shard(name, whole(name, model), family, size, tp=tp, tp_rank=rank) for rank in range(tp)
    ]


def test_names_and_shapes_are_those_of_transformers(model):
    family, size, state = model
    stored = [t for name in parameter_names(size) for t in stored_tensors(name, family, size)]
    assert {t.name: t.shape for t in stored} == {n: tuple(t.shape) for n, t in state.items()}
    assert len({t.name for t in stored}) == len(stored)


def test_a_scalar_network_has_the_same_trunk_and_one_row_of_scores(model):
    family, size, state = model
    stored = [
        t for name in parameter_names(size, "scalar") for t in stored_tensors(name, family, size)
    ]
    trunk = {n: tuple(t.shape) for n, t in state.items() if n != f"{family.head[0]}.weight"}
    assert {t.name: t.shape for t in stored} == trunk | {"score.weight": (1, size.embedding_dim)}
    assert canonical_name("module.score.weight", family) == "score.weight"


def test_the_last_norms_bias_is_the_one_behind_the_last_layer(model):
    family, size, state = model
    name = last_norm_bias(size)
    if size.form.norm == "rms":
        assert name is None
    else:
        assert name in set(parameter_names(size, "scalar"))
        assert ("layers.3." in name) == size.form.is_post_norm


def test_a_vocabulary_grows_by_rows_of_zeros_beyond_its_padding(model):
    family, size, state = model
    (shard,) = shards(EMBEDDING, model, tp=1)
    larger = dataclasses.replace(size, vocab_size=len(shard) + 1)
    (found,) = from_shards(EMBEDDING, [shard], family, larger).values()
    assert torch.equal(found[:-1], shard) and not found[-1].any()


@pytest.mark.parametrize("tp", [1, 2, 4])
def test_a_round_trip_is_exact(model, tp):
    family, size, state = model
    if size.num_kv_heads % tp:
        with pytest.raises(ValueError, match="2 groups of rows over 4 ranks"):
            shards(f"{QKV}.weight", model, tp)
        return
    out: dict[str, Tensor] = {}
    for name in parameter_names(size):
        out |= from_shards(name, shards(name, model, tp), family, size)
    assert out.keys() == state.keys()
    for name, tensor in state.items():
        first = 2 if name.endswith("embed_positions.weight") else 0  # OPT's two of padding
        assert torch.equal(out[name][first:], tensor[first:]), name
        assert out[name].is_contiguous() and out[name].shape == tensor.shape
        assert not out[name][:first].any()


def test_num_parameters_of_a_size_are_those_of_its_tensors(model):
    family, size, state = model
    spare = 2 * size.hidden_size if family is OPT else 0
    assert size.num_parameters == sum(tensor.numel() for tensor in state.values()) - spare


@pytest.mark.parametrize("tp", [1, 2])
def test_a_rank_projects_the_queries_of_its_heads_their_keys_and_their_values(model, tp):
    family, size, state = model
    x = torch.randn(5, size.hidden_size)
    dim, heads, kv = size.head_dim, size.num_heads, size.num_kv_heads
    has_bias = size.form.has_bias("qkv")
    for kind in ("weight", "bias") if has_bias else ("weight",):
        parts = [
            t.T if kind == "weight" and family is GPT2 else t for t in whole(f"{QKV}.{kind}", model)
        ]
        joined = torch.cat(parts)
        if family is GPT_NEOX:  # GPTNeoXAttention views [heads, 3, dim]
            joined = joined.unflatten(0, (heads, 3, dim)).transpose(0, 1).flatten(0, 2)
        theirs = joined.split([heads * dim, kv * dim, kv * dim])
        if kind == "weight":
            theirs = [(x @ part.T).unflatten(1, (-1, dim)) for part in theirs]
        else:
            theirs = [part.expand(5, -1).unflatten(1, (-1, dim)) for part in theirs]
        for rank, shard in enumerate(shards(f"{QKV}.{kind}", model, tp)):
            mixed = x @ shard.T if kind == "weight" else shard.expand(5, -1)
            # As megatron's get_query_key_value_tensors: [kv heads, its queries + 2, dim].
            mixed = mixed.unflatten(1, (kv // tp, heads // kv + 2, dim))
            mine = slice(rank * kv // tp, (rank + 1) * kv // tp)
            queries = theirs[0].unflatten(1, (kv, -1))
            torch.testing.assert_close(mixed[:, :, :-2], queries[:, mine])
            torch.testing.assert_close(mixed[:, :, -2], theirs[1][:, mine])
            torch.testing.assert_close(mixed[:, :, -1], theirs[2][:, mine])


def test_gates_and_what_they_let_through_alternate_in_every_shard(model):
    family, size, state = model
    if not size.form.is_gated:
        pytest.skip("not gated")
    gate, up = whole(FC1, model)
    for rank, shard in enumerate(shards(FC1, model, 2)):
        mine = slice(rank * size.ffn_size // 2, (rank + 1) * size.ffn_size // 2)
        assert torch.equal(shard[0::2], gate[mine]) and torch.equal(shard[1::2], up[mine])


def test_partial_sums_of_a_row_parallel_layer_add_up(model):
    family, size, state = model
    for name, width in (
        ("decoder.layers.0.mlp.linear_fc2.weight", size.ffn_size),
        ("decoder.layers.0.self_attention.linear_proj.weight", size.num_heads * size.head_dim),
    ):
        (weight,) = whole(name, model)
        x = torch.randn(5, width)
        parts = [
            piece @ shard.T
            for piece, shard in zip(x.chunk(2, 1), shards(name, model, 2), strict=True)
        ]
        expected = x @ (weight if family is GPT2 else weight.T)
        torch.testing.assert_close(sum(parts), expected)


def test_rows_beyond_the_vocabulary_are_zero(model):
    family, size, _ = model
    for name in (EMBEDDING, HEAD):  # a tied head is made of the embedding
        first, second = shards(name, model, 2)
        assert first.shape == second.shape == (384 // 2, size.embedding_dim)
        assert torch.equal(torch.cat([first, second])[:VOCAB], whole(name, model)[0])
        assert not second[VOCAB - 192 :].any()
    assert (stored_tensors(HEAD, family, size) == stored_tensors(EMBEDDING, family, size)) is (
        size.form.is_tied
    )


def test_ranks_beyond_the_vocabulary_hold_padding_alone():
    size = GPTSize(num_layers=1, hidden_size=8, num_heads=4, vocab_size=2, context_length=4)
    rows = torch.ones(2, 8)
    held = [to_shard(EMBEDDING, [rows], GPT2, size, tp=4, tp_rank=rank) for rank in range(4)]
    assert [int(shard.sum()) for shard in held] == [16, 0, 0, 0]
    assert {tuple(shard.shape) for shard in held} == {(32, 8)}


def test_a_shard_is_made_of_no_more_than_its_own_rows():
    """What a file maps is touched only where a rank needs it: rows of others may not be read."""
    size = GPTSize(
        num_layers=1,
        hidden_size=8,
        num_heads=4,
        vocab_size=256,
        context_length=4,
        form=Form(norm="rms", is_gated=True, bias="none", is_tied=False),
    )
    for name in parameter_names(size):
        if name.endswith("position_embeddings.weight"):
            continue
        parts = [torch.randn(*t.shape) for t in stored_tensors(name, LLAMA, size)]
        shard = to_shard(name, parts, LLAMA, size, tp=4, tp_rank=3)
        assert shard.numel() in (sum(p.numel() for p in parts) // 4, parts[0].numel()), name


@pytest.mark.parametrize(
    ("family", "stored", "name"),
    [
        (GPT2, "h.0.ln_1.bias", "transformer.h.0.ln_1.bias"),
        (GPT2, "transformer.wte.weight", "transformer.wte.weight"),
        (GPT2, "lm_head.weight", "lm_head.weight"),
        (GPT2, "h.11.attn.bias", None),
        (GPT2, "transformer.h.0.attn.masked_bias", None),
        (GPT2, "h.0.attn.c_attn.bias", "transformer.h.0.attn.c_attn.bias"),
        (GPT2, "_orig_mod.transformer.h.0.ln_1.bias", "transformer.h.0.ln_1.bias"),
        (GPT2, "module._orig_mod.h.0.ln_1.bias", "transformer.h.0.ln_1.bias"),
        (GPT2, "transformer.h.3._orig_mod.ln_1.bias", "transformer.h.3.ln_1.bias"),
        (GPT2, "pretrained_model.lm_head.weight", "lm_head.weight"),
        (OPT, "decoder.layers.0.fc1.bias", "model.decoder.layers.0.fc1.bias"),
        (OPT, "layers.0.fc1.bias", "model.decoder.layers.0.fc1.bias"),
        (OPT, "module.model.decoder.layers.0.fc1.bias", "model.decoder.layers.0.fc1.bias"),
        (OPT, "decoder.version", None),
        (GPT_NEOX, "gpt_neox.layers.0.attention.bias", None),
        (GPT_NEOX, "gpt_neox.layers.0.attention.rotary_emb.inv_freq", None),
        (GPT_NEOX, "layers.0.attention.dense.bias", "gpt_neox.layers.0.attention.dense.bias"),
        (GPT_NEOX, "lm_head.weight", "embed_out.weight"),
        (GPT_NEOX, "embed_out.weight", "embed_out.weight"),
        (LLAMA, "model.layers.0.self_attn.rotary_emb.inv_freq", None),
        (LLAMA, "rotary_emb.inv_freq", None),
        (QWEN2, "layers.0.self_attn.q_proj.bias", "model.layers.0.self_attn.q_proj.bias"),
    ],
)
def test_stored_names_with_and_without_prefixes_masks_and_wrappers(family, stored, name):
    assert canonical_name(stored, family) == name


def test_a_parameter_that_a_form_lacks_is_refused():
    size = GPTSize(num_layers=1, hidden_size=8, num_heads=2, vocab_size=8, context_length=4)
    without_bias = dataclasses.replace(size, form=Form(bias="none"))
    for name, family, of in (
        ("scalar_head.bias", GPT2, size),
        ("decoder.layers.0.mlp.linear_fc2.bias", GPT2, without_bias),
        ("decoder.layers.0.self_attention.q_layernorm.weight", GPT2, size),
        ("embedding.position_embeddings.weight", LLAMA, size),
        ("embedding.project_in.weight", OPT, size),
        ("project_out.weight", GPT2, dataclasses.replace(size, embedding_width=4)),
    ):
        with pytest.raises(ValueError, match=name.rsplit(".", 1)[0].rsplit(".", 1)[-1]):
            stored_tensors(name, family, of)
