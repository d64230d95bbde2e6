"""Supervised fine-tuning (InstructGPT 3.5 and C.1), the RLHF initialisation (C.3), and plain
pretraining.

One stage, three uses: demonstrations alone are SFT; demonstrations with a share of pretraining text
give the policy that PPO starts from; pretraining text alone trains the base model.
"""

import math
from dataclasses import dataclass, field
from pathlib import Path

from engine.alarms import Alarm, LossAlarms
from engine.cautions.of_data import (
    Reading,
    held_out_cautions,
    no_held_out_text,
    overlap_cautions,
    reading_cautions,
    repetition_cautions,
    response_cautions,
)
from engine.cautions.of_prompts import prompt_cautions
from engine.cautions.of_settings import (
    interval_cautions,
    rank_cautions,
    schedule_cautions,
)
from engine.checkpoints.checkpointer import Checkpointer
from engine.checkpoints.course import Course, Kept
from engine.data.batches import EpochOrder, Units
from engine.data.demonstrations import (
    Demonstration,
    demonstration_examples,
    read_demonstrations,
)
from engine.data.examples import Example, LengthReport
from engine.data.limits import Limit, context_limit, training_limits
from engine.data.prompt_format import Prompt
from engine.data.prompts import hold_out
from engine.data.records import ReadReport
from engine.data.renderer import Renderer
from engine.errors import UserError
from engine.evaluation.selection import epoch_name, load_selection
from engine.evidence.keeper import Evidence
from engine.feed import Feed, StepBatch
from engine.huggingface.model_source import tokenizer_of
from engine.identity.inputs import Inputs
from engine.losses import NegativeLogLikelihood, mean_language_loss
from engine.metrics import SFT_HEADLINE, Metrics
from engine.ranks.seeds import seed_for_step
from engine.run import Run, join_ranks, require_data, stage, start_run
from engine.settings.evaluation import is_evaluated
from engine.settings.sft import SFTConfig
from engine.settings.size import banded, check_starts, size_with
from engine.shapes.fields import reading_options
from engine.training.network import Network, build_network
from engine.training.optimizer import Optimizer
from engine.training.passes import Objective, accumulate
from engine.training.recheck import checked_gradients
from engine.training.reduce import reduce_metrics
from engine.training.skipped import end_if_stuck
from models.sizes import GPTSize


@stage()
def train(config: SFTConfig) -> dict[str, float]:
    """Run the stage to its end, or from its newest checkpoint on; return the last metrics."""
    # The first rank looks at files for all.
    parallel = join_ranks(config)
    check_starts(config.size, config.init_from)
    run = start_run(
        directory=config.directory,
        parallel=parallel,
        tokenizer=tokenizer_of(config.tokenizer, config.init_from, config.directory),
    )
    inputs = Inputs(run, config)
    size = inputs.size("init_from") if config.init_from else _new_size(config, run)
    network = build_network(
        "language", size, parallel, numerics=config.numerics, dropout=config.dropout
    )
    if config.init_from:
        inputs.start("init_from", network)
    context = context_limit(size.context_length, can_grow=config.init_from is None)
    data = _load_data(config, run, inputs.renderer, context)
    selection = load_selection(config, run, network, data.held_out_prompts, inputs)
    feeds = _feeds(config, data.train, run)
    lead = feeds.get("loss") or feeds["pretrain_loss"]
    num_steps = lead.order.num_steps(config.epochs)
    optimizer = Optimizer(network, config.adam, total_steps=num_steps, spikes=config.spikes)
    checkpointer = Checkpointer(
        directory=run.checkpoints,
        mark=run.mark,
        parallel=parallel,
        networks={"policy": network},
        optimizers={"policy": optimizer},
        saving=config.saving,
        tokenizer_fingerprint=run.tokenizer.fingerprint(),
        goes_back=config.spikes.policy == "rewind",
    )
    progress = checkpointer.resume() or {"step": 0}
    alarms = LossAlarms(config.alarms, clip_norm=config.adam.clip_norm)
    keeps: dict[str, Kept] = {"loss_alarms": alarms}
    if selection is not None:
        keeps["epochs"] = selection
    course = Course(checkpointer, config.spikes, progress, num_steps, keeps)
    inputs.keep(progress["step"], checkpointer)
    run.leave_if_asked()

    evidence = Evidence("sft", inputs.config, run, checkpointer)
    values: dict[str, float] = progress.get("metrics", {})
    metrics = Metrics(
        config.directory,
        is_writer=parallel.is_writer,
        num_steps=num_steps,
        first_step=progress["step"],
        headline=SFT_HEADLINE,
    )
    with metrics, checkpointer:
        cautions = [*data.cautions, *_cautions(config, feeds, num_steps, size)]
        metrics.note(*inputs.notes, *data.notes, network.attention, cautions=cautions)
        for step in course:
            with metrics.phase("train"):
                share = config.data.pretraining_fraction
                values = _train_step(step, network, optimizer, feeds, share, course.passed_over)
            is_last = step + 1 == num_steps
            epoch = _epoch_ended(config.epochs, lead.order, step + 1)
            if is_evaluated(step + 1, num_steps, config.eval_every):
                with metrics.phase("valid"):
                    values |= _validate(network, data.valid, config.micro_batch_tokens)
            if epoch and selection is not None:
                with checkpointer.named_after(f"step {step}"), metrics.phase("select"):
                    values |= selection.score(network, epoch, step + 1)
            values["train/epoch"] = lead.order.epoch(step + 1)
            values["train/tokens_per_s"] = values["train/tokens"] / metrics.phase_seconds["train"]
            metrics.log(step, values)
            evidence.look(
                step,
                "policy",
                lambda: {name: feed.chosen(course.position) for name, feed in feeds.items()},
                position=course.position,
            )
            metrics.log_alarms(step, evidence.said() + alarms.check(values))
            end_if_stuck(f"step {step}", checkpointer.newest, is_last, policy=optimizer.skipped)
            if course.set_back(metrics):
                continue
            if epoch and (config.save_every_epoch or selection is not None):
                checkpointer.save_weights(epoch_name(epoch))
                if selection is not None:
                    selection.write(checkpointer)
            boundary = checkpointer.boundary(step + 1, is_last=is_last)
            if boundary.saves:
                checkpointer.save(step + 1, {"metrics": values, **course.state_dict()})
            if boundary.leaves:
                checkpointer.finish()
                run.leave(step + 1)
    return values


def _new_size(config: SFTConfig, run: Run) -> GPTSize:
    """Return the size of a model that starts from nothing."""
    return banded(size_with(config.size, run.tokenizer.vocab_size), config.band)


def _train_step(
    step: int,
    network: Network,
    optimizer: Optimizer,
    feeds: dict[str, Feed],
    pretraining_fraction: float,
    passed_over: int = 0,
) -> dict[str, float]:
    """One optimizer step on loss = (1 - f) x demonstrations + f x pretraining, each its mean over
    target tokens; passed_over: batches that no step learns from."""
    parallel = network.parallel
    seed_for_step(parallel, step + passed_over)
    optimizer.zero_gradients()
    taken = {name: feed.step(step + passed_over) for name, feed in feeds.items()}
    objectives = supervised_objectives(taken, pretraining_fraction)
    found = checked_gradients(
        optimizer, lambda: accumulate(network, objectives), step=step, role="policy"
    )
    result = optimizer.step(step, found)
    losses = reduce_metrics(found, parallel)  # behind the step, whose launches need it not
    values = losses | optimizer.numbers(result)
    return {f"train/{name}": value for name, value in values.items()} | {
        "train/tokens": float(sum(batch.num_tokens for batch in taken.values())),
        "train/token_spread": max(batch.spread for batch in taken.values()),
    }


def supervised_objectives(
    taken: dict[str, StepBatch], pretraining_fraction: float
) -> list[Objective]:
    """Return the terms of a step's loss, from the batches of each."""
    objectives = []
    for name, batch in taken.items():
        weight = pretraining_fraction if name == "pretrain_loss" else 1.0 - pretraining_fraction
        objectives.append(
            Objective(
                batches=batch.batches,
                loss=NegativeLogLikelihood(batch.num_targets, name),
                scale=weight if len(taken) > 1 else 1.0,
            )
        )
    return objectives


def _validate(network: Network, units: dict[str, Units], budget: int) -> dict[str, float]:
    return {
        f"valid/{name}": mean_language_loss(network, held_out, budget)
        for name, held_out in units.items()
    }


def _feeds(config: SFTConfig, units: dict[str, Units], run: Run) -> dict[str, Feed]:
    """Return the feed of each source, with its part of the batch's sequences: at least one each."""
    num_pretraining = config.batch_size
    if "loss" in units:
        num_pretraining = config.num_pretraining_sequences
    sizes = {"loss": config.batch_size - num_pretraining, "pretrain_loss": num_pretraining}
    if "pretrain_loss" not in units:
        sizes["loss"] = config.batch_size
    if "loss" in units and sizes["loss"] < 1:
        raise UserError(f"--batch-size {config.batch_size} leaves no room for demonstrations")
    return {
        name: Feed(
            units=source,
            batch_size=sizes[name],
            micro_batch_tokens=config.micro_batch_tokens,
            seed=config.seed,
            parallel=run.parallel,
        )
        for name, source in units.items()
    }


def _epoch_ended(epochs: float, order: EpochOrder, num_steps: int) -> int | None:
    """Return the epoch, from 1, that these steps end, None where they end none; the run's end
    closes a broken one."""
    if num_steps == order.num_steps(epochs):
        return math.ceil(epochs)
    epoch = num_steps * order.batch_size // order.num_examples  # complete by then
    return epoch if epoch and order.num_steps(epoch) == num_steps else None


@dataclass(frozen=True, kw_only=True)
class _Data:
    """What a run reads, by loss name."""

    train: dict[str, Units] = field(default_factory=dict)
    valid: dict[str, Units] = field(default_factory=dict)
    held_out_prompts: list[Prompt] = field(default_factory=list)
    """Of the held-out demonstrations."""
    notes: list[str] = field(default_factory=list)
    """What reading the files is to be told about."""
    cautions: list[Alarm] = field(default_factory=list)
    """What is amiss with what was read."""


def _load_data(config: SFTConfig, run: Run, renderer: Renderer, context: Limit) -> _Data:
    """Read demonstrations and pretraining text, the training and the held-out ones."""
    data, loaded = config.data, _Data()
    if data.train is not None:
        _load_demonstrations(config, run, renderer, context, loaded)
    wants_pretraining = data.train is None or data.pretraining_fraction > 0
    if wants_pretraining:
        if data.train is None and data.pretraining is None:
            raise UserError("--data.train or --data.pretraining is required")
        require_data(data.pretraining, "data.pretraining")
        length = min(data.pretraining_tokens, context.tokens)
        for units, path, name in (
            (loaded.train, data.pretraining, "data.pretraining"),
            (loaded.valid, data.pretraining_valid, "data.pretraining_valid"),
        ):
            if path is not None:
                tokens = run.token_file(
                    path, skip_bad_lines=data.skip_bad_lines, fields=data.fields
                )
                run.count(name, tokens.report)
                cut = tokens.sequences if units is loaded.train else tokens.held_out
                units["pretrain_loss"] = cut(length)
                loaded.notes.extend(tokens.report.notes(path, f", {len(tokens.tokens)} tokens"))
    if not loaded.valid and data.train is None:
        loaded.cautions.extend(no_held_out_text())
    return loaded


def _load_demonstrations(
    config: SFTConfig, run: Run, renderer: Renderer, context: Limit, loaded: _Data
) -> None:
    """Read the demonstrations into `loaded`, with what there is to say of them."""
    data, path, options = config.data, config.data.train, reading_options(config.data)
    assert path is not None

    def read(path: Path) -> tuple[list[Demonstration], ReadReport]:
        return read_demonstrations(path, renderer, replies=data.replies, **options)

    records, report = read(path)
    run.count("data.train", report)
    loaded.notes.extend(report.notes(path))
    num_read = len(records)
    if data.valid is not None:
        held_out, valid_report = read(data.valid)
        run.count("data.valid", valid_report)
        loaded.notes.extend(valid_report.notes(data.valid))
    else:
        records, held_out = hold_out(records, data.valid_fraction, config.seed)
    loaded.held_out_prompts.extend(r.prompt for r in held_out)
    most = {"max_tokens": data.max_tokens, "max_prompt_tokens": data.max_prompt_tokens}
    limits = training_limits(**most, context=context)

    def encode(name: str, chosen: list[Demonstration]) -> tuple[list[Example], LengthReport]:
        examples, lengths = demonstration_examples(
            chosen,
            run.tokenizer,
            max_length=context.tokens if limits.whole is None else limits.whole.tokens,
            max_prompt_length=data.max_prompt_tokens,
            too_long=data.too_long,
        )
        if chosen:
            file = name if data.valid else "train"
            run.count(f"data.{file}", lengths, part=name, limits=limits)
            loaded.notes.append(f"demonstrations ({name}): {limits.described(lengths)}")
        return examples, lengths

    examples, lengths = encode("train", records)
    limits.check(lengths, f"--data.train {path}")
    loaded.train["loss"] = examples
    valid, valid_lengths = encode("valid", held_out)
    if valid:
        loaded.valid["loss"] = valid
    renderer.note([r.prompt for r in records])
    loaded.cautions.extend(
        [
            *reading_cautions("demonstrations", report, lengths, limits),
            *held_out_cautions(
                "demonstrations",
                len(valid),
                valid_lengths.num_dropped,
                path=data.valid,
                fraction=data.valid_fraction,
                num_all=num_read,
            ),
            *_text_cautions(records, held_out, examples, renderer),
        ]
    )


def _text_cautions(
    records: list[Demonstration],
    held_out: list[Demonstration],
    examples: list[Example],
    renderer: Renderer,
) -> list[Alarm]:
    texts, responses = {r.prompt.key for r in records}, [r.response.text for r in records]
    lengths = [len(each.tokens) - each.prompt_length for each in examples]
    return [
        *overlap_cautions("demonstrations", [r.prompt.key for r in held_out], texts),
        *prompt_cautions(renderer, [r.prompt for r in records], responses),
        *response_cautions("responses", responses, lengths),
    ]


def _cautions(
    config: SFTConfig, feeds: dict[str, Feed], num_steps: int, size: GPTSize
) -> list[Alarm]:
    """Return what is amiss with the settings, now that the data are known."""
    names = {"loss": "demonstrations", "pretrain_loss": "pretraining sequences"}
    readings = {
        names[name]: Reading(
            len(feed.units), feed.batch_size, num_steps * feed.order.batch_size, "Lower epochs"
        )
        for name, feed in feeds.items()
    }
    lead = next(iter(feeds.values()))
    return [
        *schedule_cautions("adam", config.adam, num_steps, size if config.init_from else None),
        *interval_cautions(config.saving, config.eval_every, num_steps),
        *repetition_cautions(readings),
        *rank_cautions("--batch-size", config.batch_size, lead.parallel.dp),
    ]
