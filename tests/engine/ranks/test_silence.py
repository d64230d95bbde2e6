"""Who is silent, and who no longer comes further."""

import pytest

from engine.ranks.signs import Signs
from engine.ranks.silence import Watch, ranks_named


def told(beat: int, count: int = 0, phase: str = "train", *, is_bounded: bool = True) -> str:
    signs = Signs(phase=phase, step=7, count=count, is_bounded=is_bounded)
    return f"{beat} {signs.text()}"


def watch(**changes: float) -> Watch:
    return Watch(**({"world_size": 3, "silence_seconds": 45.0, "hang_seconds": 900.0} | changes))


def test_a_rank_that_beats_is_not_silent_however_little_it_does():
    seen = watch(hang_seconds=0)
    for now in range(0, 5000, 5):
        seen.hear({rank: told(now) for rank in range(3)}, now)
        assert seen.verdict(now) is None


def test_a_rank_without_a_beat_is_named_with_its_phase_and_those_that_live():
    seen = watch()
    for now in range(0, 60, 5):
        seen.hear(
            {0: told(now, now), 1: told(0, 3, "rollout"), 2: told(now, now, "score")}, float(now)
        )
        assert (seen.verdict(now) is not None) == (now > 45)
    assert seen.verdict(55) == (
        "rank 1 of 3 gave no sign of life for 55 s, last seen in phase rollout, after step 7; "
        "ranks 0, 2 lived, in phase train, after step 7 (rank 0), "
        "phase score, after step 7 (rank 2)"
    )


def test_the_silence_that_is_named_is_that_of_all_and_not_every_place_is():
    seen = watch(world_size=7)
    for now in (0, 10):
        seen.hear({rank: told(0 if rank else now, 1, f"p{rank}") for rank in range(6)}, now)
    seen.hear({6: told(0, 1, "p6")}, 10)
    assert seen.verdict(56, 40.0) == (
        "ranks 0 to 6 of 7 gave no sign of life for 46 s, last seen in phase p0, after step 7 "
        "(rank 0), phase p1, after step 7 (rank 1), phase p2, after step 7 (rank 2), phase p3, "
        "after step 7 (rank 3), ..."
    )


def test_after_a_connection_broke_less_silence_is_enough():
    seen = watch()
    for now in (0, 5, 10, 15, 20):
        seen.hear({0: told(now), 1: told(0)}, now)
    assert seen.verdict(20) is None
    assert str(seen.verdict(20, 15.0)).startswith("rank 1 of 3")


@pytest.mark.parametrize(("is_bounded", "is_hung"), [(True, True), (False, False)])
def test_a_phase_without_progress_is_hung_unless_it_may_take_long(is_bounded: bool, is_hung: bool):
    seen = watch()
    for now in range(0, 1000, 5):
        texts = {0: told(now, 3), 1: told(now, 3, "score", is_bounded=is_bounded)}
        seen.hear(texts, now)
    verdict = seen.verdict(995)
    assert (verdict is not None) == is_hung
    if verdict:
        assert "no rank came any further for 17 minutes" in verdict
        assert "phase score, after step 7 (rank 1)" in verdict


def test_one_rank_that_comes_further_is_progress():
    seen = watch()
    for now in range(0, 2000, 5):
        seen.hear({0: told(now, 3), 1: told(now, now)}, now)
        assert seen.verdict(now) is None


def test_ranks_are_named_by_spans_and_not_all_of_many():
    assert ranks_named([3]) == "rank 3"
    assert ranks_named([7, 0, 1, 2]) == "ranks 0 to 2, 7"
    assert ranks_named(range(0, 1024, 2)).endswith("30, ...")
