"""Which entries are kept: arithmetic on columns.

In this order: duplicates go, then what is over a user's cap; a user's side is drawn
(engine/prepare/split.py); held-out prompts that are trained on in another data set go. Personal
data are looked for behind that, in what is left (engine/prepare/prepare.py).

**Duplicates.** Of a data set's prompts that share their first n characters one is kept, the
earliest. To share n characters is an equivalence, so equal hashes of the first n find it: no more
and no less than a sorted list and a look at each neighbour's common prefix would. Prompts that
differ early and agree from there on are not found.
"""

from enum import IntEnum

import numpy as np

from engine.prepare.entries import Entries


class Verdict(IntEnum):
    """What becomes of an entry."""

    KEPT = 0
    DUPLICATE = 1
    OVER_CAP = 2
    TRAINED_ON = 3


def original_of(entries: Entries) -> np.ndarray:
    """Return [n] the entry that is kept of each one's duplicates: the earliest, in the order of the
    logs where times are equal. An entry without a duplicate is its own."""
    n = len(entries.prompt)
    order = np.lexsort((np.arange(n), entries.time, entries.prompt, entries.dataset))
    is_first = np.ones(n, dtype=bool)
    prompt, dataset = entries.prompt[order], entries.dataset[order]
    is_first[1:] = (prompt[1:] != prompt[:-1]) | (dataset[1:] != dataset[:-1])
    original = np.empty(n, dtype=np.int64)
    original[order] = order[is_first][np.cumsum(is_first) - 1]
    return original


def over_cap(entries: Entries, is_kept: np.ndarray, most: int) -> np.ndarray:
    """Return [n] which of the kept entries are of prompts over a user's cap: a user's different
    prompts are counted in the order of their hashes."""
    kept = np.flatnonzero(is_kept)
    user, prompt = entries.user[kept], entries.prompt[kept]
    order = np.lexsort((prompt, user))
    user, prompt = user[order], prompt[order]
    is_new_user = np.ones(len(order), dtype=bool)
    is_new_user[1:] = user[1:] != user[:-1]
    is_new_prompt = is_new_user.copy()
    is_new_prompt[1:] |= prompt[1:] != prompt[:-1]
    number = np.cumsum(is_new_prompt)  # of a prompt, over all users
    within = number - number[is_new_user][np.cumsum(is_new_user) - 1] if len(order) else number
    over = np.zeros(len(is_kept), dtype=bool)
    over[kept[order]] = within >= most
    return over


def first_verdicts(
    entries: Entries, original: np.ndarray, *, max_prompts_per_user: int
) -> np.ndarray:
    """Return [n] a Verdict for each entry, before anybody knows its side."""
    found = np.full(len(original), Verdict.KEPT, dtype=np.uint8)
    found[original != np.arange(len(original))] = Verdict.DUPLICATE
    found[over_cap(entries, found == Verdict.KEPT, max_prompts_per_user)] = Verdict.OVER_CAP
    return found


def verdicts_of(entries: Entries, first: np.ndarray, side: np.ndarray) -> np.ndarray:
    """Return [n] a Verdict for each entry, before anybody looks for personal data.

    first: [n] the first verdicts; side: [n] which side of the split.
    """
    found, is_kept = first.copy(), first == Verdict.KEPT
    trained = np.unique(entries.prompt[is_kept & (side == 0)])
    found[is_kept & (side != 0) & np.isin(entries.prompt, trained)] = Verdict.TRAINED_ON
    return found
