"""The reward model, trained on rankings of K answers (InstructGPT 3.5 and C.2)."""

import math
from dataclasses import dataclass, field
from typing import Any

import torch
import torch.distributed as dist

from engine.alarms import Alarm, LossAlarms
from engine.cautions.of_data import (
    Reading,
    held_out_cautions,
    overlap_cautions,
    reading_cautions,
    repetition_cautions,
    response_cautions,
    twin_cautions,
)
from engine.cautions.of_prompts import kind_cautions, prompt_cautions
from engine.cautions.of_settings import (
    interval_cautions,
    rank_cautions,
    schedule_cautions,
)
from engine.checkpoints.checkpointer import Checkpointer
from engine.checkpoints.course import Course
from engine.data.batches import lengths_of, shapes_of
from engine.data.comparisons import Comparison, comparison_examples, read_comparisons
from engine.data.demonstrations import demonstration_examples, read_demonstrations
from engine.data.examples import Example
from engine.data.limits import Limit, Limits, context_limit, training_limits
from engine.data.prompts import hold_out
from engine.data.renderer import Renderer
from engine.evidence.keeper import Evidence
from engine.feed import Feed, pack_for
from engine.huggingface.model_source import tokenizer_of
from engine.identity.inputs import Inputs
from engine.losses import comparison_loss, last_readings, pair_accuracy
from engine.metrics import RM_HEADLINE, Metrics
from engine.ranks.seeds import seed_for_step
from engine.run import Run, join_ranks, require_data, stage, start_run
from engine.settings.evaluation import is_evaluated
from engine.settings.rm import RMConfig
from engine.settings.size import check_starts, size_with
from engine.shapes.fields import reading_options
from engine.training.network import Network, build_network
from engine.training.optimizer import Optimizer
from engine.training.passes import forward, forward_backward
from engine.training.recheck import checked_gradients
from engine.training.reduce import reduce_metrics
from engine.training.skipped import end_if_stuck
from models.sizes import GPTSize


@stage()
def train(config: RMConfig) -> dict[str, float]:
    """Run the stage to its end, or from its newest checkpoint on; return the last metrics."""
    # The first rank looks at files for all.
    parallel = join_ranks(config)
    check_starts(config.size, config.init_from)
    require_data(config.data.train, "data.train")
    run = start_run(
        directory=config.directory,
        parallel=parallel,
        tokenizer=tokenizer_of(config.tokenizer, config.init_from, config.directory),
    )
    inputs = Inputs(run, config)
    fingerprint = run.tokenizer.fingerprint()
    vocab_size = run.tokenizer.vocab_size
    size = inputs.size("init_from") if config.init_from else size_with(config.size, vocab_size)
    network = build_network("scalar", size, parallel, numerics=config.numerics)
    if config.init_from:
        inputs.start("init_from", network)
    context = context_limit(size.context_length, can_grow=config.init_from is None)
    data = _load_data(config, run, inputs.renderer, context)
    feed = Feed(
        units=data.train,
        batch_size=config.batch_size,
        micro_batch_tokens=config.micro_batch_tokens,
        seed=config.seed,
        parallel=parallel,
        share_prompts=config.share_prompts,
    )
    num_steps = feed.order.num_steps(config.epochs)
    optimizer = Optimizer(network, config.adam, total_steps=num_steps, spikes=config.spikes)
    checkpointer = Checkpointer(
        directory=run.checkpoints,
        mark=run.mark,
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
    inputs.keep(progress["step"], checkpointer)
    run.leave_if_asked()

    evidence = Evidence("rm", inputs.config, run, checkpointer)
    values: dict[str, float] = progress.get("metrics", {})
    metrics = Metrics(
        config.directory,
        is_writer=parallel.is_writer,
        num_steps=num_steps,
        first_step=progress["step"],
        headline=RM_HEADLINE,
    )
    with metrics, checkpointer:
        cautions = [*data.cautions, *_cautions(config, feed, num_steps, size)]
        notes = [*inputs.notes, *data.notes, _sharing_note(config, data.train), network.attention]
        metrics.note(*notes, cautions=cautions)
        for step in course:
            with metrics.phase("train"):
                values = _train_step(step, network, optimizer, feed, course.passed_over)
            evidence.look(
                step,
                "reward_model",
                lambda: {"loss": feed.chosen(course.position)},
                position=course.position,
            )
            is_last = step + 1 == num_steps
            if data.valid and is_evaluated(step + 1, num_steps, config.eval_every):
                with metrics.phase("valid"):
                    loss, accuracy = pair_accuracy(
                        network,
                        data.valid,
                        config.micro_batch_tokens,
                        share_prompts=config.share_prompts,
                    )
                values |= {"valid/loss": loss, "valid/pair_accuracy": accuracy}
            if is_last and data.demonstrations:
                mean = _mean_score(network, data.demonstrations, config.micro_batch_tokens)
                with checkpointer.named_after(f"step {step}"):
                    shift_bias(network, optimizer, -mean)
                values["train/bias_shift"] = -mean
            values["train/epoch"] = feed.order.epoch(step + 1)
            values["train/tokens_per_s"] = values["train/tokens"] / metrics.phase_seconds["train"]
            metrics.log(step, values)
            metrics.log_alarms(step, evidence.said() + alarms.check(values))
            end_if_stuck(
                f"step {step}", checkpointer.newest, is_last, reward_model=optimizer.skipped
            )
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
    loss = comparison_loss(feed.order.batch_size)
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


@dataclass(frozen=True, kw_only=True)
class _Data:
    """What a run reads."""

    train: list[list[Example]]
    valid: list[list[Example]]
    notes: list[str]
    """What reading the files is to be told about."""
    cautions: list[Alarm]
    """What is amiss with what was read."""
    demonstrations: list[Example] = field(default_factory=list)
    """Whose mean score is to be 0."""


def _load_data(config: RMConfig, run: Run, renderer: Renderer, context: Limit) -> _Data:
    """Read training and held-out comparisons, and demonstrations."""
    data = config.data
    limits = training_limits(
        max_tokens=data.max_tokens, max_prompt_tokens=data.max_prompt_tokens, context=context
    )
    options: dict[str, Any] = {
        "max_length": min(data.max_tokens, context.tokens),
        "max_prompt_length": data.max_prompt_tokens,
        "too_long": data.too_long,
    }
    reading = reading_options(data)
    records, report = read_comparisons(data.train, renderer, **reading)
    run.count("data.train", report)
    notes, num_read = report.notes(data.train), len(records)
    if data.valid is not None:
        held_out, valid_report = read_comparisons(data.valid, renderer, **reading)
        run.count("data.valid", valid_report)
        notes += valid_report.notes(data.valid)
    else:
        records, held_out = hold_out(records, data.valid_fraction, config.seed)
    train_units, lengths = comparison_examples(records, run.tokenizer, **options)
    run.count("data.train", lengths, part="train", limits=limits)
    notes.append(f"comparisons (train): {limits.described(lengths)}")
    limits.check(lengths, f"--data.train {data.train}")
    cautions = reading_cautions("comparisons", report, lengths, limits)
    valid_units, lengths = comparison_examples(held_out, run.tokenizer, **options)
    if held_out:
        file = "data.train" if data.valid is None else "data.valid"
        run.count(file, lengths, part="valid", limits=limits)
        notes.append(f"comparisons (valid): {limits.described(lengths)}")
    cautions += held_out_cautions(
        "comparisons",
        len(valid_units),
        lengths.num_dropped,
        path=data.valid,
        fraction=data.valid_fraction,
        num_all=num_read,
    )
    prompts = {r.prompt.key for r in records}
    cautions += overlap_cautions("comparisons", [r.prompt.key for r in held_out], prompts)
    cautions += _text_cautions(records, train_units, renderer)
    renderer.note([r.prompt for r in records])
    loaded = _Data(train=train_units, valid=valid_units, notes=notes, cautions=cautions)
    _load_demonstrations(loaded, config, run, renderer, options, limits)
    return loaded


def _sharing_note(config: RMConfig, units: list[list[Example]]) -> str:
    """Return how many tokens an epoch has, and would have if each completion had its own prompt."""
    shapes = [shapes_of(units, index) for index in range(len(units))]
    whole = sum(lengths_of(shapes))
    if not config.share_prompts:
        return f"each completion has its own prompt: {whole} tokens an epoch"
    shared = sum(lengths_of(shapes, share_prompts=True))
    return (
        f"prompts are computed once for their completions: {shared} tokens an epoch instead of "
        f"{whole}, {1 - shared / whole:.0%} fewer"
    )


def _load_demonstrations(
    loaded: _Data,
    config: RMConfig,
    run: Run,
    renderer: Renderer,
    options: dict[str, Any],
    limits: Limits,
) -> None:
    """Add the demonstrations whose mean score is to be 0, where a file is given."""
    data = config.data
    if data.demonstrations is None:
        return
    texts, report = read_demonstrations(
        data.demonstrations, renderer, skip_bad_lines=data.skip_bad_lines
    )
    run.count("data.demonstrations", report)
    num_more = len(texts) - data.num_demonstrations
    run.account.leave_out("data.demonstrations", num_more, "beyond --data.num-demonstrations")
    loaded.notes.extend(report.notes(data.demonstrations))
    prompts = [text.prompt for text in texts]
    loaded.cautions.extend(kind_cautions(renderer.kept(), prompts, "this reward model"))
    examples, lengths = demonstration_examples(
        texts[: data.num_demonstrations], run.tokenizer, **options
    )
    loaded.demonstrations.extend(examples)
    run.count("data.demonstrations", lengths, limits=limits)
    loaded.notes.append(f"demonstrations: {limits.described(lengths)}")
    limits.check(lengths, f"--data.demonstrations {data.demonstrations}")


def _text_cautions(
    records: list[Comparison], units: list[list[Example]], renderer: Renderer
) -> list[Alarm]:
    rankings = [([each.text for each in r.completions], r.ranks) for r in records]
    texts = [text for completions, _ in rankings for text in completions]
    lengths = [len(each.tokens) - each.prompt_length for unit in units for each in unit]
    return [
        *twin_cautions(rankings),
        *prompt_cautions(renderer, [r.prompt for r in records], texts),
        *response_cautions("completions", texts, lengths),
    ]


def _cautions(config: RMConfig, feed: Feed, num_steps: int, size: GPTSize) -> list[Alarm]:
    """Return what is amiss with the settings, now that the data are known."""
    num_taken = num_steps * feed.order.batch_size
    reading = Reading(len(feed.units), config.batch_size, num_taken, "Lower epochs")
    return [
        *schedule_cautions("adam", config.adam, num_steps, size if config.init_from else None),
        *interval_cautions(config.saving, config.eval_every, num_steps),
        *repetition_cautions({"comparisons": reading}),
        *rank_cautions("--batch-size", config.batch_size, feed.parallel.dp),
    ]
