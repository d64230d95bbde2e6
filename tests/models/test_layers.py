import itertools
import math
from typing import Any

import pytest
import torch
from megatron.core.fusions.fused_bias_dropout import get_bias_dropout_add

from engine.ranks.start import start_parallel
from engine.settings.layout import ParallelLayout
from models.layers import Arithmetic, Degrees, LayerNorm, transformer_config
from models.sizes import GPTSize
from tests.gpu_choices import choices_of_a_gpu

SIZE = GPTSize(num_layers=4, hidden_size=16, num_heads=2, vocab_size=50, context_length=32)
ALONE = Degrees()


def config_of(degrees: Degrees = ALONE, *, dropout: float = 0.0, **arithmetic: Any):
    start_parallel(ParallelLayout(), seed=1)
    return transformer_config(SIZE, degrees, Arithmetic(**arithmetic), dropout=dropout)


def test_dropout_is_on_the_residual_branches_only():
    config = config_of(dropout=0.2)
    assert (config.hidden_dropout, config.attention_dropout) == (0.2, 0.0)


@pytest.mark.parametrize(
    ("recompute", "granularity"), [("none", None), ("selective", "selective"), ("full", "full")]
)
def test_recomputation_is_passed_on(recompute: str, granularity: str | None):
    assert config_of(recompute=recompute).recompute_granularity == granularity


@pytest.mark.parametrize("fuses", [False, True])
def test_messages_of_a_pipeline_go_one_by_one_whatever_else_is_chosen(fuses: bool):
    fusions = {"fuses_elementwise": fuses, "fuses_gradient_accumulation": fuses}
    assert not config_of(Degrees(pp=2, virtual_pp=2), **fusions).batch_p2p_comm


def add_in_every_way(*, training: bool) -> None:
    """Use megatron's bias + dropout + addition as networks of several widths do."""
    add = get_bias_dropout_add(training, fused=True)
    for width, length, trains in itertools.product((16, 24), (5, 7), (False, True)):
        residual = torch.ones(length, 1, width, requires_grad=trains)
        bias = torch.ones(width, requires_grad=trains)
        for mode in (torch.enable_grad, torch.no_grad, torch.inference_mode):
            with mode():
                out = add((residual + 1, bias), residual, 0.0)
            torch.testing.assert_close(out, torch.full_like(out, 4.0))


@pytest.mark.parametrize("training", [False, True])
def test_all_variants_of_a_fused_operation_are_compiled(training: bool):
    torch._dynamo.reset()
    limit_of_torch = torch._dynamo.config.patch(recompile_limit=8)
    with limit_of_torch, choices_of_a_gpu():  # where one variant more than the limit is an error
        with pytest.raises(torch._dynamo.exc.FailOnRecompileLimitHit):
            add_in_every_way(training=training)
        config_of(fuses_elementwise=True)
        add_in_every_way(training=training)


def test_matrices_that_write_to_the_residual_start_smaller():
    config = config_of()
    weight = torch.empty(400, 400)
    config.init_method(weight)
    assert weight.std().item() == pytest.approx(0.02, rel=0.02)
    config.output_layer_init_method(weight)
    assert weight.std().item() == pytest.approx(0.02 / math.sqrt(2 * 4), rel=0.02)


def test_layer_norm_is_torchs_and_tells_of_sequence_parallel():
    config = config_of()
    norm = LayerNorm(config, 16)
    x = 3 * torch.randn(5, 1, 16) + 1
    plain = (x - x.mean(-1, keepdim=True)) / (x.var(-1, keepdim=True, unbiased=False) + 1e-5).sqrt()
    torch.testing.assert_close(norm(x), plain)
    assert not any(p.sequence_parallel for p in norm.parameters())
    config.sequence_parallel = True
    assert all(p.sequence_parallel for p in LayerNorm(config, 16).parameters())
