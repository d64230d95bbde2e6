import dataclasses
import json
import tempfile
from pathlib import Path

import pytest
from hypothesis import given
from hypothesis import strategies as st

from engine.checkpoints.manifest import MANIFEST, Manifest, digest_of_bytes, write_manifest
from engine.checkpoints.retention import step_name
from engine.errors import UserError
from engine.identity.data_files import DataFile
from engine.identity.record import (
    IDENTITY,
    Acceptance,
    Change,
    Code,
    Identity,
    NetworkRecord,
    TokenizerRecord,
    changes,
    disagreements,
    identity_text,
    read_identity,
    saved_identity,
    write_identity,
)
from tests.engine.checkpoints.near_json import near
from tests.fuzzing import fuzzed

IDENTITY_OF_A_RUN = Identity(
    networks={"reference": NetworkRecord(path="runs/sft", step=37, xxh3_128="a" * 32)},
    data={"data.train": DataFile(path="sft.jsonl", bytes=9, xxh3_128="b" * 32, records=40)},
    tokenizer=TokenizerRecord(sha256="c" * 64),
    packages={"torch": "2.13.0", "numpy": "2.0"},
    code=Code(xxh3_128="d" * 32, commit="76be561"),
    accepted=(
        Acceptance(change=Change(name="torch", old="2.12", new="2.13.0"), step=7, at="then"),
    ),
)


def test_what_is_written_is_read(tmp_path: Path):
    assert read_identity(tmp_path) is None
    write_identity(tmp_path, IDENTITY_OF_A_RUN)
    assert read_identity(tmp_path) == IDENTITY_OF_A_RUN
    assert [path.name for path in tmp_path.iterdir()] == [IDENTITY]


def test_the_same_is_not_written_again(tmp_path: Path):
    write_identity(tmp_path, IDENTITY_OF_A_RUN)
    before = (tmp_path / IDENTITY).stat().st_ino
    write_identity(tmp_path, IDENTITY_OF_A_RUN)
    assert (tmp_path / IDENTITY).stat().st_ino == before
    write_identity(tmp_path, dataclasses.replace(IDENTITY_OF_A_RUN, accepted=()))
    assert read_identity(tmp_path) == dataclasses.replace(IDENTITY_OF_A_RUN, accepted=())


@pytest.mark.parametrize(
    ("content", "cause"),
    [
        ("[]", "a list where an object"),
        ("{", "not JSON"),
        ('{"data": {"data.train": {"bytes": "9"}}}', r"data.data.train.bytes cannot be '9'"),
        ('{"packages": {"torch": 2}}', "packages.torch cannot be 2"),
        ('{"weights": 1}', "unknown field weights"),
    ],
)
def test_what_is_no_identity_is_refused(tmp_path: Path, content: str, cause: str):
    (tmp_path / IDENTITY).write_text(content)
    with pytest.raises(UserError, match=cause) as refused:
        read_identity(tmp_path)
    assert IDENTITY in str(refused.value)


@pytest.mark.fuzz
@fuzzed
@given(st.data())
def test_any_identity_is_read_or_refused_in_a_line(data: st.DataObject):
    content = json.loads(json.dumps(dataclasses.asdict(IDENTITY_OF_A_RUN)))
    with tempfile.TemporaryDirectory() as name:
        (Path(name) / IDENTITY).write_text(json.dumps(data.draw(near(content))))
        try:
            found = read_identity(Path(name))
        except UserError as error:
            assert len(str(error)) < 1000
            return
        assert found is not None
        assert changes(found, found) == []
        assert {change.name for change in changes(found, Identity())} >= set(found.packages) - {
            name for name, version in found.packages.items() if version == "none"
        }


def write_checkpoint(run: Path, step: int, identity: str | None) -> Path:
    """Write what a checkpoint says of its run, and no network."""
    folder = run / "checkpoints" / step_name(step)
    folder.mkdir(parents=True)
    files = {}
    if identity is not None:
        (folder / IDENTITY).write_text(identity)
        files[IDENTITY] = digest_of_bytes(identity.encode())
    write_manifest(folder, Manifest(step=step, files=files))
    return folder


def test_checkpoints_say_the_same_of_runs_that_were_made_from_the_same():
    (accepted,) = IDENTITY_OF_A_RUN.accepted
    elsewhere = dataclasses.replace(
        IDENTITY_OF_A_RUN,
        networks={"reference": NetworkRecord(path="old/sft", step=37, xxh3_128="a" * 32)},
        data={
            "data.train": DataFile(
                path="x", bytes=9, xxh3_128="b" * 32, records=40, mtime_ns=5, ctime_ns=6, inode=7
            )
        },
        tokenizer=TokenizerRecord(path="t.json", sha256="c" * 64),
        accepted=(dataclasses.replace(accepted, at="later"),),
    )
    assert identity_text(elsewhere) == identity_text(IDENTITY_OF_A_RUN)
    other = dataclasses.replace(IDENTITY_OF_A_RUN, packages={"torch": "2.14.0", "numpy": "2.0"})
    assert identity_text(other) != identity_text(IDENTITY_OF_A_RUN)


def test_the_checkpoint_that_the_run_goes_on_from_speaks_first(tmp_path: Path):
    assert saved_identity(tmp_path) is None
    write_checkpoint(tmp_path, 1, None)
    assert saved_identity(tmp_path) is None
    folders = [write_checkpoint(tmp_path, n, identity_text(Identity(stage=f"{n}"))) for n in (2, 3)]
    assert saved_identity(tmp_path) == (Identity(stage="3"), folders[1])
    (tmp_path / "checkpoints" / "latest").write_text(step_name(2))
    assert saved_identity(tmp_path) == (Identity(stage="2"), folders[0])
    (tmp_path / "checkpoints" / "latest").write_text(step_name(1))  # of before identities
    assert saved_identity(tmp_path) == (Identity(stage="3"), folders[1])
    (folders[1] / IDENTITY).write_text("{}")  # damaged
    assert saved_identity(tmp_path) == (Identity(stage="2"), folders[0])
    (folders[0] / MANIFEST).write_text("{}")
    assert saved_identity(tmp_path) is None


def test_checkpoint_of_a_later_version_is_no_run_of_before_identities(tmp_path: Path):
    write_checkpoint(tmp_path, 1, '{"weather": 1}')
    with pytest.raises(UserError, match="unknown field weather; take the version that wrote it"):
        saved_identity(tmp_path)


def test_equal_identities_have_no_changes_whatever_paths_and_times():
    moved = dataclasses.replace(
        IDENTITY_OF_A_RUN,
        networks={"reference": NetworkRecord(path="old/sft", step=36, xxh3_128="a" * 32)},
        data={"data.train": DataFile(path="x", mtime_ns=5, inode=6, xxh3_128="b" * 32)},
        code=Code(xxh3_128="d" * 32, commit=""),
        accepted=(),
    )
    assert changes(IDENTITY_OF_A_RUN, IDENTITY_OF_A_RUN) == []
    assert changes(IDENTITY_OF_A_RUN, moved) == []


def test_every_change_is_named_with_old_and_new(tmp_path: Path):
    lines = tmp_path / "sft.jsonl"
    lines.write_text("{}\n{}\n{}\n")
    now = Identity(
        networks={"reference": NetworkRecord(step=90, xxh3_128="1" * 32)},
        data={
            "data.train": DataFile(path=str(lines), bytes=9, xxh3_128="2" * 32),
            "data.valid": DataFile(path="v.txt", bytes=5, xxh3_128="3" * 32),
        },
        tokenizer=TokenizerRecord(sha256="4" * 64),
        packages={"torch": "2.14.0", "triton": "3.9"},
        code=Code(xxh3_128="5" * 32),
    )
    found = {change.name: (change.old, change.new) for change in changes(IDENTITY_OF_A_RUN, now)}
    assert found == {
        "reference": ("aaaaaaaa, step 37", "11111111, step 90"),
        "data.train": ("40 records, bbbbbbbb", "3 lines, 22222222"),
        "data.valid": ("none", "5 bytes, 33333333"),
        "numpy": ("2.0", "none"),
        "torch": ("2.13.0", "2.14.0"),
        "triton": ("none", "3.9"),
        "code": ("dddddddd (commit 76be561)", "55555555"),
    }
    assert {change.name for change in changes(now, IDENTITY_OF_A_RUN)} == found.keys()


def test_disagreements_are_all_but_what_was_accepted_since():
    def accepting(own: Identity, *found: tuple[str, str, str]) -> Identity:
        more = (Acceptance(change=Change(name=n, old=a, new=b), step=9) for n, a, b in found)
        return dataclasses.replace(own, accepted=(*own.accepted, *more))

    saved = IDENTITY_OF_A_RUN
    own = dataclasses.replace(
        saved,
        data={"data.train": DataFile(path="y", bytes=7, xxh3_128="2" * 32, records=3)},
        code=Code(xxh3_128="5" * 32, commit="later"),
        accepted=tuple(dataclasses.replace(each, at="") for each in saved.accepted),
    )
    data, code = (
        ("data.train", "40 records, bbbbbbbb", "9 lines, 77777777"),
        ("code", "dddddddd (commit 76be561)", "55555555 (commit then)"),
    )
    again = ("data.train", "9 records, 77777777", "3 lines, 22222222")
    assert disagreements(saved, saved) == []
    assert [c.name for c in disagreements(saved, own)] == ["data.train", "code"]
    assert [c.name for c in disagreements(saved, accepting(own, code))] == ["data.train"]
    assert disagreements(saved, accepting(own, data, code, again)) == []
    for partly in ((code, data), (code, again)):  # another content than was accepted
        assert [c.name for c in disagreements(saved, accepting(own, *partly))] == ["data.train"]
    fewer = dataclasses.replace(saved, accepted=())
    assert disagreements(saved, fewer) == [Change(name="accepted", old="torch", new="nothing")]
    assert disagreements(fewer, saved) == []
    for name, other in (
        ("stage", dataclasses.replace(saved, stage="rm")),
        (
            "tokenizer",
            dataclasses.replace(saved, stage="sft", tokenizer=TokenizerRecord(sha256="9" * 64)),
        ),
    ):
        mine = dataclasses.replace(saved, stage="sft")
        assert [c.name for c in disagreements(mine, other)] == [name]
        assert disagreements(mine, dataclasses.replace(mine, stage="")) == []
