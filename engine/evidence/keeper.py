"""Steps that were skipped are said, and kept to be rerun: what they learned from, and the weights,
which such a step leaves as they were.

    RUN/skipped/step_00000012_policy/   case.json, batch.safetensors, config.json, and the network
    RUN/skipped/step_00000012_rollout/  an iteration's that took no step: policy and critic

A folder is written beside its place and renamed, as a checkpoint is. Of a row of skipped steps the
first is kept, of a run the last few; those in which fp16 looks for its loss scale never are.
"""

from collections.abc import Callable, Mapping
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any

from engine.alarms import Alarm
from engine.checkpoints.checkpointer import Checkpointer
from engine.checkpoints.draft import Draft
from engine.checkpoints.saving import clear_leftovers, discard
from engine.data.batches import Units
from engine.data.unit_file import units_as_bytes
from engine.errors import UserError
from engine.evidence.case import BATCH, CASE, CONFIG, ROLLOUT, Case
from engine.ranks.first_rank import said_by_first_rank
from engine.run import Run
from engine.settings.saved import config_text
from engine.training.skipped import SkippedSteps


@dataclass
class Evidence:
    """What a run keeps of its skipped steps; all ranks make it, and call it, together."""

    stage: str
    config: Any
    """The stage's settings."""
    run: Run
    checkpointer: Checkpointer
    sources: Mapping[str, str] = field(default_factory=dict)
    """Digests of the networks in RUN/sources that read PPO's rollouts, by their names there."""
    _alarms: list[Alarm] = field(default_factory=list, init=False)

    def __post_init__(self) -> None:
        if self.checkpointer.parallel.is_writer and self.folder.is_dir():
            clear_leftovers(self.folder)

    @property
    def folder(self) -> Path:
        """Where the steps are kept."""
        return self.run.directory / "skipped"

    def look(
        self,
        step: int,
        role: str,
        sources: Callable[[], Mapping[str, Units]],
        numbers: Callable[[], dict[str, float]] = dict,
        position: int | None = None,
    ) -> None:
        """Say and keep the step that a network's optimizer has just been asked for, where it was
        skipped and begins a row; nothing may have changed the weights since.

        sources: returns the units of the global batch, by the name of their loss. numbers: returns
        those of Case. Both are called for such a step alone: they may wait for the device.
        position: the step's in the data, where that is another number than the step's.
        """
        optimizer = self.checkpointer.optimizers[role]
        if optimizer.skipped.begins_search:
            self.tell(
                "loss_scale_search",
                f"step {step}: {optimizer.skipped.reason}, at a loss scale of "
                f"{optimizer.loss_scale:g}. fp16 looks for a scale that suits the {role}: such "
                "steps are skipped, and counted in scale_search_steps; this is said once",
            )
        if not optimizer.skipped.begins_row:
            return
        case = Case(
            stage=self.stage,
            step=step,
            position=step if position is None else position,
            role=role,
            reason=optimizer.skipped.reason,
            loss_scale=optimizer.loss_scale,
            numbers=numbers(),
        )
        self.tell(
            "skipped_step",
            f"step {step} of the {role} was skipped, and left its weights as they were: "
            f"{case.reason}. {self._keep(case, sources())}",
        )

    def look_at_rollout(
        self,
        step: int,
        skipped: SkippedSteps,
        sources: Callable[[], Mapping[str, Units]],
        numbers: dict[str, float],
    ) -> None:
        """Say that an iteration takes no step, and keep its rollout where it begins a row.

        step: its first, had it taken any. skipped: counts such iterations, this one too. sources:
        returns the responses, with what is known of their tokens. numbers: those of Case.
        """
        said = f"{skipped.reason}. No optimizer step was taken, and the KL coefficient stays"
        if skipped.begins_row:
            case = Case(
                stage=self.stage,
                step=step,
                position=step,
                role=ROLLOUT,
                reason=skipped.reason,
                numbers=numbers,
                sources=dict(self.sources),
            )
            said += f". {self._keep(case, sources())}"
        self.tell("skipped_rollout", said)

    def tell(self, name: str, message: str) -> None:
        """Have an alarm said with the next."""
        self._alarms.append(Alarm(name, message))

    def said(self) -> list[Alarm]:
        """Return what there was to say since the last call."""
        alarms, self._alarms = self._alarms, []
        return alarms

    def _keep(self, case: Case, sources: Mapping[str, Units]) -> str:
        """Keep a case; return where it is, or why it is not. A disk that is full ends no run."""
        most = self.checkpointer.saving.keep_skipped
        if not most:
            return "Nothing of it is kept (keep-skipped 0)"
        self.checkpointer.finish()  # what has become of a checkpoint is its own matter
        draft = Draft(folder=self.folder / case.name, step=None)
        if self.checkpointer.parallel.is_writer:
            draft.texts[CASE] = case.as_text()
            draft.texts[CONFIG] = config_text(self.config)
            draft.blobs[BATCH] = units_as_bytes(sources)
        try:
            self.checkpointer.save_beside(draft, case.networks)
            said_by_first_rank(lambda: self._discard_others(case.name, most))
        except UserError as error:
            return f"It could not be kept: {error}"
        return f"Rerun it: python recipes/replay.py --step {draft.folder}"

    def _discard_others(self, newest: str, most: int) -> str:
        kept = sorted(path for path in self.folder.glob("step_*") if "." not in path.name)
        others = [path for path in kept if path.name != newest]
        try:
            for path in others[: max(0, len(others) - most + 1)]:
                discard(path)
        except OSError as error:
            raise UserError(f"{error.filename}: cannot be removed: {error.strerror}") from None
        return ""
