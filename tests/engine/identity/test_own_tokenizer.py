import json
import shutil
from collections.abc import Callable
from pathlib import Path
from types import SimpleNamespace
from typing import Any

import pytest

from engine.data.tokenizer import load_tokenizer
from engine.errors import UserError
from engine.identity.own_tokenizer import tokenizer_now
from engine.identity.record import TokenizerRecord
from tests.tiny import write_tokenizer
from tests.tokenizer_json import added_token


@pytest.fixture
def directory(tmp_path: Path) -> Path:
    """A run that has a checkpoint, and its own copy of the tokenizer in first.json."""
    write_tokenizer(tmp_path / "first.json", vocab_size=60)
    (tmp_path / "run" / "checkpoints" / "step_00000001").mkdir(parents=True)
    load_tokenizer(tmp_path / "first.json").save(tmp_path / "run" / "tokenizer")
    return tmp_path / "run"


def test_a_path_with_nothing_there_is_refused_unless_it_was_given_before(directory: Path):
    before, run = recorded(directory), run_in(directory)
    nowhere = directory.parent / "nowhere.json"
    for earlier in (before, TokenizerRecord()):
        with pytest.raises(
            UserError, match=r"--tokenizer .*nowhere.json: no such file or folder; "
        ):
            tokenizer_now(run, nowhere, earlier)
    (directory.parent / "first.json").unlink()
    assert tokenizer_now(run, directory.parent / "first.json", before) == before


def run_in(directory: Path, tokenizer: Path | None = None) -> Any:
    own = load_tokenizer(tokenizer or directory / "tokenizer")
    return SimpleNamespace(directory=directory, tokenizer=own)


def recorded(directory: Path) -> TokenizerRecord:
    return tokenizer_now(run_in(directory), directory.parent / "first.json", TokenizerRecord())


def turned(value: Any) -> Any:
    """JSON with its keys in the opposite order."""
    if isinstance(value, dict):
        return {key: turned(inner) for key, inner in reversed(value.items())}
    return [turned(inner) for inner in value] if isinstance(value, list) else value


LAYOUTS: list[Callable[[Any], str]] = [
    lambda value: json.dumps(value, indent=7),
    lambda value: json.dumps(turned(value)),
    lambda value: json.dumps({k: v for k, v in value.items() if v is not None}),
]


@pytest.mark.parametrize("layout", LAYOUTS)
def test_tokenizer_that_is_laid_out_otherwise_is_the_same(
    layout: Callable[[Any], str], directory: Path
):
    first, path = directory.parent / "first.json", directory.parent / "again.json"
    before = recorded(directory)
    path.write_text(layout(json.loads(first.read_text())))
    assert path.read_bytes() != first.read_bytes()
    found = tokenizer_now(run_in(directory), path, before)
    assert (found.path, found.sha256) == (str(path), before.sha256)
    assert found.given != before.given
    first.unlink()
    assert tokenizer_now(run_in(directory), first, before) == before  # it has its own
    assert tokenizer_now(run_in(directory), None, before) == before


@pytest.mark.parametrize("is_known", [True, False])
def test_other_tokenizer_is_an_error_that_says_what_to_do(is_known: bool, directory: Path):
    before = recorded(directory) if is_known else TokenizerRecord()
    for size in (59, 61):
        other = write_tokenizer(directory.parent / "first.json", vocab_size=size)
        with pytest.raises(UserError, match="is another tokenizer") as refused:
            tokenizer_now(run_in(directory), other, before)
        own = directory / "tokenizer"
        assert f"--tokenizer {other}" in str(refused.value) and f"than {own}" in str(refused.value)
        assert "leave the option out or name that folder" in str(refused.value)
    assert tokenizer_now(run_in(directory), own, before).path == str(own)


def test_tokenizer_with_a_control_token_more_reads_all_texts_alike(directory: Path):
    before, path = recorded(directory), directory.parent / "more.json"
    whole = json.loads((directory.parent / "first.json").read_text())
    whole["added_tokens"].append(added_token("<|pad|>", run_in(directory).tokenizer.vocab_size))
    path.write_text(json.dumps(whole))
    assert tokenizer_now(run_in(directory), path, before).sha256 == before.sha256


def test_two_pieces_that_change_places_are_another_tokenizer(directory: Path):
    path = directory.parent / "first.json"
    before, content = recorded(directory), json.loads(path.read_text())
    vocabulary = content["model"]["vocab"]
    first, second = list(vocabulary)[-2:]
    vocabulary[first], vocabulary[second] = vocabulary[second], vocabulary[first]
    path.write_text(json.dumps(content))
    with pytest.raises(UserError, match="is another tokenizer"):
        tokenizer_now(run_in(directory), path, before)


def test_other_end_of_text_is_another_tokenizer(directory: Path):
    before = recorded(directory)
    config = directory.parent / "tokenizer_config.json"
    config.write_text(json.dumps({"eos_token": "mill"}))
    with pytest.raises(UserError, match="is another tokenizer"):
        tokenizer_now(run_in(directory), directory.parent / "first.json", before)


def test_what_is_no_tokenizer_can_be_left_out(directory: Path):
    before, path = recorded(directory), directory.parent / "first.json"
    path.write_text("{")
    with pytest.raises(UserError, match="first.json .*; leave --tokenizer out"):
        tokenizer_now(run_in(directory), path, before)
    shutil.rmtree(directory / "checkpoints")
    with pytest.raises(UserError, match="none of them$"):
        tokenizer_now(run_in(directory), directory.parent, TokenizerRecord())


def test_run_may_be_named_for_its_tokenizer(directory: Path):
    before = recorded(directory)
    other = directory.parent / "other"
    shutil.copytree(directory, other)
    assert tokenizer_now(run_in(directory), other, before).path == str(other)
    write_tokenizer(other / "tokenizer" / "tokenizer.json", vocab_size=59)
    with pytest.raises(UserError, match=f"--tokenizer {other} is another"):
        tokenizer_now(run_in(directory), other, before)


def test_own_copy_that_was_edited_or_is_gone_is_found(directory: Path):
    before, first = recorded(directory), directory.parent / "first.json"
    own = directory / "tokenizer" / "tokenizer.json"
    own.write_text(json.dumps(json.loads(own.read_text()), indent=7))
    with pytest.raises(UserError, match="tokenizer is not the tokenizer that this run was made"):
        tokenizer_now(run_in(directory), None, before)
    shutil.rmtree(own.parent)
    assert tokenizer_now(run_in(directory, first), first, before) == before
    other = write_tokenizer(directory.parent / "other.json", vocab_size=59)
    with pytest.raises(UserError, match="tokenizer is gone, and what was named is not"):
        tokenizer_now(run_in(directory, other), other, before)
