"""Runs that are killed, again and again, and started again end as if nothing had been: their
weights, optimizers, numbers and texts bit for bit, with nothing left beside them."""

import collections
import dataclasses
import random
import signal
from collections.abc import Callable
from pathlib import Path
from typing import Any

import pytest

from engine.settings.layout import ParallelLayout
from engine.settings.saving import SaveConfig
from tests.engine.checkpoints.killed_runs import (
    Config,
    Death,
    differences,
    lines_in,
    run,
    set_back,
    temporary_files,
)
from tests.tiny import EVERY_STEP, ppo_config, rm_config, sft_config

STAGES: dict[str, tuple[Callable[..., Config], dict[str, Any]]] = {
    # The last step has two saves, one after the other.
    "sft": (sft_config, {"dropout": 0.2, "epochs": 0.8, "save_every_epoch": True}),
    "rm": (rm_config, {"saving": SaveConfig(save_every=1, keep=1, keep_lowest="train/loss")}),
    "ppo": (ppo_config, {"iterations": 3, "num_shown": 8, "show_every": 1}),
}
WORLDS = {
    "1": (1, ParallelLayout()),
    "dp2": (2, ParallelLayout()),
    "tp2": (2, ParallelLayout(tp=2)),
}
CASES = ("sft-1", "ppo-1", "rm-1", "sft-dp2", "rm-tp2", "ppo-dp2", "ppo-tp2", "rm-dp2", "sft-tp2")
PATIENCE = 3.0  # seconds that a rank has to notice that another was killed
MOST_DEATHS = 4  # of one run, before it is left to come to its end


@dataclasses.dataclass(kw_only=True)
class Case:
    """A stage on some ranks, and what is known of its runs."""

    config: Config
    num_ranks: int
    whole: Path
    notes: Path
    lines: dict[str, list[dict[str, int]]]
    """By where a run begins, and by rank: how often a whole run comes to a line of a save."""
    seconds: float
    """That a whole run takes."""
    draw: random.Random
    seen: collections.Counter[str] = dataclasses.field(default_factory=collections.Counter)

    def run(self, directory: Path, death: Death | None = None) -> Any:
        config = dataclasses.replace(self.config, directory=directory)
        return run(config, self.notes, num_ranks=self.num_ranks, death=death)

    def death(self, begins: str, *, is_first: bool) -> Death:
        """Draw a line, most often of a save, each as likely, and one of the times that it is come
        to; now and then any moment."""
        if self.draw.random() < 0.2:
            return Death(seconds=self.draw.uniform(0.1, self.seconds), sync_seconds=0.02)
        rank = self.draw.randrange(self.num_ranks)
        what = self.draw.choice(("save", "save", "save", "save", "start", "run"))
        counts = {k: v for k, v in self.lines[begins][rank].items() if k.startswith(what)}
        line = self.draw.choice(sorted(counts))
        # After a death there are fewer steps to come.
        nth = self.draw.randint(1, counts[line] if is_first else -(-counts[line] // 3))
        patience = self.draw.choice((0.0, PATIENCE))
        sync_seconds = self.draw.choice((0.0, 0.0, 0.01))  # longer than a step of these networks
        return Death(rank=rank, line=line, nth=nth, others_live=patience, sync_seconds=sync_seconds)


def prepared(name: str, files: Path, folder: Path) -> Case:
    """Run a case undisturbed, from its beginning and set back by a step: with the same end."""
    stage, _, world = name.partition("-")
    make_config, changes = STAGES[stage]
    num_ranks, layout = WORLDS[world]
    changes = {"saving": EVERY_STEP, "layout": layout, **changes}
    config = make_config(files, folder / "whole", **changes)
    case = Case(
        config=config,
        num_ranks=num_ranks,
        whole=folder / "whole",
        notes=folder / "notes",
        lines={},
        seconds=0.0,
        draw=random.Random(name),
    )
    for begins in ("whole", "set_back"):
        if begins == "set_back":
            set_back(case.whole, folder / begins)
        end = case.run(folder / begins)
        assert end.codes == [0] * num_ranks, end.output
        case.seconds = max(case.seconds, end.seconds)
        case.lines[begins] = [lines_in(case.notes, rank) for rank in range(num_ranks)]
    assert_same(folder / "set_back", case.whole)
    return case


def assert_same(directory: Path, whole: Path) -> None:
    assert differences(directory, whole) == []
    assert temporary_files(directory) == []


def kill_and_continue(case: Case, directory: Path, most: int) -> None:
    """Kill a run up to so often, from its beginning or set back, start it again each time, and at
    last have it come to its end."""
    begins = case.draw.choice(("whole", "whole", "set_back"))
    if begins == "set_back":
        set_back(case.whole, directory)
    for number in range(case.draw.randint(1, min(most, MOST_DEATHS))):
        death = case.death(begins, is_first=number == 0)
        end = case.run(directory, death)
        assert end.num_left == 0, death
        if not end.was_killed:  # it was never there, or had ended
            assert set(end.codes) == {0}, end.output
            break
        case.seen["kills"] += 1
        case.seen["in a save"] += any(end.lines)
        case.seen["in its thread"] += any(line.startswith("save ") for line in end.lines)
        if case.num_ranks > 1 and death.others_live > 0:
            case.seen["of one rank"] += 1
            case.seen["noticed in time"] += end.ended_alone
    end = case.run(directory)
    assert (end.codes, end.num_left) == ([0] * case.num_ranks, 0), f"{death}\n{end.output}"
    case.seen["runs compared"] += 1
    assert_same(directory, case.whole)


@pytest.mark.slow
@pytest.mark.parametrize("name", CASES)
def test_killed_runs_lose_nothing(
    name: str, tiny: Path, tmp_path: Path, pytestconfig: pytest.Config
):
    num_kills = pytestconfig.getoption("--kills")
    wanted = (num_kills + len(CASES) - 1 - CASES.index(name)) // len(CASES)
    case = prepared(name, tiny, tmp_path)
    while case.seen["kills"] < wanted:
        number = case.seen["runs compared"]
        assert number <= 3 * wanted, "few deaths come to pass"
        kill_and_continue(case, tmp_path / f"run_{number}", wanted - case.seen["kills"])
    print(name, dict(case.seen))  # what a long run is read for (pytest -s)


@pytest.mark.slow
def test_rank_does_not_wait_for_ever_for_one_that_was_killed_in_the_last_save(
    tiny: Path, tmp_path: Path
):
    case = prepared("sft-dp2", tiny, tmp_path)
    counts = case.lines["whole"][1]
    line = max(line for line in counts if line.startswith("save tensor_file.py"))
    death = Death(rank=1, line=line, nth=counts[line], others_live=110.0)
    end = case.run(tmp_path / "run", death)
    assert (end.codes, end.ended_alone) == ([1, -signal.SIGKILL], True)
    assert end.lines[1] == line
    assert case.run(tmp_path / "run").codes == [0, 0]
    assert_same(tmp_path / "run", case.whole)
