"""Steps that were not taken because something was not finite: how many, and when they end a run.

A skipped step leaves weights, moments and averages as they were, so one bad batch costs a step and
no more. What comes again and again is no bad batch: the run ends, with its checkpoints as they are.
"""

import contextlib
from collections.abc import Callable, Iterator
from dataclasses import dataclass

from engine.errors import UserError

_ADVICE = (
    "To try: lower the learning rate, use bf16 or fp32 in place of fp16, take bad records out of "
    "the data, or go on from an earlier checkpoint: its name in checkpoints/latest is where a run "
    "resumes"
)


@dataclass(kw_only=True)
class SkippedSteps:
    """The skipped steps of one network's optimizer; its state belongs in the checkpoint, so that a
    resumed run ends where an uninterrupted one does."""

    limit: int
    """In a row, before the run ends."""
    subject: str = "the loss or gradient of the {name}"
    """What is not finite where one is skipped, in words."""
    taken: str = "optimizer steps"
    """What is counted, in words."""
    total: int = 0
    in_a_row: int = 0
    num_searching: int = 0
    """Those of the total in which fp16 looked for its loss scale."""
    num_taken: int = 0
    """Steps that were not skipped."""
    since_taken: int = 0
    """Steps that were skipped since the last that was not, whatever for."""
    reason: str = ""
    """What was not finite in the last step; "" where it was taken."""
    is_searching: bool = False
    """Whether the last step was skipped as fp16 looked for its loss scale."""

    @property
    def is_stuck(self) -> bool:
        """Whether so many were skipped in a row that the run is to end."""
        return self.in_a_row >= self.limit

    @property
    def begins_row(self) -> bool:
        """Whether the last step was skipped, and is the first of a row that may end the run."""
        return self.in_a_row == 1 and bool(self.reason) and not self.is_searching

    @property
    def begins_search(self) -> bool:
        """Whether the last step is the run's first that fp16 skipped to find its loss scale."""
        return self.num_searching == 1 and self.is_searching

    def count(self, *, was_skipped: bool, is_explained: bool, reason: str = "") -> None:
        """Count a step. is_explained: a smaller loss scale may be all that it wants; fp16 looks for
        its scale so, which can take a dozen steps, and they are not held against the run."""
        self.total += was_skipped
        self.reason = reason if was_skipped else ""
        self.is_searching = was_skipped and is_explained
        self.num_taken += not was_skipped
        self.since_taken = self.since_taken + 1 if was_skipped else 0
        if not was_skipped:
            self.in_a_row = 0
        elif is_explained:
            self.num_searching += 1
        else:
            self.in_a_row += 1

    def state_dict(self) -> dict[str, int]:
        """Return what a resume continues from."""
        return {
            "total": self.total,
            "in_a_row": self.in_a_row,
            "num_searching": self.num_searching,
            "num_taken": self.num_taken,
            "since_taken": self.since_taken,
        }

    def load_state_dict(self, state: dict[str, int]) -> None:
        """Continue where state_dict() was taken; from 0 where a checkpoint has none."""
        self.total, self.in_a_row = state.get("total", 0), state.get("in_a_row", 0)
        self.num_searching = state.get("num_searching", 0)
        # Checkpoints of before these were counted are of runs that had learned something.
        self.num_taken = state.get("num_taken", min(1, len(state)))
        self.since_taken = state.get("since_taken", self.in_a_row)


@contextlib.contextmanager
def naming_the_last_good(where: str, newest: Callable[[], str]) -> Iterator[None]:
    """Run a block, and raise its FloatingPointError as a UserError. That says how far the run is,
    what to go back to, and what to try. All ranks must have the error alike."""
    try:
        yield
    except FloatingPointError as error:
        message = f"{where}: {error}. {last_in_words(newest)}\n{_ADVICE}"
    else:
        return
    raise UserError(message)


def last_in_words(newest: Callable[[], str]) -> str:
    """Return what there is to go back to, in a sentence; all ranks call together.

    newest: says where the newest checkpoint is, and which others are there; "" for none.
    """
    found = newest()
    return f"The last checkpoint is {found}." if found else "No checkpoint has been written yet."


def end_if_stuck(
    where: str, newest: Callable[[], str], is_last: bool, **networks: SkippedSteps
) -> None:
    """Raise UserError where optimizer steps of one of the networks were skipped too often in a row;
    or all of them, in a run that is at its end: on all ranks alike, since they count the same.

    where: how far the run is, such as "step 7". newest: as for last_in_words; all ranks call it
    together.
    """
    for name, skipped in networks.items():
        if skipped.is_stuck:
            last = f" In the last, {skipped.reason}." if skipped.reason else ""
            raise UserError(
                f"{where}: {skipped.subject.format(name=name)} was not finite in "
                f"{skipped.in_a_row} {skipped.taken} in a row, which were "
                f"skipped and left the weights as they were.{last} {last_in_words(newest)}\n"
                "Find out what was not finite first: recipes/replay.py reruns the first step or "
                "iteration of a row, which is kept in the run's folder skipped (not with "
                f"keep-skipped 0). {_ADVICE}. To pass over more, raise the optimizer's "
                "max_skipped_steps"
            )
        if is_last and skipped.total and not skipped.num_taken:
            search = " while fp16 looked for its loss scale" if skipped.num_searching else ""
            raise UserError(
                f"{where}: the run is at its end and has learned nothing: "
                f"{skipped.subject.format(name=name)} was not finite in any of the {skipped.total} "
                f"{skipped.taken}, all of which were skipped{search}. To try: more steps, a lower "
                "learning rate, bf16 or fp32 in place of fp16"
            )
