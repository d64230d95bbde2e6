import dataclasses
import fcntl
import os
from pathlib import Path

import numpy as np
import pytest
from torch.multiprocessing import ProcessRaisedException

from engine.answers.answer import generate_text
from engine.answers.kept import Answers, Origin, digest_of_prompts
from engine.claim import holding_claims
from engine.errors import UserError
from engine.ranks import same_folder
from engine.ranks.start import start_parallel
from engine.settings.layout import ParallelLayout
from engine.settings.sampling import SamplingConfig
from tests.engine.answers.answering import (
    Killed,
    answers,
    config,
    kill_after,
)
from tests.ranks import run_ranks

ORIGIN = Origin(
    weights="w", prompts="p", num_samples=1, sampling=SamplingConfig(), dtype="fp32", seed=1
)


@pytest.fixture(autouse=True)
def claims_of_each_test():
    with holding_claims():
        yield


def opened(folder, num_answers: int) -> Answers:
    parallel = start_parallel(ParallelLayout(), seed=0)
    return Answers(folder / "out.jsonl", ORIGIN, parallel, num_answers)


def kept_lines(folder, num_answers: int) -> list[bytes]:
    """Return the lines that a killed run leaves of so many answers."""
    with holding_claims():
        answers = opened(folder, num_answers)
        for number in range(num_answers):
            answers.add(number, {"prompt": "ö", "response": f"{number}", "logprob": -0.1 / 3})
    return (folder / "out.jsonl.partial" / "0.jsonl").read_bytes().splitlines(keepends=True)


def test_an_answer_is_in_a_file_before_the_next_is_drawn(tmp_path):
    answers = opened(tmp_path, 2)
    for number in (1, 0):
        answers.add(number, {"response": f"ö {number}"})
        lines = (tmp_path / "out.jsonl.partial" / "0.jsonl").read_text().splitlines()
        assert lines[-1].startswith(f'{{"number": {number}, "response": "ö {number}", "checksum": ')
    answers.finish()
    assert (tmp_path / "out.jsonl").read_text() == '{"response": "ö 0"}\n{"response": "ö 1"}\n'
    assert sorted(path.name for path in tmp_path.iterdir()) == [
        "out.jsonl",
        "out.jsonl.origin.json",
    ]


def test_a_folder_that_lacks_answers_becomes_no_file(tmp_path):
    answers = opened(tmp_path, 2)
    answers.add(0, {"response": ""})
    with pytest.raises(UserError, match="1 answers of 2"):
        answers.finish()
    assert not (tmp_path / "out.jsonl").exists()


def test_prompts_are_told_apart_by_where_they_end():
    digests = {
        digest_of_prompts([np.array(tokens) for tokens in prompts], fingerprint)
        for prompts in ([[1, 2], [3]], [[1], [2, 3]], [[1, 2, 3]])
        for fingerprint in ("a", "b")
    }
    assert len(digests) == 6


@pytest.mark.parametrize(
    ("change", "match"),
    [
        ({"seed": 2}, "seed 1, not 2"),
        ({"num_samples": 3}, "num_samples 2, not 3"),
        (
            {"sampling": SamplingConfig(max_new_tokens=6, top_p=0.9)},
            "sampling.top_p 1.0, not 0.9; give another --out, or remove the folder",
        ),
        ({"prompt_suffix": " "}, "prompts [0-9a-f]{16}, not"),
        ({"source": "reference"}, "weights .*policy/checkpoints.*, not .*reference/checkpoints"),
    ],
)
def test_answers_of_other_settings_are_not_continued(run, tmp_path, monkeypatch, change, match):
    settings = config(run / "policy", tmp_path, num_samples=2)
    change = {name: run / x if name == "source" else x for name, x in change.items()}
    with monkeypatch.context() as patch, pytest.raises(Killed):
        kill_after(1, patch)
        generate_text(settings)
    with pytest.raises(UserError, match=match):
        generate_text(dataclasses.replace(settings, **change))
    # How fast answers are drawn may change.
    faster = dataclasses.replace(settings.sampling, num_slots=1)
    generate_text(dataclasses.replace(settings, sampling=faster))
    assert len(answers(settings.out)) == 4


def test_a_folder_without_answers_stands_in_nobodys_way(run, tmp_path, monkeypatch):
    settings = config(run / "policy", tmp_path)
    with monkeypatch.context() as patch, pytest.raises(Killed):
        kill_after(0, patch)
        generate_text(settings)
    generate_text(dataclasses.replace(settings, seed=2))
    assert len(answers(settings.out)) == 2


def test_a_damaged_line_is_named(run, tmp_path):
    settings = config(run / "policy", tmp_path)
    part = tmp_path / "out.jsonl.partial" / "0.jsonl"
    part.parent.mkdir()
    part.write_text("\0\0\n")
    with pytest.raises(UserError, match="0.jsonl:1: damaged; remove the line"):
        generate_text(settings)


@pytest.mark.parametrize(
    "line",
    [b"{}", b"[]", b"null", b"7", b'"text"', b'{"number": 1}', b'{"number": "1", "checksum": ""}']
    + [b'{"number": 1, "checksum": []}', b"[" * 100_000, b"\xff", b"1" * 5000, b'"\\ud800"']
    + [b'{"number": true, "response": "\\ud800", "checksum": 1}', b""],
)
def test_a_line_that_is_no_answer_is_named(tmp_path, line):
    first, *_ = kept_lines(tmp_path, 2)
    part = tmp_path / "out.jsonl.partial" / "0.jsonl"
    part.write_bytes(first + line + b"\n" + first)
    with holding_claims(), pytest.raises(UserError, match="0.jsonl:2: damaged; remove the line"):
        opened(tmp_path, 2)
    part.write_bytes(first)
    assert opened(tmp_path, 2).kept == {0}


def test_any_flipped_bit_of_an_answer_is_noticed(tmp_path):
    lines = kept_lines(tmp_path, 2)
    part = tmp_path / "out.jsonl.partial" / "0.jsonl"
    content = b"".join(lines)
    for position in range(len(lines[0]) - 1):
        for bit in (1, 4):
            flipped = bytearray(content)
            flipped[position] ^= bit
            if flipped[position] == ord("\n"):  # two lines, the first of them damaged
                continue
            part.write_bytes(flipped)
            with holding_claims(), pytest.raises(UserError, match="0.jsonl:1: damaged"):
                opened(tmp_path, 2)


def test_an_answer_to_no_prompt_is_named(tmp_path):
    kept_lines(tmp_path, 2)
    with holding_claims(), pytest.raises(UserError, match="0.jsonl:2: damaged"):
        opened(tmp_path, 1)


def test_a_second_run_is_refused(run, tmp_path):
    settings = config(run / "policy", tmp_path)
    folder = tmp_path / "out.jsonl.partial"
    folder.mkdir()
    with (folder / ".lock").open("w") as lock:  # through a file of its own, as a process has it
        fcntl.flock(lock, fcntl.LOCK_EX)
        with pytest.raises(UserError, match="out.jsonl.partial: another run writes into this"):
            generate_text(settings)
    generate_text(settings)
    assert not folder.exists()


def test_an_answer_that_cannot_be_written_is_one_line(tmp_path):
    answers = opened(tmp_path, 2)
    answers._part.close()
    (tmp_path / "0.jsonl").symlink_to("/dev/full")
    answers._part = (tmp_path / "0.jsonl").open("ab", buffering=0)
    with pytest.raises(UserError, match="0.jsonl: cannot be written: No space left on device"):
        answers.add(0, {"response": ""})


def test_a_finished_file_is_not_drawn_again(run, tmp_path, monkeypatch, capsys):
    settings = config(run / "policy", tmp_path)
    generate_text(settings)
    written = settings.out.stat().st_mtime_ns
    kill_after(0, monkeypatch)
    generate_text(settings)
    assert "out.jsonl: finished, 2 answers" in capsys.readouterr().out
    assert settings.out.stat().st_mtime_ns == written
    assert not (tmp_path / "out.jsonl.partial").exists()


@pytest.mark.parametrize(
    ("change", "match"),
    [
        ({"seed": 2}, "seed 1, not 2; give another --out, or --overwrite"),
        ({"source": "reference"}, "weights .*policy/checkpoints.*, not .*reference/checkpoints"),
        ({"prompt_suffix": " "}, "prompts [0-9a-f]{16}, not"),
    ],
)
def test_a_finished_file_of_another_origin_is_replaced_on_request_alone(
    run, tmp_path, change, match
):
    settings = config(run / "policy", tmp_path)
    generate_text(settings)
    content = settings.out.read_bytes()
    change = {name: run / x if name == "source" else x for name, x in change.items()}
    other = dataclasses.replace(settings, **change)
    with pytest.raises(UserError, match=match):
        generate_text(other)
    assert settings.out.read_bytes() == content
    assert not (tmp_path / "out.jsonl.partial").exists()
    generate_text(dataclasses.replace(other, overwrite=True))
    assert settings.out.read_bytes() != content
    generate_text(other)  # now it is this one's


def test_a_file_that_somebody_else_made_or_changed_is_not_replaced(run, tmp_path):
    settings = config(run / "policy", tmp_path)
    settings.out.write_text("mine")
    with pytest.raises(UserError, match="out.jsonl exists, and nothing says what it was made from"):
        generate_text(settings)
    settings.out.unlink()
    generate_text(settings)
    with settings.out.open("a") as stream:
        stream.write("a note\n")
    with pytest.raises(UserError, match="has changed since its answers were written"):
        generate_text(settings)


def test_weights_of_another_content_in_the_same_folder_are_noticed(run, tmp_path, monkeypatch):
    settings = config(run / "policy", tmp_path)
    generate_text(settings)
    monkeypatch.setattr("engine.answers.batch.digest_of_weights", lambda *a, **o: "other")
    with pytest.raises(UserError, match="content [0-9a-f]{32}, not other"):
        generate_text(settings)


def open_from(folders: list[Path], prompts: list[str]) -> str:
    """What a rank hears that opens the answers of its own folder, to its own prompts."""
    rank = int(os.environ["RANK"])
    os.chdir(folders[rank])
    same_folder._DELAY = 1.0
    parallel = start_parallel(ParallelLayout(), seed=0)
    origin = dataclasses.replace(ORIGIN, prompts=prompts[rank])
    with holding_claims():
        try:
            Answers(Path("out.jsonl"), origin, parallel, 2)
        except UserError as error:
            return str(error)
    return "open"


def test_ranks_whose_folder_or_prompts_are_others_are_refused(tmp_path: Path):
    places = [tmp_path / "a", tmp_path / "b"]
    for place in places:
        place.mkdir()
    assert run_ranks(open_from, 2, [places[0]] * 2, ["p", "p"]) == ["open"] * 2
    said = run_ranks(open_from, 2, places, ["p", "p"])
    assert said[0] == said[1]
    assert said[0].startswith("--out is another folder on rank 1 than on rank 0, which has ")
    with pytest.raises(ProcessRaisedException, match="--prompts: rank 1 reads another file"):
        run_ranks(open_failing, 2, [places[0]] * 2, ["p", "q"])


def open_failing(folders: list[Path], prompts: list[str]) -> None:
    """End the rank that is refused, which ends the others."""
    if (said := open_from(folders, prompts)) != "open":
        raise RuntimeError(said)
