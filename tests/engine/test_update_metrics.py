import math

import pytest

from engine.update_metrics import merge_updates

SOUND = {"ratio_min": 0.9, "ratio_max": 1.1, "return_variance": 4.0, "error_variance": 1.0}


def test_merged_updates_are_means_extremes_and_the_explained_variance():
    common = {"return_variance": 4.0, "return_mean": 9.0, "error_mean": 9.0}
    merged = merge_updates(
        [
            {"policy_loss": 1.0, "ratio_min": 0.9, "ratio_max": 1.3, "error_variance": 1.0}
            | common,
            {"policy_loss": 3.0, "ratio_min": 0.7, "ratio_max": 1.1, "error_variance": 3.0}
            | common,
        ]
    )
    assert merged == {
        "update/policy_loss": 2.0,
        "update/ratio_min": 0.7,
        "update/ratio_max": 1.3,
        "update/explained_variance": 0.5,
        "update/first_ratio_error": pytest.approx(0.3),
    }


def test_skipped_steps_run_on_over_minibatches():
    merged = merge_updates([SOUND | {"policy_skipped_steps": float(n)} for n in (3, 3, 4)])
    assert merged["update/policy_skipped_steps"] == 4


@pytest.mark.parametrize("name", ["policy_loss", "ratio_max", "return_variance"])
@pytest.mark.parametrize("place", [0, 1])
def test_a_minibatch_that_is_not_finite_shows(name: str, place: int):
    updates = [SOUND | {"policy_loss": 1.0}, SOUND | {"policy_loss": 1.0}]
    updates[place] = updates[place] | {name: math.nan}
    merged = merge_updates(updates)
    shown = "explained_variance" if name == "return_variance" else name
    assert [key for key in merged if math.isnan(merged[key])][:1] == [f"update/{shown}"]
