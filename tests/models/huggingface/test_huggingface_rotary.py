import dataclasses

import pytest
from transformers import AutoConfig

from models.form import Rotary, RotaryScaling
from models.huggingface.families import GPT_NEOX, LLAMA
from models.huggingface.rotary import config_of_rotary, rotary_of_config

LLAMA3 = {
    "rope_type": "llama3",
    "factor": 8.0,
    "low_freq_factor": 1.0,
    "high_freq_factor": 4.0,
    "original_max_position_embeddings": 8192,
}
SCALED = {
    "linear": ({"type": "linear", "factor": 2}, RotaryScaling(kind="linear", factor=2.0)),
    "llama3": (LLAMA3, RotaryScaling(kind="llama3", factor=8.0, original_context=8192)),
    "yarn": (
        {"rope_type": "yarn", "factor": 4.0, "original_max_position_embeddings": 32768},
        RotaryScaling(
            kind="yarn",
            factor=4.0,
            original_context=32768,
            low=1.0,
            high=32.0,
            attention_factor=1.1386294361119891,  # 0.1 ln 4 + 1
        ),
    ),
    "yarn with all": (
        {
            **{"type": "yarn", "factor": 40, "beta_fast": 16, "beta_slow": 2},
            **{"mscale": 1.0, "mscale_all_dim": 0.5},
        },
        RotaryScaling(
            kind="yarn",
            factor=40.0,
            original_context=65536,
            low=2.0,
            high=16.0,
            attention_factor=1.1557215,  # (0.1 ln 40 + 1) / (0.05 ln 40 + 1)
        ),
    ),
}


def read(config: dict, family=LLAMA, head_dim: int = 64) -> Rotary:
    return rotary_of_config(config, family, head_dim=head_dim, context_length=65536)


@pytest.mark.parametrize("name", SCALED)
@pytest.mark.parametrize("spelling", ["of transformers 4", "of transformers 5"])
def test_a_scaling_is_read_in_both_spellings_and_goes_around(name, spelling):
    stored, scaling = SCALED[name]
    if spelling == "of transformers 4":
        config = {"rope_theta": 5e5, "rope_scaling": stored}
    else:
        config = {"rope_parameters": stored | {"rope_theta": 5e5}}
    found = read(config)
    assert found.scaling is not None
    factor = found.scaling.attention_factor
    assert factor == pytest.approx(scaling.attention_factor, rel=1e-6)
    same = dataclasses.replace(found.scaling, attention_factor=scaling.attention_factor)
    assert (found.base, found.fraction, same) == (5e5, 1.0, scaling)
    assert read(config_of_rotary(found, LLAMA)) == found


def test_a_plain_rotation_needs_no_field():
    for config in ({}, {"rope_scaling": None}, {"rope_parameters": {"rope_type": "default"}}):
        assert read(config) == Rotary()
    assert read({}, GPT_NEOX) == Rotary(fraction=0.25)


@pytest.mark.parametrize(
    "config",
    [
        {"rotary_pct": 0.5, "rotary_emb_base": 500},
        {"partial_rotary_factor": 0.5, "rope_theta": 500.0},
        {"rotary_pct": 0.5, "partial_rotary_factor": 0.5, "rotary_emb_base": 500},
        {"rope_parameters": {"partial_rotary_factor": 0.5, "rope_theta": 500}},
    ],
)
def test_neoxs_spellings_say_the_same(config):
    found = read(config | {"rotary_emb_base": 500}, GPT_NEOX)
    assert found == Rotary(base=500.0, fraction=0.5)
    assert read(config_of_rotary(found, GPT_NEOX), GPT_NEOX) == found


def test_transformers_reads_what_is_written():
    for _, scaling in SCALED.values():
        rotary = Rotary(base=5e5, scaling=scaling)
        config = AutoConfig.for_model(
            "llama", max_position_embeddings=65536, **config_of_rotary(rotary, LLAMA)
        )
        inner = config.rope_parameters
        assert (inner["rope_type"], inner["rope_theta"]) == (scaling.kind, 5e5)
        assert inner["factor"] == scaling.factor
        assert read(config.to_dict()) == rotary


@pytest.mark.parametrize(
    ("config", "said"),
    [
        (
            {"rope_scaling": {"type": "dynamic", "factor": 2.0}},
            "rope_type is 'dynamic'; default, li",
        ),
        ({"rope_parameters": {"rope_type": "longrope"}}, "rope_parameters.rope_type is 'longrope'"),
        ({"rope_scaling": {"type": "mrope"}}, "'mrope'"),
        ({"rope_scaling": {"type": ["yarn"]}}, "rope_type is"),
        ({"rope_scaling": {"type": "linear", "rope_type": "yarn"}}, "'yarn' and 'linear'"),
        ({"rope_scaling": [1]}, "no object"),
        ({"rope_scaling": {"type": "linear"}}, "rope_scaling.factor is None"),
        ({"rope_scaling": {"type": "linear", "factor": 0.5}}, "a number from 1"),
        ({"rope_scaling": LLAMA3 | {"low_freq_factor": 4.0}}, "low_freq_factor 4 is not below"),
        ({"rope_scaling": LLAMA3 | {"low_freq_factor": None}}, "low_freq_factor is None"),
        ({"rope_scaling": {"type": "yarn", "factor": 2.0, "truncate": False}}, "truncate is False"),
        ({"rope_scaling": LLAMA3, "rope_parameters": {"rope_type": "default"}}, "differ"),
        (
            {"rope_parameters": {"full_attention": {"rope_type": "default"}}},
            "all layers turn alike",
        ),
        ({"rope_theta": 1e4, "rope_parameters": {"rope_theta": 5e5}}, "which is it"),
        ({"rope_theta": 0}, "rope_theta is 0"),
        ({"rope_theta": True}, "rope_theta is True"),
        ({"partial_rotary_factor": 0.5}, "a Llama's heads turn whole"),
        ({"partial_rotary_factor": 1.5}, "a rotation of 1.5"),
    ],
)
def test_a_rotation_that_is_not_ours_is_named(config, said):
    with pytest.raises(ValueError, match=said):
        read(config)


def test_an_odd_number_of_turning_dimensions_is_refused():
    with pytest.raises(ValueError, match="of a head's 20 dimensions"):
        read({"rotary_pct": 0.25}, GPT_NEOX, head_dim=20)
