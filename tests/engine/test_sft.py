import dataclasses
import math
from pathlib import Path

import numpy as np
import pytest
import torch

from engine.checkpoints.found import size_of
from engine.checkpoints.weights import load_weights
from engine.data.batches import EpochOrder, pack
from engine.data.demonstrations import demonstration_examples, read_demonstrations
from engine.data.examples import TRAINED, Example
from engine.data.renderer import Renderer
from engine.data.tokenizer import load_tokenizer
from engine.errors import UserError
from engine.feed import Feed
from engine.generation.generate import generate
from engine.huggingface.convert import convert
from engine.losses import NegativeLogLikelihood, mean_language_loss
from engine.ranks.parallel import Parallel
from engine.ranks.start import start_parallel
from engine.settings.adam import AdamConfig
from engine.settings.convert import ConvertConfig
from engine.settings.layout import ParallelLayout
from engine.settings.numerics import Numerics
from engine.settings.sampling import SamplingConfig
from engine.settings.sft import SFTConfig, SFTData
from engine.sft import _epoch_ended, _train_step
from engine.training.network import build_network
from engine.training.optimizer import Optimizer
from engine.training.passes import forward_backward
from models.attention import PackedSequences, attention_backend
from models.form import Form
from models.readouts import Logits
from tests.tiny import (
    EVERY_STEP,
    SIZE,
    random_network,
    rows_of,
    sft_config,
    train,
    train_until,
    weights_of,
    write_lines,
)


@pytest.fixture
def parallel() -> Parallel:
    return start_parallel(ParallelLayout(), seed=0)


def feed_of(parallel: Parallel, seed: int, prompt_length: int) -> Feed:
    draw = np.random.default_rng(seed)
    units = [
        Example(tokens=draw.integers(0, 100, n), prompt_length=prompt_length)
        for n in (5, 20, 9, 14)
    ]
    return Feed(units=units, batch_size=4, micro_batch_tokens=24, seed=0, parallel=parallel)


def test_step_is_on_the_weighted_sum_of_both_means(parallel: Parallel):
    feeds = {"loss": feed_of(parallel, 0, 4), "pretrain_loss": feed_of(parallel, 1, 1)}
    network = random_network("language", parallel)
    parameters = list(network.modules[0].parameters())
    adam = AdamConfig(lr=1e-9, clip_norm=1e9)
    optimizer = Optimizer(network, adam, total_steps=9)
    gradients = []
    for feed in feeds.values():
        optimizer.zero_gradients()
        batch = pack(list(feed.units), multiple_of=1)  # all four, in one micro-batch
        forward_backward(network, [batch], NegativeLogLikelihood(int(batch.mask.sum())))
        gradients.append(torch.cat([p.main_grad.flatten() for p in parameters]))
    values = _train_step(0, network, optimizer, feeds, 0.3)
    expected = 0.7 * gradients[0] + 0.3 * gradients[1]
    assert values["train/grad_norm"] == pytest.approx(expected.norm().item(), rel=1e-5)
    found = torch.cat([p.main_grad.flatten() for p in parameters])
    torch.testing.assert_close(found, expected, rtol=1e-4, atol=1e-5)
    for name, feed in feeds.items():
        alone = mean_language_loss(network, feed.units, 1000)
        assert values[f"train/{name}"] == pytest.approx(alone, rel=1e-5)
    assert values["train/tokens"] == 2 * 48


def test_step_on_one_source_takes_all_of_it(parallel: Parallel):
    norms = []
    for share in (0.0, 0.9):
        feeds = {"pretrain_loss": feed_of(parallel, 1, 1)}
        optimizer = Optimizer(random_network("language", parallel), AdamConfig(), total_steps=9)
        norms.append(_train_step(0, optimizer.network, optimizer, feeds, share)["train/grad_norm"])
    assert norms[0] == norms[1]


def test_run_takes_its_epochs_and_ends_with_a_held_out_loss(tiny: Path, tmp_path: Path):
    train(sft_config(tiny, tmp_path, epochs=0.8, eval_every=2))
    rows = rows_of(tmp_path)
    # Of 40 demonstrations a quarter is held out, of 8 sequences a quarter is pretraining text.
    num_kept = round(6 / rows[0]["train/epoch"])
    assert len(rows) == int(np.ceil(0.8 * num_kept / 6))
    assert [("valid/loss" in row) for row in rows] == [
        (step % 2 == 0) or step == len(rows) for step in range(1, len(rows) + 1)
    ]
    assert rows[-1]["train/loss"] < rows[0]["train/loss"]
    rates = [row["train/lr"] for row in rows]
    assert rates[0] == 1e-3
    assert rates == sorted(rates, reverse=True)


def test_held_out_loss_is_of_the_weights_that_are_saved(
    tiny: Path, tmp_path: Path, parallel: Parallel
):
    config = sft_config(tiny, tmp_path / "run")
    data = dataclasses.replace(config.data, valid=tiny / "demonstrations.jsonl")
    train(dataclasses.replace(config, data=data, dropout=0.3))
    network = build_network("language", SIZE, parallel, numerics=Numerics())
    load_weights(network, tmp_path / "run", role="policy")
    records, _ = read_demonstrations(tiny / "demonstrations.jsonl")
    tokenizer = load_tokenizer(tmp_path / "run" / "tokenizer")
    units, _ = demonstration_examples(records, tokenizer, max_length=64)
    expected = mean_language_loss(network, units, 1000)
    assert rows_of(tmp_path / "run")[-1]["valid/loss"] == pytest.approx(expected, rel=1e-6)


def test_all_replies_of_a_dialogue_share_the_loss_by_their_tokens(
    tiny: Path, tmp_path: Path, parallel: Parallel
):
    user, reply = ({"role": role, "content": "the mill"} for role in ("user", "assistant"))
    lines = [{"messages": [user, reply, user, reply | {"content": "is a pub"}]}] * 2
    path = write_lines(tmp_path / "chats.jsonl", lines)
    config = sft_config(tiny, tmp_path / "run", epochs=1.0)
    data = dataclasses.replace(
        config.data, train=path, valid=path, replies="all", pretraining_fraction=0.0
    )
    train(dataclasses.replace(config, data=data))
    network = build_network("language", SIZE, parallel, numerics=Numerics())
    load_weights(network, tmp_path / "run", role="policy")
    tokenizer = load_tokenizer(tmp_path / "run" / "tokenizer")
    by = Renderer(None, tokenizer)
    (both, _), _ = demonstration_examples(
        read_demonstrations(path, by, replies="all")[0], tokenizer, max_length=64
    )
    (last, _), _ = demonstration_examples(
        read_demonstrations(path, by)[0], tokenizer, max_length=64
    )
    trained = np.flatnonzero(both.fields[TRAINED])
    end = int(trained[np.flatnonzero(np.diff(trained) > 1)[0]]) + 1  # of the first reply
    first = Example(tokens=both.tokens[:end], prompt_length=both.prompt_length)
    parts = [
        (mean_language_loss(network, [e], 1000), len(e.tokens) - e.num_given) for e in (first, last)
    ]
    assert sum(count for _, count in parts) == len(trained)
    expected = sum(mean * count for mean, count in parts) / len(trained)
    assert rows_of(tmp_path / "run")[-1]["valid/loss"] == pytest.approx(expected, rel=1e-5)


def test_model_from_nothing_pretrains_on_text_alone(tiny: Path, tmp_path: Path):
    config = SFTConfig(
        directory=tmp_path,
        tokenizer=tiny / "tokenizer.json",
        data=SFTData(
            pretraining=tiny / "pretraining.jsonl",
            pretraining_valid=tiny / "pretraining.jsonl",
            pretraining_tokens=32,
        ),
        epochs=0.5,
        batch_size=8,
        adam=AdamConfig(lr=3e-3),
        dropout=0.0,
    )
    train(config)
    rows = rows_of(tmp_path)
    assert rows[0]["train/pretrain_loss"] == pytest.approx(np.log(100), rel=0.02)  # knows nothing
    assert rows[-1]["valid/pretrain_loss"] < rows[0]["train/pretrain_loss"] - 0.2
    assert not any("train/loss" in row or "valid/loss" in row for row in rows)


def test_model_with_a_band_trains_resumes_and_generates_and_is_no_familys(
    tiny: Path, tmp_path: Path, parallel: Parallel
):
    data = SFTData(pretraining=tiny / "pretraining.jsonl", pretraining_tokens=32)
    config = SFTConfig(
        directory=tmp_path / "run",
        tokenizer=tiny / "tokenizer.json",
        band=5,
        data=data,
        epochs=0.5,
        batch_size=8,
        adam=AdamConfig(lr=3e-3),
        saving=EVERY_STEP,
        dropout=0.0,
    )
    whole = dataclasses.replace(config, directory=tmp_path / "whole")
    train(whole)
    train_until(config, 2)
    train(config)
    assert rows_of(config.directory) == rows_of(whole.directory)
    size = size_of(config.directory, "policy")
    assert size.form == Form(window=5, windowed_layers="every second")
    dense = dataclasses.replace(config, directory=tmp_path / "dense", band=0)
    train(dense)
    assert rows_of(dense.directory)[-1] != rows_of(whole.directory)[-1]
    # Beyond the band, what is drawn is what the whole sequence has likeliest.
    network = build_network("language", size, parallel, numerics=Numerics())
    load_weights(network, config.directory, role="policy")
    prompt, greedy = np.arange(1, 12), SamplingConfig(max_new_tokens=9, temperature=0.0)
    (found,) = generate(network, [prompt], greedy, eos_id=0, seed=0)
    tokens = torch.from_numpy(np.concatenate([prompt, found.tokens]))
    bounds = torch.tensor([0, len(tokens)], dtype=torch.int32)
    rows = Logits(torch.arange(len(tokens)))
    with torch.no_grad(), parallel.active():
        logits = network.modules[0].eval()(
            tokens, torch.arange(len(tokens)), PackedSequences.of(bounds, len(tokens)), rows
        )[:, : size.vocab_size]
    assert logits.argmax(-1)[len(prompt) - 1 : -1].tolist() == found.tokens.tolist()
    with pytest.raises(UserError, match="settings|band 5, not 0"):
        train(dataclasses.replace(config, band=0))
    export = ConvertConfig(direction="export", source=config.directory, out=tmp_path / "out")
    with pytest.raises(UserError, match="cannot be exported: no family .* window 5, windowed_lay"):
        convert(export)


def test_a_band_is_of_models_that_start_from_nothing(tiny: Path, tmp_path: Path):
    with pytest.raises(UserError, match="band 5 is of a model that starts from nothing"):
        sft_config(tiny, tmp_path, band=5)
    with pytest.raises(UserError, match="band must be at least 0"):
        SFTConfig(band=-1)


def test_a_stage_without_size_and_start_says_what_it_lacks(tiny: Path, tmp_path: Path):
    with pytest.raises(UserError, match="--init-from is required"):
        train(sft_config(tiny, tmp_path, size="", init_from=None))


def test_seed_shuffles(tiny: Path, tmp_path: Path):
    for seed in (0, 1):
        train(sft_config(tiny, tmp_path / str(seed), seed=seed, epochs=0.2))
    first, second = (rows_of(tmp_path / str(seed))[0]["train/loss"] for seed in (0, 1))
    assert first != second


def test_run_starts_from_the_checkpoint_it_is_given(tiny: Path, tmp_path: Path):
    train(sft_config(tiny, tmp_path, epochs=0.2, adam=AdamConfig(lr=1e-12)))
    start, end = weights_of(tiny / "policy", "policy"), weights_of(tmp_path, "policy")
    for name, weight in start.items():
        torch.testing.assert_close(end[name], weight)


def test_run_says_what_computes_attention(tiny: Path, tmp_path: Path, capsys):
    train(sft_config(tiny, tmp_path, epochs=0.2))
    backend = attention_backend(start_parallel(ParallelLayout(), seed=0).device, torch.float32)
    assert capsys.readouterr().out.count(f"attention: {backend}") == 1


@pytest.mark.parametrize("epochs", [0.3, 1.0, 2.0, 2.5, 7.0])
@pytest.mark.parametrize(("num_examples", "batch_size"), [(3, 3), (7, 3), (8, 4), (100, 7)])
def test_the_steps_that_end_an_epoch_are_known(epochs: float, num_examples: int, batch_size: int):
    order = EpochOrder(num_examples, batch_size, seed=0)
    last = order.num_steps(epochs)
    ends = {min(order.num_steps(e), last): e for e in range(1, math.ceil(epochs) + 1)}
    found = {step: _epoch_ended(epochs, order, step) for step in range(1, last + 1)}
    assert {step: epoch for step, epoch in found.items() if epoch} == ends


def test_endless_epochs_take_no_memory():
    order = EpochOrder(3, 3, seed=0)
    assert order.num_steps(1e9) == 10**9
    assert _epoch_ended(1e9, order, 123_456_789) == 123_456_789


def test_fewer_demonstrations_than_a_batch_are_each_read_once_a_step(tiny: Path, tmp_path: Path):
    config = sft_config(tiny, tmp_path, epochs=2.0, batch_size=1000)
    train(dataclasses.replace(config, data=SFTData(train=tiny / "demonstrations.jsonl")))
    assert [row["train/epoch"] for row in rows_of(tmp_path)] == [1.0, 2.0]
