import dataclasses
import math

import pytest
import torch
import torch.nn.functional as F

from models.form import GPT3_FORM
from models.mlp import ACTIVATIONS, activate


def test_gelu_is_the_tanh_approximation():
    x = torch.linspace(-4, 4, 101)
    tanh = 0.5 * x * (1 + torch.tanh(math.sqrt(2 / math.pi) * (x + 0.044715 * x**3)))
    found = activate(x, GPT3_FORM)
    torch.testing.assert_close(found, tanh, rtol=1e-5, atol=1e-6)
    exact = F.gelu(x)
    assert (found - exact).abs().max() > 1e-4  # the two can be told apart


@pytest.mark.parametrize(
    ("name", "formula"),
    [
        ("gelu", lambda x: x * (1 + torch.erf(x / math.sqrt(2))) / 2),
        ("quick_gelu", lambda x: x / (1 + torch.exp(-1.702 * x))),
        ("relu", lambda x: x.clamp(min=0)),
        ("silu", lambda x: x / (1 + torch.exp(-x))),
    ],
)
def test_activations_are_what_they_are_called(name, formula):
    x = torch.linspace(-6, 6, 301, dtype=torch.float64)
    torch.testing.assert_close(ACTIVATIONS[name](x), formula(x))


def test_columns_of_a_gated_one_alternate():
    form = dataclasses.replace(GPT3_FORM, activation="silu", is_gated=True)
    gate, through = torch.randn(2, 5, 7).unbind()
    x = torch.stack([gate, through], -1).flatten(-2)
    torch.testing.assert_close(activate(x, form), F.silu(gate) * through)
    # A rank's share of the columns is whole pairs.
    torch.testing.assert_close(activate(x[:, 4:10], form), F.silu(gate[:, 2:5]) * through[:, 2:5])
