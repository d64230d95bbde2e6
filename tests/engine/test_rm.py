import dataclasses
import json
import math
from pathlib import Path

import numpy as np
import pytest
import torch

from engine.checkpoints.weights import load_weights
from engine.data.comparisons import comparison_examples, read_comparisons
from engine.data.demonstrations import demonstration_examples, read_demonstrations
from engine.data.tokenizer import load_tokenizer
from engine.feed import pack_for
from engine.ranks.parallel import Parallel
from engine.ranks.start import start_parallel
from engine.rm import shift_bias
from engine.settings.adam import AdamConfig
from engine.settings.layout import ParallelLayout
from engine.settings.numerics import Numerics
from engine.training.network import Network, build_network
from engine.training.optimizer import Optimizer
from engine.training.passes import forward
from tests.tiny import (
    EVERY_STEP,
    SIZE,
    random_network,
    rm_config,
    rows_of,
    train,
    train_until,
    weights_of,
)


@pytest.fixture
def parallel() -> Parallel:
    return start_parallel(ParallelLayout(), seed=0)


def scores_of_demonstrations(network: Network, files: Path, count: int) -> torch.Tensor:
    records, _ = read_demonstrations(files / "demonstrations.jsonl")
    tokenizer = load_tokenizer(files / "tokenizer.json")
    units, _ = demonstration_examples(records[:count], tokenizer, max_length=64)
    (batch,) = pack_for(units[:count], network.parallel, 10_000)
    (readings,) = forward(network, [batch])
    return readings[batch.cu_seqlens[1:].long() - 1]


def test_demonstrations_score_zero_on_average(tiny: Path, tmp_path: Path, parallel: Parallel):
    train(rm_config(tiny, tmp_path))
    network = build_network("scalar", SIZE, parallel, numerics=Numerics())
    load_weights(network, tmp_path, role="reward_model")
    scores = scores_of_demonstrations(network, tiny, 10)  # as many as the config says
    assert scores.mean().item() == pytest.approx(0.0, abs=1e-5)
    assert scores.std() > 0.1
    assert scores_of_demonstrations(network, tiny, 30).mean().abs() > 1e-4
    shift = rows_of(tmp_path)[-1]["train/bias_shift"]
    assert network.modules[0].scalar_head.bias.item() == pytest.approx(shift, abs=1e-2)
    assert abs(shift) > 0.1


@pytest.mark.parametrize("dtype", ["fp32", "bf16", "fp16"])
@pytest.mark.parametrize("bias", [0.3, 11.0])
def test_shift_is_exact_and_moves_the_bias_alone(
    dtype: str, bias: float, tiny: Path, parallel: Parallel
):
    network = random_network("scalar", parallel, dtype=dtype)
    optimizer = Optimizer(network, AdamConfig(), total_steps=9)
    head = network.modules[0].scalar_head
    with torch.no_grad():
        head.bias.fill_(bias)
        for parameter, _, master in optimizer.owned_masters():
            if parameter.dtype is not torch.float32:
                master += 1e-6 * master.abs()  # what 16 bits do not hold
    before = [m.clone() for _, _, m in optimizer.owned_masters()]
    mean = scores_of_demonstrations(network, tiny, 10).double().mean().item()
    shift_bias(network, optimizer, -mean)
    after = scores_of_demonstrations(network, tiny, 10).double().mean().item()
    assert abs(after) < 2e-6  # a rounding of fp32 at 11
    for (parameter, _, master), kept in zip(optimizer.owned_masters(), before, strict=True):
        if parameter is head.bias:
            assert master.item() == head.bias.item() == pytest.approx(bias - mean, abs=1e-6)
        else:
            assert torch.equal(master, kept)


@pytest.mark.parametrize("dtype", ["bf16", "fp16"])
def test_16_bit_run_ends_with_demonstrations_at_zero(dtype: str, tiny: Path, tmp_path: Path):
    numerics = Numerics(dtype=dtype)
    train(rm_config(tiny, tmp_path, numerics=numerics))
    parallel = start_parallel(ParallelLayout(), seed=0)
    network = build_network("scalar", SIZE, parallel, numerics=numerics)
    load_weights(network, tmp_path, role="reward_model")
    assert scores_of_demonstrations(network, tiny, 10).mean().item() == pytest.approx(0, abs=1e-6)


def test_scores_that_are_not_finite_are_not_shifted_to_zero(parallel: Parallel):
    network = random_network("scalar", parallel)
    with pytest.raises(FloatingPointError, match="demonstrations score nan"):
        shift_bias(network, Optimizer(network, AdamConfig(), total_steps=9), math.nan)


def test_without_demonstrations_nothing_is_shifted(tiny: Path, tmp_path: Path):
    config = rm_config(tiny, tmp_path, epochs=0.2)
    train(dataclasses.replace(config, data=dataclasses.replace(config.data, demonstrations=None)))
    assert "train/bias_shift" not in rows_of(tmp_path)[-1]
    assert abs(weights_of(tmp_path, "reward_model")["scalar_head.bias"].item()) < 0.01


def test_training_ranks_its_own_comparisons(tiny: Path, tmp_path: Path):
    config = rm_config(tiny, tmp_path, epochs=12.0)
    data = dataclasses.replace(config.data, valid=tiny / "comparisons.jsonl")
    train(dataclasses.replace(config, data=data))
    rows = rows_of(tmp_path)
    assert rows[-1]["valid/pair_accuracy"] > rows[0]["train/pair_accuracy"] + 0.1
    assert rows[-1]["valid/loss"] < rows[0]["train/loss"]
    assert 0.0 < rows[-1]["train/score_std"] < 10.0


def test_run_takes_its_epochs_of_prompts(tiny: Path, tmp_path: Path):
    train(rm_config(tiny, tmp_path, epochs=2.0, eval_every=3))
    rows = rows_of(tmp_path)
    num_prompts = round(6 / rows[0]["train/epoch"])
    assert 12 <= num_prompts < 24  # the others are held out
    assert len(rows) == int(np.ceil(2.0 * num_prompts / 6))
    assert "valid/loss" in rows[2] and "valid/loss" not in rows[1]
    assert "valid/pair_accuracy" in rows[-1]


def test_more_prompts_a_step_than_there_are_takes_all(tiny: Path, tmp_path: Path):
    train(rm_config(tiny, tmp_path, batch_size=1000))
    (row,) = rows_of(tmp_path)
    assert row["train/epoch"] == 1.0


def test_trunk_starts_as_the_policys(tiny: Path, tmp_path: Path):
    train(rm_config(tiny, tmp_path, epochs=0.2, adam=AdamConfig(lr=1e-12)))
    start, end = weights_of(tiny / "policy", "policy"), weights_of(tmp_path, "reward_model")
    for name, weight in start.items():
        torch.testing.assert_close(end[name], weight)


@pytest.mark.parametrize("share_prompts", [True, False])
def test_run_says_how_many_tokens_shared_prompts_spare(
    share_prompts: bool, tiny: Path, tmp_path: Path, capsys: pytest.CaptureFixture[str]
):
    data = dataclasses.replace(rm_config(tiny, tmp_path).data, valid=tiny / "comparisons.jsonl")
    config = rm_config(
        tiny, tmp_path, data=data, batch_size=24, micro_batch_tokens=10_000,
        share_prompts=share_prompts,
    )  # fmt: skip
    train(config)
    (row,) = rows_of(tmp_path)
    said = " ".join(capsys.readouterr().out.split())
    records, _ = read_comparisons(tiny / "comparisons.jsonl")
    tokenizer = load_tokenizer(tiny / "tokenizer.json")
    units, _ = comparison_examples(records, tokenizer, max_length=64)
    whole = sum(len(each.tokens) for unit in units for each in unit)
    shared = whole - sum(each.prompt_length for unit in units for each in unit[1:])
    if share_prompts:
        share = f"{1 - shared / whole:.0%}"
        assert f"{shared} tokens an epoch instead of {whole}, {share} fewer" in said
    else:
        assert f"each completion has its own prompt: {whole} tokens an epoch" in said
    assert row["train/tokens"] == (shared if share_prompts else whole)


def test_run_of_before_shared_prompts_goes_on_by_the_same_command(tiny: Path, tmp_path: Path):
    old = rm_config(tiny, tmp_path, saving=EVERY_STEP, share_prompts=False)
    train_until(old, 1)
    path = tmp_path / "config.json"
    saved = json.loads(path.read_text())
    del saved["share_prompts"]
    path.write_text(json.dumps(saved))
    train(dataclasses.replace(old, share_prompts=True))
    assert "train/bias_shift" in rows_of(tmp_path)[-1]  # it came to its end
