import numpy as np
import pytest

from engine.prepare.entries import Entries, EntryList
from engine.prepare.logs import parse_log
from engine.prepare.split import SPLITS, Moved, filled, side_of
from engine.settings.prepare import LogFields


def entries_of(*rows: dict) -> Entries:
    found = EntryList(prefix_characters=9, seed=0)
    for line, row in enumerate(rows, start=1):
        found.add(f"log:{line}", parse_log({"prompt": f"p {line}", **row}, LogFields()))
    return found.entries()


def moved_from(entries: Entries, sides: list[int], **options) -> tuple[list[int], list[Moved]]:
    is_kept = np.ones(len(sides), dtype=bool)
    side, moved = filled(entries, is_kept, np.array(sides), **{"has_valid": True, **options})
    return side.tolist(), moved


def test_a_user_is_on_one_side_and_the_sides_have_their_shares():
    users = np.random.default_rng(0).integers(0, 2**64, 20_000, dtype=np.uint64)
    side = side_of(users, valid_fraction=0.1, test_fraction=0.05)
    assert np.array_equal(side, side_of(users, valid_fraction=0.1, test_fraction=0.05))
    shares = np.bincount(side) / len(users)
    assert SPLITS == ("train", "valid", "test")
    assert np.abs(shares - [0.85, 0.1, 0.05]).max() < 0.01
    ends = np.array([0, 2**64 - 1], dtype=np.uint64)
    assert side_of(ends, valid_fraction=0.0, test_fraction=0.0).tolist() == [0, 0]


@pytest.mark.parametrize("number", range(2, 9))
@pytest.mark.parametrize("side", range(3))
def test_of_few_users_one_is_trained_on_and_one_validates(number, side):
    entries = entries_of(*({"user": i % number} for i in range(3 * number)))
    sides, moved = moved_from(entries, [side] * 3 * number)
    assert {0, 1} <= set(sides)
    of_user = {(i % number, found) for i, found in enumerate(sides)}
    assert len(of_user) == number  # each on one side
    assert {found for _, found in of_user} <= {side, 0, 1}
    assert all(each.of == number and each.dataset == "prompts" for each in moved)


def test_for_validation_goes_the_user_of_the_lowest_hash():
    entries = entries_of(*({"user": i} for i in range(6)))
    sides, moved = moved_from(entries, [0] * 6)
    assert sides.index(1) == int(np.argmin(entries.user))
    assert moved == [Moved("prompts", "valid", 6)]
    assert moved_from(entries, [0] * 6, has_valid=False) == ([0] * 6, [])
    assert moved_from(entries, [0, 1, 2, 0, 0, 0])[1] == []
    assert moved_from(entries, [1] * 6)[0].index(0) == int(np.argmax(entries.user))


def test_nobody_is_moved_whose_going_leaves_a_data_set_without_training():
    rows = [{"user": "a", "response": "r"}, {"user": "a"}, {"user": "b"}]
    sides, moved = moved_from(entries_of(*rows), [0, 0, 0])
    assert sides == [0, 0, 1]  # a has the only demonstration
    assert [each.dataset for each in moved] == ["prompts"]
    assert moved_from(entries_of({"user": "a"}), [0]) == ([0], [])
    assert moved_from(entries_of({"user": "a"}), [2])[0] == [0]


def test_dropped_entries_fill_no_side():
    entries = entries_of({"user": "a"}, {"user": "b"}, {"user": "c"})
    is_kept = np.array([True, True, False])
    side, moved = filled(entries, is_kept, np.array([0, 0, 1]), has_valid=True)
    assert sorted(side[:2].tolist()) == [0, 1]
    assert moved == [Moved("prompts", "valid", 2)]


def test_the_prompts_of_one_user_or_of_nobody_are_split_one_by_one():
    of_one = entries_of(*({"user": 1.0} for _ in range(50)))
    of_nobody = entries_of(*({} for _ in range(50)))
    assert not of_one.is_by_user
    assert not of_nobody.is_by_user
    assert len(np.unique(of_one.user)) == 1  # whose prompts the cap counts
    assert of_one.divided.tolist() == of_nobody.divided.tolist()
    assert len(np.unique(of_one.divided)) == 50
    of_two = entries_of({"user": 1}, {"user": 2})
    assert of_two.is_by_user
    assert of_two.divided.tolist() == of_two.user.tolist()
