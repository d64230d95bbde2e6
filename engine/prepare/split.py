"""On which side of the split each entry is: all of a user's on one, by a hash of the user (3.2).

Of few users the hashes may leave a side empty. Then a user is moved there, and who calls is told.
Where all records are of one user, or of nobody, a prompt is split as a user by itself.
"""

from typing import NamedTuple

import numpy as np

from engine.prepare.entries import Entries
from engine.prepare.logs import SETS

SPLITS = ("train", "valid", "test")
"""The sides, and parts of their files' names."""
_TRAIN, _VALID, _TEST = range(len(SPLITS))
_MOST_LOOKED_AT = 1000  # users who might be moved, before nobody is; our choice


class Moved(NamedTuple):
    """One of a data set's few was moved to a side that nobody was on."""

    dataset: str
    split: str
    of: int
    """How many there are in the data set."""


def side_of(divided: np.ndarray, *, valid_fraction: float, test_fraction: float) -> np.ndarray:
    """Return [n] which of SPLITS each entry is in: a user's hash says so, so that all of a user's
    prompts are on one side, and stay there when others come and go."""
    draw = divided / 2.0**64
    return np.where(draw < test_fraction, 2, np.where(draw < test_fraction + valid_fraction, 1, 0))


def filled(
    entries: Entries, is_kept: np.ndarray, side: np.ndarray, *, has_valid: bool
) -> tuple[np.ndarray, list[Moved]]:
    """Return [n] the sides and who was moved: each data set has something to train on, and of two
    users or more one validates.

    is_kept: [n] which entries are left. has_valid: whether any share is for validation. There the
    user of the lowest hash is moved, who would be there by the next larger share; for training the
    one of the highest.
    """
    side, moved = side.copy(), []
    for wanted in (_TRAIN, _VALID) if has_valid else (_TRAIN,):
        for index, name in enumerate(SETS):
            here = is_kept & (entries.dataset == index)
            if np.any(side[here] == wanted) or not np.any(here):
                continue
            user = _movable(entries, is_kept, side, here, wanted)
            if user is not None:
                side[entries.divided == user] = wanted
                moved.append(Moved(name, SPLITS[wanted], len(np.unique(entries.divided[here]))))
    return side, moved


def _movable(
    entries: Entries, is_kept: np.ndarray, side: np.ndarray, here: np.ndarray, wanted: int
) -> np.uint64 | None:
    """Return which user of a data set goes to a side; None where any would leave a data set with
    nothing to train on."""
    donors = (_TEST, _VALID) if wanted == _TRAIN else (_TRAIN, _TEST)
    for donor in donors:
        users = np.unique(entries.divided[here & (side == donor)])
        if wanted == _TRAIN:
            users = users[::-1]
        for user in users[:_MOST_LOOKED_AT]:
            if donor != _TRAIN or _leaves_training(entries, is_kept & (side == _TRAIN), user):
                return user
    return None


def _leaves_training(entries: Entries, trained: np.ndarray, user: np.uint64) -> bool:
    """Return whether each data set of a user has another one to train on."""
    is_users = entries.divided == user
    datasets = np.unique(entries.dataset[trained & is_users])
    return all(np.any(trained & ~is_users & (entries.dataset == each)) for each in datasets)
