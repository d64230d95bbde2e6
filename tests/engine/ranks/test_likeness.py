"""What ranks were started as is compared, and what differs is named."""

import dataclasses
import json
import tempfile
from collections.abc import Iterator
from pathlib import Path

import pytest

from engine.errors import UserError
from engine.process.software import package_versions
from engine.ranks import likeness
from engine.ranks.likeness import differences, start_in_words
from engine.settings.layout import ParallelLayout
from engine.settings.ppo import PPOConfig
from engine.settings.rm import RMConfig
from engine.settings.sft import SFTConfig


def difference(mine: str, theirs: str) -> str:
    """What is said of rank 1."""
    said, _, advice = differences(mine, {theirs: [1]}).partition("\n")
    assert "MASTER_PORT of its own" in advice
    return said.removeprefix("rank 1 was not started as rank 0 was: ")


def test_ranks_that_were_started_alike_say_the_same():
    config = PPOConfig(directory=Path("runs/a"))
    assert start_in_words(config, 2) == start_in_words(dataclasses.replace(config), 2)


def test_each_field_that_differs_is_named_with_both_values():
    mine = SFTConfig(directory=Path("runs/a"), seed=1)
    other = dataclasses.replace(
        mine,
        directory=Path("runs/b"),
        seed=7,
        adam=dataclasses.replace(mine.adam, lr=0.5),
        data=dataclasses.replace(mine.data, train=Path("b.jsonl")),
    )
    said = difference(start_in_words(mine, 2), start_in_words(other, 2))
    assert set(said.split("; ")) == {
        "directory runs/b, not runs/a",
        "seed 7, not 1",
        f"adam.lr 0.5, not {mine.adam.lr}",
        "data.train b.jsonl, not None",
    }


@pytest.fixture
def short_path() -> Iterator[Path]:
    """A folder whose name is shown whole in an error."""
    with tempfile.TemporaryDirectory() as folder:
        yield Path(folder).resolve()


def test_relative_paths_are_compared_by_where_they_lead(
    short_path: Path, monkeypatch: pytest.MonkeyPatch
):
    here, there = short_path / "a", short_path / "b"
    data = dataclasses.replace(SFTConfig().data, train=Path("a.jsonl"))
    config = SFTConfig(directory=Path("runs/a"), init_from=Path("/models/base"), data=data)
    texts = []
    for place in (here, there):
        place.mkdir()
        monkeypatch.chdir(place)
        texts.append(start_in_words(config, 2))
    said, *advice = differences(texts[0], {texts[1]: [1]}).splitlines()
    assert set(said.removeprefix("rank 1 was not started as rank 0 was: ").split("; ")) == {
        f"directory {there}/runs/a, not {here}/runs/a",
        f"data.train {there}/a.jsonl, not {here}/a.jsonl",
    }
    assert "start all ranks in one" in advice[0]


def test_ranks_in_unlike_folders_are_alike_where_their_paths_are(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch
):
    texts = set()
    (tmp_path / "link").symlink_to(tmp_path)
    for place, directory in (("/", "/runs/a"), ("/usr", "/runs/a")):
        monkeypatch.chdir(place)
        texts.add(start_in_words(SFTConfig(directory=Path(directory)), 2))
    assert len(texts) == 1
    for place in (tmp_path, tmp_path / "link"):
        monkeypatch.chdir(place)
        texts.add(start_in_words(SFTConfig(directory=Path("runs/a")), 2))
    assert len(texts) == 2


def test_a_working_directory_that_is_gone_is_a_mistake_in_words(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch
):
    (tmp_path / "gone").mkdir()
    monkeypatch.chdir(tmp_path / "gone")
    (tmp_path / "gone").rmdir()
    with pytest.raises(UserError, match="the working directory: No such file"):
        start_in_words(SFTConfig(directory=Path("runs/a")), 2)


def test_a_part_that_only_one_of_them_has_is_named():
    mine = PPOConfig(generation_layout=ParallelLayout(tp=2))
    said = difference(start_in_words(mine, 2), start_in_words(PPOConfig(), 2))
    assert "generation_layout.tp None, not 2" in said


def test_another_stage_or_number_of_ranks_is_named_and_no_field_that_one_alone_has():
    mine = start_in_words(SFTConfig(directory=Path("runs/a")), 2)
    said = difference(mine, start_in_words(RMConfig(directory=Path("runs/b")), 4))
    assert said.startswith("stage rm, not sft; world_size 4, not 2; ")
    assert "directory runs/b, not runs/a" in said
    assert "pretraining_fraction" not in said


def test_other_code_and_other_packages_are_named(monkeypatch: pytest.MonkeyPatch):
    mine = start_in_words(SFTConfig(), 2)
    monkeypatch.setattr(likeness, "code_digest", lambda: "0123456789abcdef" * 2)
    versions = package_versions() | {"torch": "1.0"}
    monkeypatch.setattr(likeness, "package_versions", lambda: versions)
    said = difference(mine, start_in_words(SFTConfig(), 2))
    assert "code 0123456789abcdef, not " in said
    assert "torch 1.0, not " in said


def test_many_differences_and_many_kinds_of_ranks_are_a_few_lines():
    many = {f"field_{number}": 0 for number in range(100)}
    mine = start_in_words(many, 64)
    theirs = {start_in_words(dict.fromkeys(many, n), 64): [n, n + 32] for n in range(1, 32)}
    said = differences(mine, theirs)
    first, *_, rest, _ = said.splitlines()
    assert first.startswith("ranks 1, 33 were not started as rank 0 was: field_0 1, not 0; ")
    assert first.endswith("; and 92 more")
    assert rest.startswith("nor were ranks 4 to 31, ")
    assert len(said) < 2000


@pytest.mark.parametrize(
    "text", ["", "{}", "[]", "null", '{"launch": 3, "settings": 4}', "[" * 9999]
)
def test_what_another_program_says_is_a_difference_too(text: str):
    assert difference(start_in_words(SFTConfig(), 2), text)


def test_values_are_cut():
    mine, theirs = (start_in_words({"name": letter * 10_000}, 2) for letter in "ab")
    assert len(difference(mine, theirs)) < 400
    assert json.loads(mine)["settings"] == {"name": "a" * 10_000}
