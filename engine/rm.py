"""The reward model, trained on rankings of K answers (InstructGPT 3.5 and C.2)."""

import math
from typing import Any

import torch
import torch.distributed as dist

from engine.alarms import LossAlarms
from engine.checkpoints.checkpointer import Checkpointer
from engine.checkpoints.course import Course
from engine.data.comparisons import comparison_examples, read_comparisons
from engine.data.demonstrations import demonstration_examples, read_demonstrations
from engine.data.examples import Example
from engine.data.prompts import hold_out
from engine.evidence.keeper import Evidence
from engine.feed import Feed, pack_for
from engine.identity.inputs import Inputs
from engine.losses import comparison_loss, last_readings, pair_accuracy
from engine.metrics import RM_HEADLINE, Metrics
from engine.ranks.seeds import seed_for_step
from engine.run import Run, join_ranks, require_path, size_named, stage, start_run, tokenizer_path
from engine.settings.rm import RMConfig
from engine.training.network import Network, build_network
from engine.training.optimizer import Optimizer
from engine.training.passes import forward, forward_backward
from engine.training.recheck import checked_gradients
from engine.training.reduce import reduce_metrics
from engine.training.skipped import end_if_stuck


@stage()
def train(config: RMConfig) -> dict[str, float]:
    """Run the stage to its end, or from its newest checkpoint on; return the last metrics."""
    # The first rank looks at files for all.
    parallel = join_ranks(config.layout, config.seed, config.numerics, config.waiting)
    require_path(config.data.train, "data.train")
    run = start_run(
        directory=config.directory,
        parallel=parallel,
        tokenizer=tokenizer_path(config.tokenizer, config.init_from, config.directory),
    )
    inputs = Inputs(run, config)
    fingerprint = run.tokenizer.fingerprint()
    size = inputs.size("init_from") if config.init_from else size_named(config.size, run.tokenizer)
    network = build_network("scalar", size, parallel, numerics=config.numerics)
    if config.init_from:
        inputs.start("init_from", network)
    train_units, valid_units, demonstrations, notes = _load_data(config, run, size.context_length)
    feed = Feed(
        units=train_units,
        batch_size=min(config.batch_size, len(train_units)),
        micro_batch_tokens=config.micro_batch_tokens,
        seed=config.seed,
        parallel=parallel,
    )
    num_steps = feed.order.num_steps(config.epochs)
    optimizer = Optimizer(network, config.adam, total_steps=num_steps, spikes=config.spikes)
    checkpointer = Checkpointer(
        directory=run.checkpoints,
        parallel=parallel,
        networks={"reward_model": network},
        optimizers={"reward_model": optimizer},
        saving=config.saving,
        tokenizer_fingerprint=fingerprint,
        goes_back=config.spikes.policy == "rewind",
    )
    progress = checkpointer.resume() or {"step": 0}
    alarms = LossAlarms(config.alarms, clip_norm=config.adam.clip_norm)
    course = Course(checkpointer, config.spikes, progress, num_steps, {"loss_alarms": alarms})
    inputs.keep(progress["step"])
    run.leave_if_asked()

    evidence = Evidence(stage="rm", run=run, checkpointer=checkpointer)
    values: dict[str, float] = progress.get("metrics", {})
    metrics = Metrics(
        config.directory,
        is_writer=parallel.is_writer,
        num_steps=num_steps,
        first_step=progress["step"],
        headline=RM_HEADLINE,
    )
    with metrics, checkpointer:
        metrics.note(*inputs.notes, *notes, network.attention)
        for step in course:
            with metrics.phase("train"):
                values = _train_step(step, network, optimizer, feed, course.passed_over)
            is_last = step + 1 == num_steps
            if valid_units and (
                is_last or (config.eval_every and (step + 1) % config.eval_every == 0)
            ):
                with metrics.phase("valid"):
                    loss, accuracy = pair_accuracy(network, valid_units, config.micro_batch_tokens)
                values |= {"valid/loss": loss, "valid/pair_accuracy": accuracy}
            if is_last and demonstrations:
                mean = _mean_score(network, demonstrations, config.micro_batch_tokens)
                with checkpointer.named_after(f"step {step}"):
                    shift_bias(network, optimizer, -mean)
                values["train/bias_shift"] = -mean
            values["train/epoch"] = feed.order.epoch(step + 1)
            values["train/tokens_per_s"] = values["train/tokens"] / metrics.phase_seconds["train"]
            metrics.log(step, values)
            batch = {"loss": feed.chosen(course.position)}
            evidence.look(step, "reward_model", batch, position=course.position)
            metrics.log_alarms(step, evidence.said() + alarms.check(values))
            end_if_stuck(f"step {step}", checkpointer.newest, reward_model=optimizer.skipped)
            if course.set_back(metrics):
                continue
            boundary = checkpointer.boundary(step + 1, is_last=is_last)
            if boundary.saves:
                checkpointer.save(step + 1, {"metrics": values, **course.state_dict()})
            if boundary.leaves:
                checkpointer.finish()
                run.leave(step + 1)
    return values


def shift_bias(network: Network, optimizer: Optimizer, shift: float) -> None:
    """Add `shift` to the head's bias, so that demonstrations score 0 on average (InstructGPT C.2:
    shift, no scale). The bias is fp32, and nothing else moves. FloatingPointError, on all ranks
    alike, where the shift is not finite."""
    if not math.isfinite(shift):
        raise FloatingPointError(
            f"demonstrations score {-shift} on average, which no bias shifts to 0"
        )
    network.settle()
    biases = [m.scalar_head.bias for m in network.modules if hasattr(m, "scalar_head")]
    with torch.no_grad():
        for bias in biases:
            bias += shift
    optimizer.adopt_weights(only=biases)
    network.mark_changed()


def _train_step(
    step: int, network: Network, optimizer: Optimizer, feed: Feed, passed_over: int
) -> dict[str, float]:
    """One optimizer step on the ranking loss of the step's prompts; passed_over: batches that no
    step learns from."""
    seed_for_step(network.parallel, step + passed_over)
    optimizer.zero_gradients()
    batch = feed.step(step + passed_over)
    loss = comparison_loss(feed.batch_size)
    sums = checked_gradients(
        optimizer,
        lambda: forward_backward(network, batch.batches, loss),
        step=step,
        role="reward_model",
    )
    result = optimizer.step(step, sums)
    found = reduce_metrics(sums, network.parallel)  # behind the step, whose launches need it not
    num_scores = found["num_scores"]
    mean = found["score_sum"] / num_scores
    return {
        "train/loss": found["loss"],
        "train/pair_accuracy": found["num_correct"] / max(found["num_pairs"], 1.0),
        "train/score_mean": mean,
        "train/score_std": max(found["score_square_sum"] / num_scores - mean**2, 0.0) ** 0.5,
        **{f"train/{name}": value for name, value in optimizer.numbers(result).items()},
        "train/tokens": float(batch.num_tokens),
        "train/token_spread": batch.spread,
    }


def _mean_score(network: Network, examples: list[Example], budget: int) -> float:
    """Return the mean score of the examples, the same on every rank."""
    parallel = network.parallel
    batches = pack_for(examples, parallel, budget)
    total = torch.zeros((), device=parallel.device, dtype=torch.float64)
    with network.evaluating():
        for batch, readings in zip(batches, forward(network, batches), strict=True):
            total += last_readings(readings, batch.cu_seqlens)[: batch.num_sequences].double().sum()
    dist.all_reduce(total, group=parallel.dp_group)
    return float(total) / len(examples)


def _load_data(
    config: RMConfig, run: Run, context_length: int
) -> tuple[list[list[Example]], list[list[Example]], list[Example], list[str]]:
    """Return training and held-out comparisons, demonstrations, and what reading them is to be told
    about."""
    data = config.data
    limits: dict[str, Any] = {
        "max_length": min(data.max_tokens, context_length),
        "max_prompt_length": data.max_prompt_tokens,
        "prompt_suffix": data.prompt_suffix,
    }
    records, report = read_comparisons(data.train, skip_bad_lines=data.skip_bad_lines)
    run.count("data.train", report)
    notes = [f"{data.train}: {report}"]
    if data.valid is not None:
        held_out, report = read_comparisons(data.valid, skip_bad_lines=data.skip_bad_lines)
        run.count("data.valid", report)
        notes.append(f"{data.valid}: {report}")
    else:
        records, held_out = hold_out(records, data.valid_fraction, config.seed)
    train_units, lengths = comparison_examples(records, run.tokenizer, **limits)
    run.count("data.train", lengths)
    notes.append(f"comparisons (train): {lengths}")
    valid_units: list[list[Example]] = []
    if held_out:
        valid_units, lengths = comparison_examples(held_out, run.tokenizer, **limits)
        run.count("data.train" if data.valid is None else "data.valid", lengths)
        notes.append(f"comparisons (valid): {lengths}")
    demonstrations: list[Example] = []
    if data.demonstrations is not None:
        texts, report = read_demonstrations(data.demonstrations, skip_bad_lines=data.skip_bad_lines)
        run.count("data.demonstrations", report)
        notes.append(f"{data.demonstrations}: {report}")
        demonstrations, lengths = demonstration_examples(
            texts[: data.num_demonstrations], run.tokenizer, **limits
        )
        run.count("data.demonstrations", lengths)
        notes.append(f"demonstrations: {lengths}")
    return train_units, valid_units, demonstrations, notes
