"""The course of a run through its steps and its data, which a spike may set back."""

from collections.abc import Iterator, Mapping
from typing import Any, Protocol

from engine.alarms import Alarm
from engine.checkpoints.checkpointer import Checkpointer
from engine.errors import UserError
from engine.metrics import Metrics
from engine.settings.spikes import SpikeConfig
from engine.training.skipped import last_in_words
from engine.training.spikes import Spike

_ADVICE = (
    "Look at the data of these steps and at the curves of loss and gradient norm; then lower the "
    "learning rate, take bad records out, raise {options}, or take every step (--spikes.policy "
    "none)"
)


class Kept(Protocol):
    """What a stage holds beside networks and optimizers, and has in a checkpoint's progress."""

    def state_dict(self) -> Any:
        """Return its state, as JSON has it."""

    def load_state_dict(self, state: Any, /) -> None:
        """Continue where state_dict() was taken."""


class Course:
    """The steps of a run that are still to be taken, in order; all ranks walk it together.

        for step in course:
            ...  # learns from the data at course.position
            if course.set_back(metrics):
                continue
            ...
            checkpointer.save(step + 1, {"metrics": ..., **course.state_dict()})

    A step's position in the data is its number, and the batches that the run has passed over.
    """

    def __init__(
        self,
        checkpointer: Checkpointer,
        config: SpikeConfig,
        progress: dict[str, Any],
        num_steps: int,
        keeps: Mapping[str, Kept] | None = None,
    ) -> None:
        """progress: what Checkpointer.resume returned, or {"step": 0}. keeps: what of a stage the
        progress holds beside networks and optimizers, by its names there; it is loaded now, and
        whenever the run is set back."""
        self.step: int = progress["step"]
        self.passed_over: int = progress.get("passed_over", 0)
        self._num_rewinds: int = progress.get("rewinds", 0)
        self._num_steps = num_steps
        self._checkpointer = checkpointer
        self._config = config
        self._keeps = keeps or {}
        self._is_set_back = False
        self._load_kept(progress)

    def __iter__(self) -> Iterator[int]:
        while self.step < self._num_steps:
            self._is_set_back = False
            yield self.step
            self.step += not self._is_set_back

    @property
    def position(self) -> int:
        """The batch, counted from 0, that the step learns from."""
        return self.step + self.passed_over

    def state_dict(self) -> dict[str, Any]:
        """Return what the progress of a checkpoint has of the course and of what the stage keeps,
        beside the step."""
        kept = {name: each.state_dict() for name, each in self._keeps.items()}
        return {**kept, "passed_over": self.passed_over, "rewinds": self._num_rewinds}

    def set_back(self, metrics: Metrics) -> bool:
        """Deal with the spikes of the step that was just logged; return whether the run has gone
        back to its newest checkpoint, where the settings ask for that.

        A rewind passes over all data up to the spike's, and extra_batches more. Where there is no
        checkpoint yet, the step stays left out. Raises UserError after too many spikes in a row or
        too many rewinds.
        """
        watches = {
            role: optimizer.spikes for role, optimizer in self._checkpointer.optimizers.items()
        }
        spikes = [(role, spike) for role, watch in watches.items() for spike in watch.take()]
        if not spikes:
            return False
        said = f"step {self.step}: " + "; ".join(_told(role, spike) for role, spike in spikes)
        if self._config.policy == "rewind":
            if self._num_rewinds >= self._config.max_rewinds:
                self._end(
                    f"{said}, and the run was set back {self._num_rewinds} times already",
                    "spikes.max_rewinds",
                )
            progress = self._checkpointer.go_back()
            if progress is not None:
                self._go_on_from(progress, metrics, said)
                return True
            said += ". No checkpoint is there to go back to (--save-every): the step is left out"
        else:
            said += ". The step is left out"
        for role, watch in watches.items():
            if watch.spiked.is_stuck:
                self._end(
                    f"{said}, as the {watch.spiked.in_a_row} steps of the {role} before and with "
                    "it were: this is no spike, but a new level",
                    "--spikes.norm-factor, --spikes.loss-factor or --spikes.max-in-a-row",
                )
        if any(watches[role].spiked.total == 1 for role, _ in spikes):
            said += "; later ones are counted in the metrics named spiked_steps"
            metrics.log_alarms(self.step, [Alarm("spike", said)])
        return False

    def _go_on_from(self, progress: dict[str, Any], metrics: Metrics, said: str) -> None:
        """Go on from the checkpoint of `progress`, which was loaded."""
        num_batches = self.position + 1 + self._config.extra_batches - progress["step"]
        num_passed = num_batches - progress.get("passed_over", 0)
        self.step, self.passed_over = progress["step"], num_batches
        self._num_rewinds += 1
        self._is_set_back = True
        self._load_kept(progress)
        metrics.set_back(self.step)
        # Of the step gone back to: a resume from there drops it, and comes to the spike again.
        told = (
            f"{said}. The run went back to its checkpoint of step {self.step} and passes over "
            f"{num_passed} batches (rewind {self._num_rewinds} of at most "
            f"{self._config.max_rewinds})"
        )
        metrics.log_alarms(self.step, [Alarm("rewind", told)])

    def _load_kept(self, progress: dict[str, Any]) -> None:
        for name, kept in self._keeps.items():
            if name in progress:
                kept.load_state_dict(progress[name])

    def _end(self, what: str, options: str) -> None:
        kept = last_in_words(self._checkpointer.newest)
        raise UserError(f"{what}. {kept}\n{_ADVICE.format(options=options)}")


def _told(role: str, spike: Spike) -> str:
    return (
        f"the {spike.name} of the {role} is {spike.value:.4g}, after a median of {spike.median:.4g}"
    )
