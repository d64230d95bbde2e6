"""At which steps held-out numbers are due. Imports neither torch nor megatron."""

import math

NUM_EVALUATIONS = 10
"""Times that a run looks at what it holds out, where eval_every leaves it open: our choice. That
makes a curve; of a twentieth held out, and a step of three passes, it takes a sixtieth of 10 epochs
and a sixth of one."""


def is_evaluated(num_steps: int, total_steps: int, eval_every: int | None) -> bool:
    """Return whether held-out numbers are due after num_steps of total_steps.

    They always are at the end. eval_every: steps between them; 0: none else; None: so many that
    there are NUM_EVALUATIONS, or one a step in a run as short as that.
    """
    every = _interval(total_steps, eval_every)
    return num_steps == total_steps or bool(every and num_steps % every == 0)


def num_evaluations(total_steps: int, eval_every: int | None) -> int:
    """Return how often held-out numbers are due in a run of total_steps."""
    every = _interval(total_steps, eval_every)
    return math.ceil(total_steps / every) if every else 1


def _interval(total_steps: int, eval_every: int | None) -> int:
    return max(1, total_steps // NUM_EVALUATIONS) if eval_every is None else eval_every
