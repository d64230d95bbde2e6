"""Steps of SFT and of a reward model by transformers' Trainer, as it pads by default.

Every micro-batch is padded to its longest sequence; lengths are not grouped. A user's own parts are
the collator and, for the reward model, compute_loss; everything else is Trainer's: its loop, its
accumulation of gradients, its clipping, its fused AdamW. Its examples come in the job's order in
place of a random one, so that all providers take the same steps. It reports and saves nothing.
"""

import importlib
import tempfile
from collections.abc import Iterator
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import torch

from benchmarks.padded_steps import Batch, collate, load_model, ranking_losses
from benchmarks.padded_steps import settings as _padded_settings
from benchmarks.real_job import ADAM, RealJob
from benchmarks.turns import Turns
from engine.data.examples import Unit


class _Examples:
    """The units of all steps in their order."""

    def __init__(self, job: RealJob, num_steps: int) -> None:
        self.units = [unit for step in range(num_steps) for unit in job.units(step)]

    def __len__(self) -> int:
        return len(self.units)

    def __getitem__(self, index: int) -> Unit:
        return self.units[index]


def run(turns: Turns, folder: Path, passes: int) -> None:
    """Take the steps in one call of Trainer.train."""
    model = load_model(turns.job, folder, turns.device)
    with tempfile.TemporaryDirectory() as nothing:
        trainer = _trainer(turns, model, passes, nothing)
        turns.state = lambda: _state(trainer)
        trainer.train()
    if trainer.state.global_step != turns.num_steps:
        raise RuntimeError(f"Trainer took {trainer.state.global_step} of {turns.num_steps} steps")


def settings() -> dict[str, Any]:
    """Return what the provider is told, for the record."""
    accelerate = importlib.import_module("accelerate").__version__
    return _padded_settings() | {"accelerate": accelerate, "optimizer": "adamw_torch_fused"}


def _state(trainer: Any) -> list[torch.Tensor]:
    """What stays between steps: weights and moments."""
    optimizer = trainer.optimizer
    moments = [] if optimizer is None else optimizer.state.values()
    return [*trainer.model.parameters(), *(v for values in moments for v in values.values())]


def _trainer(turns: Turns, model: Any, passes: int, folder: str) -> Any:
    transformers = importlib.import_module("transformers")
    job, device = turns.job, turns.device
    num_units = len(job.batches[0])
    if num_units % passes:
        raise ValueError(f"{num_units} units a batch are no multiple of {passes} passes")
    arguments = transformers.TrainingArguments(
        output_dir=folder,
        max_steps=turns.num_steps,
        per_device_train_batch_size=num_units // passes,
        gradient_accumulation_steps=passes,
        optim="adamw_torch_fused",
        learning_rate=ADAM.lr,
        adam_beta1=ADAM.beta1,
        adam_beta2=ADAM.beta2,
        adam_epsilon=ADAM.epsilon,
        weight_decay=ADAM.weight_decay,
        max_grad_norm=ADAM.clip_norm,
        lr_scheduler_type="constant",
        bf16=job.numerics.dtype == "bf16",
        use_cpu=device.type == "cpu",
        dataloader_pin_memory=device.type == "cuda",
        remove_unused_columns=False,
        logging_strategy="no",
        save_strategy="no",
        report_to="none",
        disable_tqdm=True,
    )
    work = _Work()
    trainer = _trainer_class(transformers.Trainer, job, work)(
        model=model,
        args=arguments,
        train_dataset=_Examples(job, turns.num_steps),
        data_collator=collate,
        callbacks=[_callback(transformers.TrainerCallback, turns, work)],
    )
    trainer.remove_callback(transformers.PrinterCallback)
    return trainer


@dataclass
class _Work:
    """What the micro-batches of a step had."""

    loss: torch.Tensor | float = 0.0
    num_tokens: int = 0
    num_positions: int = 0
    num_passes: int = 0

    def hand_over(self) -> dict[str, Any]:
        """Return what was counted, and count anew."""
        found = vars(self) | {"loss": float(self.loss)}
        self.__dict__.update(vars(_Work()))
        return found


def _trainer_class(base: Any, job: RealJob, work: _Work) -> Any:
    """Return Trainer with the job's order and, for the reward model, its loss."""

    class Counting(base):
        def _get_train_sampler(self, train_dataset: Any = None) -> Any:
            return torch.utils.data.SequentialSampler(train_dataset or self.train_dataset)

        def training_step(self, model: Any, inputs: Batch, *rest: Any, **named: Any) -> Any:
            work.num_passes += 1
            work.num_positions += inputs["input_ids"].numel()
            work.num_tokens += int(inputs["attention_mask"].sum())
            loss = super().training_step(model, inputs, *rest, **named)
            work.loss = work.loss + loss
            return loss

    if job.task == "sft":
        return Counting

    class Ranking(Counting):
        def compute_loss(self, model: Any, inputs: Batch, *_: Any, **__: Any) -> torch.Tensor:
            named = {name: inputs[name] for name in ("input_ids", "attention_mask")}
            return ranking_losses(model(**named).logits, inputs).mean()

    return Ranking


def _callback(base: Any, turns: Turns, work: _Work) -> Any:
    """Return what makes Trainer wait for its turn: a step lasts from the end of the one before."""
    steps: Iterator[int] = turns.steps()

    class Waiting(base):
        def on_train_begin(self, *_: Any, **__: Any) -> None:
            next(steps)

        def on_step_end(self, *_: Any, **__: Any) -> None:
            turns.report(**work.hand_over())
            next(steps, None)

    return Waiting()
