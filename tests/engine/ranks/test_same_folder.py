"""Ranks whose folder is another one than the first rank's are refused, and no others."""

import os
import time
from pathlib import Path

import pytest

from engine.claim import LOCK, holding_claims
from engine.errors import UserError
from engine.ranks import same_folder
from engine.ranks.parallel import Parallel
from engine.ranks.same_folder import check_same_folder
from engine.run import claim_for_all
from tests.ranks import run_ranks


def claim_from(folders: list[Path], directory: Path, seconds: float) -> str:
    """What a rank hears that claims a directory with the others, each from its own folder."""
    os.chdir(folders[int(os.environ["RANK"])])
    same_folder._DELAY = seconds
    started = time.monotonic()
    with holding_claims():
        try:
            claim_for_all(directory)
            return f"in {time.monotonic() - started:.0f} s"
        except UserError as error:
            return str(error)


def test_a_folder_of_the_same_name_elsewhere_is_refused_on_all_ranks_and_stays_as_it_was(
    tmp_path: Path,
):
    places = [tmp_path / "a", tmp_path / "b"]
    for place in places:
        place.mkdir()
    stale = places[1] / "run" / LOCK
    stale.parent.mkdir()
    stale.write_text("of a run that was killed")
    said = run_ranks(claim_from, 3, [places[0], places[1], places[0]], Path("run"), 1.0)
    assert said[0] == said[1] == said[2]
    assert "--directory is another folder on rank 1 than on rank 0, which has " in said[0]
    assert f"{places[0] / 'run'} on " in said[0]
    assert f"(rank 1: {places[1] / 'run'} on " in said[0]
    assert list(places[0].iterdir()) == []
    assert list(stale.parent.iterdir()) == [stale]


def test_one_folder_by_unlike_paths_is_taken_at_once(tmp_path: Path):
    (tmp_path / "a").mkdir()
    (tmp_path / "link").symlink_to("a")
    said = run_ranks(claim_from, 2, [tmp_path / "a", tmp_path / "link"], Path("run"), 60.0)
    assert said == ["in 0 s"] * 2
    assert list((tmp_path / "a").iterdir()) == []


def see_late(directory: Path) -> str:
    """A rank that sees what the first wrote only at its third look."""
    looks = ["of the run before", ""]
    same_folder._DELAY = 30.0
    see = same_folder.words_of
    if os.environ["RANK"] == "1":
        same_folder.words_of = lambda lock: looks.pop() if looks else see(lock)
    with holding_claims():
        claim_for_all(directory)
    return f"claimed, with {len(looks)} looks left"


def test_what_is_seen_a_little_later_is_seen(tmp_path: Path):
    assert run_ranks(see_late, 2, tmp_path / "run")[1] == "claimed, with 0 looks left"


def test_a_rank_alone_looks_for_nothing(parallel: Parallel, monkeypatch: pytest.MonkeyPatch):
    monkeypatch.setattr(same_folder, "words_of", lambda lock: pytest.fail("looked"))
    check_same_folder(Path("run"), Path("run") / LOCK, "directory")
