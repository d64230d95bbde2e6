"""What is compared is of the same weights and lengths; the goals stand beside what was reached."""

import io

import pytest
from rich.console import Console

from benchmarks.ppo_table import beside_ours, goal_lines, table
from tests.benchmarks.test_ppo_provider import JOB

OURS = {
    "provider": "trident",
    "workload": "fixed",
    "episodes_per_s": 12.0,
    "median_s": 5.0,
    "phase_s": {"rollout": 2.0, "update": 3.0},
    "peak_bytes": 1.1e9,
    "start_bytes": 0.5e9,
    "before_training": {"logprob": -9.0, "value": 0.1},
    "response_lengths": {"mean": 60.0, "std": 30.0, "min": 16, "max": 128, "count": 200},
    "job": {"numerics": {"dtype": "fp32"}},
}
THEIRS = OURS | {"provider": "trl", "episodes_per_s": 8.0, "peak_bytes": 2e9}


def test_a_rival_is_held_against_ours():
    found = beside_ours(OURS, THEIRS)
    assert found["trident_episodes_ratio"] == pytest.approx(1.5)
    assert found["trident_memory_ratio"] == pytest.approx(0.55)
    lines = goal_lines([OURS, THEIRS | found], "cpu")
    assert lines == [
        "episodes/s over trl's, goal 1.4: reached 1.50",
        "peak memory over trl's, goal 0.6 at most: reached 0.55",
    ]
    assert goal_lines([OURS, THEIRS | found], "cuda") == []
    assert goal_lines([OURS], "cpu") == []


@pytest.mark.parametrize(
    ("change", "message"),
    [
        ({"before_training": {"logprob": -9.1, "value": 0.1}}, "mean logprob of -9.1"),
        ({"before_training": {"logprob": -9.0, "value": 0.2}}, "mean value of 0.2"),
        (
            {"response_lengths": OURS["response_lengths"] | {"mean": 75.0}},
            "75.0 tokens, ours 60.0: 5.0 standard errors",
        ),
    ],
)
def test_other_weights_and_other_lengths_are_not_compared(change, message):
    with pytest.raises(RuntimeError, match=message):
        beside_ours(OURS, THEIRS | change)


def test_the_table_has_a_row_a_provider():
    console = Console(width=160, record=True, file=io.StringIO())
    console.print(table(JOB, [OURS, THEIRS | beside_ours(OURS, THEIRS)]))
    ours, theirs = (line for line in console.export_text().splitlines() if "60.0 (16" in line)
    assert "1.50" in theirs and "0.55" in theirs
    assert "1.50" not in ours
