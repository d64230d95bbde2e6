import math

import pytest
import torch
from transformers import LlamaConfig
from transformers.modeling_rope_utils import ROPE_INIT_FUNCTIONS
from transformers.models.gpt_neox.modeling_gpt_neox import apply_rotary_pos_emb

from models.form import Rotary, RotaryScaling
from models.rotary import rotation_at

SCALINGS = {
    "linear": RotaryScaling(kind="linear", factor=2.0),
    "llama3": RotaryScaling(kind="llama3", factor=8.0, original_context=16),
    "yarn": RotaryScaling(
        kind="yarn",
        factor=4.0,
        original_context=16,
        low=1.0,
        high=32.0,
        attention_factor=0.1 * math.log(4.0) + 1.0,
    ),
}
THEIRS = {
    "linear": {"factor": 2.0},
    "llama3": {"factor": 8.0, "low_freq_factor": 1.0, "high_freq_factor": 4.0},
    "yarn": {"factor": 4.0},
}


@pytest.mark.parametrize("fraction", [1.0, 0.25])
def test_a_turn_is_that_of_complex_numbers(fraction: float):
    positions = torch.tensor([0, 1, 5, 900])
    x = torch.randn(4, 3, 16, dtype=torch.float64)
    rotary = Rotary(base=100.0, fraction=fraction)
    found, key = rotation_at(positions, rotary, 16, x.dtype).turn(x, x)
    assert torch.equal(key, found)
    half = int(16 * fraction) // 2
    frequencies = 100.0 ** (-torch.arange(half, dtype=torch.float64) / half)
    turns = torch.polar(torch.ones(4, half).double(), positions[:, None] * frequencies)
    expected = torch.complex(x[..., :half], x[..., half : 2 * half]) * turns[:, None]
    torch.testing.assert_close(found[..., :half], expected.real, rtol=0, atol=1e-4)
    torch.testing.assert_close(found[..., half : 2 * half], expected.imag, rtol=0, atol=1e-4)
    assert torch.equal(found[..., 2 * half :], x[..., 2 * half :])
    assert torch.equal(found[0], x[0])


@pytest.mark.parametrize("kind", SCALINGS)
def test_scaled_frequencies_are_those_of_transformers(kind: str):
    config = LlamaConfig(
        hidden_size=64,
        num_attention_heads=2,
        max_position_embeddings=64,
        rope_parameters={
            "rope_type": kind,
            "rope_theta": 1000.0,
            "original_max_position_embeddings": 16,
            **THEIRS[kind],
        },
    )
    frequencies, factor = ROPE_INIT_FUNCTIONS[kind](config, torch.device("cpu"))
    positions = torch.arange(40)
    angles = positions[:, None].float() * frequencies
    query = torch.randn(40, 2, 32)
    cosines, sines = (
        torch.cat([f(angles), f(angles)], -1)[None] * factor for f in (torch.cos, torch.sin)
    )
    expected, _ = apply_rotary_pos_emb(
        query.transpose(0, 1)[None], query.transpose(0, 1)[None], cosines, sines
    )
    rotary = Rotary(base=1000.0, scaling=SCALINGS[kind])
    found, _ = rotation_at(positions, rotary, 32).turn(query, query)
    torch.testing.assert_close(found, expected[0].transpose(0, 1), rtol=1e-5, atol=1e-5)


def test_frequencies_made_while_sampling_serve_training():
    with torch.inference_mode():
        rotation_at(torch.arange(3), Rotary(base=77.0), 8)
    x = torch.randn(3, 2, 8, requires_grad=True)
    query, _ = rotation_at(torch.arange(3), Rotary(base=77.0), 8).turn(x, x)
    query.square().sum().backward()
    torch.testing.assert_close(x.grad, 2 * x)  # a turn changes no length
