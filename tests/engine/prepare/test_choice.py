import os.path
import random

import numpy as np
import pytest

from engine.prepare.choice import Verdict, first_verdicts, original_of, over_cap, verdicts_of
from engine.prepare.entries import Entries, EntryList
from engine.prepare.logs import parse_log
from engine.settings.prepare import LogFields


def columns(*rows: tuple, dataset: int = 2) -> Entries:
    """Entries of (prompt, user, time)."""
    n = len(rows)
    prompt, user, time = (np.array([row[i] for row in rows]) for i in range(3))
    return Entries(
        files=("log:",),
        file=np.zeros(n, dtype=np.uint16),
        line=np.arange(1, n + 1).astype(np.uint64),
        dataset=np.full(n, dataset, dtype=np.uint8),
        prompt=prompt.astype(np.int64),
        user=user.astype(np.uint64),
        divided=user.astype(np.uint64),
        time=time.astype(float),
        is_by_user=True,
    )


@pytest.mark.parametrize("seed", range(20))
def test_duplicates_are_those_that_a_look_at_every_pair_finds(seed):
    """Against the definition: a common prefix of n characters, or equal texts."""
    draw, n = random.Random(seed), 6
    texts = ["".join(draw.choice("ab") for _ in range(draw.randint(1, 9))) for _ in range(60)]
    found = EntryList(prefix_characters=n, seed=0)
    for line, text in enumerate(texts):
        found.add(f"log:{line}", parse_log({"prompt": text}, LogFields()))
    original = original_of(found.entries())
    for i, text in enumerate(texts):
        alike = [
            j
            for j, other in enumerate(texts)
            if text == other or len(os.path.commonprefix([text, other])) >= n
        ]
        assert original[i] == alike[0], (text, [texts[j] for j in alike])


def test_the_earliest_is_kept_and_of_equal_times_the_first_of_the_logs():
    rows = [(0, 0, 3.0), (0, 0, 1.0), (1, 0, np.inf), (0, 0, np.inf), (1, 0, np.inf)]
    assert original_of(columns(*rows)).tolist() == [1, 1, 2, 1, 2]


def test_data_sets_have_their_duplicates_each():
    entries = columns((0, 0, 0), (0, 0, 0), (0, 0, 0))
    entries.dataset[:] = [0, 1, 0]
    assert original_of(entries).tolist() == [0, 1, 0]


def test_the_cap_counts_a_users_different_kept_prompts_in_the_order_of_their_hashes():
    rows = [(4, 1, 0), (2, 1, 0), (2, 1, 0), (9, 1, 0), (1, 1, 0), (8, 2, 0)]
    is_kept = np.array([True, True, True, True, False, True])
    # User 1 has the kept prompts 2 (twice, in two data sets), 4 and 9.
    over = over_cap(columns(*rows), is_kept, 2)
    assert over.tolist() == [False, False, False, True, False, False]
    assert not over_cap(columns(*rows), is_kept, 3).any()
    assert over_cap(columns(*rows), np.zeros(6, dtype=bool), 1).sum() == 0


def test_a_held_out_prompt_that_another_data_set_trains_on_is_dropped():
    entries = columns((0, 1, 0), (0, 2, 0), (1, 2, 0))
    entries.dataset[:] = [0, 2, 2]
    original = original_of(entries)
    first = first_verdicts(entries, original, max_prompts_per_user=9)
    found = verdicts_of(entries, first, np.array([0, 1, 1]))
    assert found.tolist() == [Verdict.KEPT, Verdict.TRAINED_ON, Verdict.KEPT]
    found = verdicts_of(entries, first, np.array([1, 1, 1]))
    assert found.tolist() == [Verdict.KEPT] * 3


def test_duplicates_do_not_count_against_the_cap():
    entries = columns((0, 1, 0), (0, 1, 0), (1, 1, 0), (2, 1, 0))
    found = first_verdicts(entries, original_of(entries), max_prompts_per_user=2)
    assert found.tolist() == [Verdict.KEPT, Verdict.DUPLICATE, Verdict.KEPT, Verdict.OVER_CAP]
    entries = columns((0, 1, 0), (0, 2, 0), (1, 2, 0))  # user 2 has sent user 1's prompt too
    found = first_verdicts(entries, original_of(entries), max_prompts_per_user=1)
    assert found.tolist() == [Verdict.KEPT, Verdict.DUPLICATE, Verdict.KEPT]
