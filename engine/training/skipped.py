"""Steps that were not taken because a gradient was not finite: how many, and when they end a run.

A skipped step leaves weights, moments and averages as they were, so one bad batch costs a step and
no more. What comes again and again is no bad batch: the run ends, with its checkpoints as they are.
"""

from collections.abc import Callable
from dataclasses import dataclass

from engine.errors import UserError


@dataclass(kw_only=True)
class SkippedSteps:
    """The skipped steps of one network's optimizer; its state belongs in the checkpoint, so that a
    resumed run ends where an uninterrupted one does."""

    limit: int
    """In a row, before the run ends."""
    total: int = 0
    in_a_row: int = 0
    num_searching: int = 0
    """Those of the total in which fp16 looked for its loss scale."""
    reason: str = ""
    """What was not finite in the last step, where that is held against the run."""

    @property
    def is_stuck(self) -> bool:
        """Whether so many were skipped in a row that the run is to end."""
        return self.in_a_row >= self.limit

    def count(self, *, was_skipped: bool, is_explained: bool, reason: str = "") -> None:
        """Count a step. is_explained: a smaller loss scale may be all that it wants; fp16 looks for
        its scale so, which can take a dozen steps, and they are not held against the run."""
        self.total += was_skipped
        self.reason = ""
        if not was_skipped:
            self.in_a_row = 0
        elif is_explained:
            self.num_searching += 1
        else:
            self.in_a_row += 1
            self.reason = reason

    def state_dict(self) -> dict[str, int]:
        """Return what a resume continues from."""
        return {
            "total": self.total,
            "in_a_row": self.in_a_row,
            "num_searching": self.num_searching,
        }

    def load_state_dict(self, state: dict[str, int]) -> None:
        """Continue where state_dict() was taken; from 0 where a checkpoint has none."""
        self.total, self.in_a_row = state.get("total", 0), state.get("in_a_row", 0)
        self.num_searching = state.get("num_searching", 0)


def end_if_stuck(where: str, newest: Callable[[], str], **networks: SkippedSteps) -> None:
    """Raise UserError where optimizer steps of one of the networks were skipped too often in a row:
    on all ranks alike, since they count the same.

    where: how far the run is, such as "step 7". newest: says where the newest checkpoint is, "" for
    none; all ranks call it together.
    """
    for name, skipped in networks.items():
        if skipped.is_stuck:
            found = newest()
            kept = (
                f"The last good checkpoint is {found}." if found else "None has been written yet."
            )
            raise UserError(
                f"{where}: the gradient of the {name} was not finite in {skipped.in_a_row} "
                "optimizer steps in a row, which were skipped and left the weights as they were. "
                f"{kept}\nFind out what was not finite first (metrics.jsonl has null for it); then "
                "lower the learning rate, use bf16 or fp32 in place of fp16, or take bad records "
                "out of the data. To pass over more steps, raise the optimizer's max_skipped_steps"
            )
