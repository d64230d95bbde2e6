import dataclasses
import errno
import fcntl
import os
from collections.abc import Iterator
from pathlib import Path

import pytest
import torch.distributed as dist
from tokenizers import processors

from engine import run as run_module
from engine import stop
from engine.data.pretraining import make_token_file
from engine.data.prompts import read_prompts
from engine.data.tokenizer import load_tokenizer
from engine.errors import UserError
from engine.ranks.start import start_parallel
from engine.run import (
    Run,
    claim_for_all,
    require_path,
    stage,
    start_run,
    tokenizer_path,
)
from engine.settings.adam import AdamConfig
from engine.settings.layout import ParallelLayout
from engine.settings.saved import load_config
from engine.settings.sft import SFTConfig, SFTData
from tests.beginnings import POST_PROCESSORS, write_tokenizer_json
from tests.ranks import run_ranks
from tests.tiny import EVERY_STEP, write_lines

SPECIAL = [("<s>", 1), ("<pad>", 0)]


@pytest.fixture(autouse=True)
def stage_around_each_test() -> Iterator[None]:
    with stage():
        yield


def start(tokenizer: Path, directory: Path) -> Run:
    parallel = start_parallel(ParallelLayout(), 7)
    return start_run(directory=directory, parallel=parallel, tokenizer=tokenizer)


@pytest.mark.parametrize("name", ["tokenizer.json", "policy", "policy/tokenizer"])
def test_tokenizer_comes_from_a_file_a_folder_or_an_earlier_run(
    name: str, tiny: Path, tmp_path: Path
):
    run = start(tiny / name, tmp_path / "run")
    assert run.tokenizer.fingerprint() == load_tokenizer(tiny / "tokenizer.json").fingerprint()
    assert run.parallel.seed == 7
    assert run.checkpoints == tmp_path / "run" / "checkpoints"


def test_only_what_is_not_put_around_a_text_is_warned_of(tmp_path: Path, capsys):
    behind = processors.TemplateProcessing(single="<s> $A <pad>", special_tokens=SPECIAL)
    for name, processor in {"known": POST_PROCESSORS["around"], "other": behind}.items():
        start(write_tokenizer_json(tmp_path / name, processor), tmp_path / "run")
        said = capsys.readouterr().err
        path = tmp_path / name / "tokenizer.json"
        note = f"WARNING: {path}: its post_processor puts <pad> behind every text, and here nothing"
        assert (note in said, "WARNING" in said) == ((name == "other",) * 2)


@pytest.mark.parametrize(
    "name", ["newest_checkpoint", "checkpoints/selected", "selected.json", "memory.txt"]
)
def test_a_folder_where_a_file_is_written_after_steps_is_an_error_at_the_start(
    name: str, tiny: Path, tmp_path: Path
):
    (tmp_path / name).mkdir(parents=True)
    with pytest.raises(UserError, match=f"{tmp_path / name} is a folder where a file is to be"):
        start(tiny / "policy", tmp_path)


@pytest.mark.parametrize("name", ["checkpoints", "skipped"])
def test_a_file_where_a_folder_is_written_after_steps_is_an_error_at_the_start(
    name: str, tiny: Path, tmp_path: Path
):
    (tmp_path / name).touch()
    with pytest.raises(UserError, match=f"{tmp_path / name}: cannot be written"):
        start(tiny / "policy", tmp_path)


def test_settings_are_written_when_the_stage_says_so(tiny: Path, tmp_path: Path):
    run = start(tiny / "policy", tmp_path / "run")
    assert [path.name for path in (tmp_path / "run").iterdir()] == [".lock"]
    config = SFTConfig(directory=tmp_path / "run", seed=7)
    run.write_settings(config)
    assert load_config(SFTConfig, tmp_path / "run" / "config.json") == config
    saved = load_tokenizer(tmp_path / "run" / "tokenizer")
    assert saved.fingerprint() == run.tokenizer.fingerprint()


def test_run_with_checkpoints_keeps_what_makes_it_the_run_it_is(tiny: Path, tmp_path: Path):
    run = start(tiny / "policy", tmp_path)
    run.write_settings(SFTConfig(directory=tmp_path, batch_size=8))
    config = SFTConfig(directory=tmp_path, batch_size=4)
    run.write_settings(config)  # nothing is trained yet
    run.checkpoints.mkdir()
    (run.checkpoints / "latest").write_text("step_00000001")
    faster = dataclasses.replace(config, micro_batch_tokens=64, epochs=2.0, saving=EVERY_STEP)
    run.write_settings(faster)
    for change, cause in (
        ({"batch_size": 8}, "batch_size 4, not 8"),
        ({"data": SFTData(train=tmp_path)}, f"data.train None, not {tmp_path}"),
        ({"adam": AdamConfig(lr=1.0)}, "adam.lr 9.65e-06, not 1.0"),
    ):
        with pytest.raises(
            UserError, match=f"is a run with {cause}; give another --directory"
        ) as no:
            run.write_settings(dataclasses.replace(faster, **change))
        name, value = cause.split(",")[0].split()
        assert str(no.value).endswith(
            f"go on with those it had by --{name.replace('_', '-')} {value}"
        )
    assert load_config(SFTConfig, tmp_path / "config.json") == faster


@pytest.mark.parametrize("text", ["", "[]", '{"seed": 7'])
def test_damaged_settings_of_a_run_have_a_remedy(text: str, tiny: Path, tmp_path: Path):
    run = start(tiny / "policy", tmp_path)
    config = SFTConfig(directory=tmp_path)
    run.write_settings(config)
    run.checkpoints.mkdir()
    (run.checkpoints / "latest").write_text("step_00000001")
    path = tmp_path / "config.json"
    path.write_text(text)
    with pytest.raises(UserError, match="config.json: .*; put it back, or remove it: "):
        run.write_settings(config)
    path.unlink()
    run.write_settings(config)
    assert load_config(SFTConfig, path) == config


def test_tokenizer_is_its_own_options_or_the_runs_it_starts_from(tiny: Path, tmp_path: Path):
    file, run = tiny / "tokenizer.json", tiny / "policy"
    assert tokenizer_path(file, run) == tokenizer_path(file, None) == file
    assert tokenizer_path(None, run) == run
    with pytest.raises(UserError, match="--init-from .*/nothing: no such"):
        tokenizer_path(None, tmp_path / "nothing")
    with pytest.raises(UserError, match="--tokenizer is required where no --init-from"):
        tokenizer_path(None, None)


def read_text(files: Path, directory: Path) -> tuple[int, list[int], str]:
    """Return how often this rank has read a file of text, its tokens, and what a bad one says."""
    run, sources = start(files / "policy", directory), []

    def make(source: Path, *arguments: object, **named: object) -> Path:
        sources.append(source)
        return make_token_file(source, *arguments, **named)  # type: ignore[arg-type]

    with pytest.MonkeyPatch.context() as patch:
        patch.setattr(run_module, "make_token_file", make)
        found = run.token_file(files / "pretraining.jsonl", skip_bad_lines=False)
        with pytest.raises(UserError) as error:
            run.token_file(directory / "bad.jsonl", skip_bad_lines=False)
    return len(sources), found.tokens.tolist(), str(error.value)


def read_prompts_of_this_rank(files: Path, directory: Path) -> str:
    """Return what a rank says of prompts that are in another order on the second rank."""
    run = start(files / "policy", directory)
    prompts = directory / f"prompts_{dist.get_rank()}.jsonl"
    lines = [{"prompt": text} for text in ("a", "b", "c")]
    write_lines(prompts, lines[:: -1 if dist.get_rank() else 1])
    same, report = read_prompts(files / "prompts.jsonl")
    run.count("data.valid", report)
    assert len(same) == run.account.counts["data.valid"]["records"]
    try:
        run.count("data.prompts", read_prompts(prompts)[1])
    except UserError as error:
        return str(error)
    return ""


def test_ranks_that_read_unlike_files_are_an_error_that_names_option_and_rank(
    tiny: Path, tmp_path: Path
):
    first, second = run_ranks(read_prompts_of_this_rank, 2, tiny, tmp_path)
    assert first == ""
    assert second.startswith("--data.prompts: rank 1 reads another file there than the first rank")


def test_one_rank_reads_pretraining_text_for_all(tiny: Path, tmp_path: Path):
    write_lines(tmp_path / "bad.jsonl", [{"txt": "x"}])
    (first, *ours), (second, *theirs) = run_ranks(read_text, 2, tiny, tmp_path)
    assert (first, second) == (2, 0)
    assert ours == theirs and len(ours[0]) > 100
    assert 'bad.jsonl:1: field "text" is missing' in ours[1]


def leave_while_reading(files: Path, directory: Path) -> object:
    """Return the status with which this rank leaves when a signal reaches the one that reads."""

    def make(*arguments: object, **named: object) -> Path:
        stop.leave("while it was read")

    run = start(files / "policy", directory)
    with pytest.MonkeyPatch.context() as patch, pytest.raises(SystemExit) as stopped:
        patch.setattr(run_module, "make_token_file", make)
        run.token_file(files / "pretraining.jsonl", skip_bad_lines=False)
    return stopped.value.code


def test_all_ranks_leave_with_the_one_that_reads(tiny: Path, tmp_path: Path):
    assert run_ranks(leave_while_reading, 2, tiny, tmp_path) == [stop.EXIT_STATUS] * 2


def claim_in_turn(directory: Path) -> str:
    """Return what a rank hears when another process writes into the folder."""
    number = os.open(directory / ".lock", os.O_RDWR | os.O_CREAT)
    if dist.get_rank() == 0:
        fcntl.flock(number, fcntl.LOCK_EX)  # as another process would: through a file of its own
    dist.barrier()
    with pytest.raises(UserError) as refused:
        claim_for_all(directory)
    return str(refused.value)


def test_all_ranks_are_refused_where_another_run_writes(tmp_path: Path):
    first, second = run_ranks(claim_in_turn, 2, tmp_path)
    assert first == second
    assert first.startswith(f"{tmp_path}: another run writes into this folder")


def test_what_killed_runs_were_writing_is_cleared_and_no_more(tmp_path: Path):
    name = f".x.{'0a' * 16}.partial"
    for folder in (tmp_path, tmp_path / "tokens", tmp_path / "other"):
        folder.mkdir(exist_ok=True)
        for kept in (name, "x.partial", ".x.partial", f"x.{'0a' * 16}.partial", ".x.json"):
            (folder / kept).touch()
    with stage():
        claim_for_all(tmp_path, "tokens", "absent")
    for folder in (tmp_path, tmp_path / "tokens", tmp_path / "other"):
        assert (folder / name).exists() == (folder.name == "other")
        assert len([path for path in folder.iterdir() if path.is_file() and path.name != name]) == 4


def test_checkpoints_that_cannot_be_written_are_noticed_at_the_start(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch
):
    (tmp_path / "checkpoints").symlink_to(tmp_path / "nowhere")  # a disk that is not mounted
    with stage(), pytest.raises(UserError, match="checkpoints: cannot be written: No such file"):
        claim_for_all(tmp_path)
    (tmp_path / "checkpoints").unlink()
    (tmp_path / "checkpoints").mkdir()
    with stage():
        claim_for_all(tmp_path)
    assert [path.name for path in tmp_path.iterdir()] == ["checkpoints"]
    assert not list((tmp_path / "checkpoints").iterdir())
    opened = Path.open

    def read_only(path: Path, *arguments: str) -> object:
        if path.parent.name == "checkpoints":
            raise OSError(errno.EROFS, os.strerror(errno.EROFS), str(path))
        return opened(path, *arguments)

    monkeypatch.setattr(Path, "open", read_only)
    with stage(), pytest.raises(UserError, match="checkpoints: cannot be written: Read-only file"):
        claim_for_all(tmp_path)


def test_missing_tokenizer_leaves_no_folder(tmp_path: Path):
    with pytest.raises(UserError, match=r"nowhere\.model: no such file"):
        start(tmp_path / "nowhere.model", tmp_path / "run")
    assert not (tmp_path / "run").exists()


def test_required_path(tmp_path: Path):
    assert require_path(tmp_path, "policy") == tmp_path
    with pytest.raises(UserError, match="--policy is required"):
        require_path(None, "policy")
    with pytest.raises(UserError, match="--policy .*/nothing: no such file or folder"):
        require_path(tmp_path / "nothing", "policy")
