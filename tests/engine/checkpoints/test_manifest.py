import json
import os
from pathlib import Path

import pytest
import xxhash
from hypothesis import given
from hypothesis import strategies as st

from engine.checkpoints.manifest import (
    Damage,
    FileDigest,
    Manifest,
    check_files,
    digest_of_bytes,
    digest_of_file,
    read_manifest,
    write_manifest,
)
from engine.errors import UserError
from tests.engine.checkpoints.near_json import near, refused_or_read
from tests.fuzzing import fuzzed
from tests.special_files import KINDS, make_special

EMPTY = "99aa06d3014798d86001c324468d497f"  # XXH3-128 of no bytes, as its specification has it


def written(folder: Path, step: int | None = 3, **files: str) -> Manifest:
    """Write files, whose names have __ for the slash, and their manifest."""
    found = {}
    for name, text in files.items():
        path = folder / name.replace("__", "/")
        path.parent.mkdir(exist_ok=True, parents=True)
        path.write_text(text)
        found[name.replace("__", "/")] = digest_of_bytes(text.encode())
    manifest = Manifest(step=step, files=found)
    write_manifest(folder, manifest)
    return manifest


def write_wrapped(folder: Path, content: object) -> None:
    """Write a manifest with a correct checksum, whatever it says."""
    text = json.dumps(content, sort_keys=True)
    digest = xxhash.xxh3_128_hexdigest(text.encode())
    (folder / "manifest.json").write_text(json.dumps({"manifest": content, "xxh3_128": digest}))


def test_digest_is_the_length_and_xxh3_of_the_bytes(tmp_path: Path):
    (tmp_path / "empty").touch()
    assert digest_of_file(tmp_path / "empty") == FileDigest(bytes=0, xxh3_128=EMPTY)
    assert digest_of_bytes(b"") == FileDigest(bytes=0, xxh3_128=EMPTY)
    (tmp_path / "large").write_bytes(b"\xc3\xa9" * (3 << 20))  # more than is hashed at a time
    expected = FileDigest(
        bytes=6 << 20, xxh3_128=xxhash.xxh3_128_hexdigest(b"\xc3\xa9" * (3 << 20))
    )
    assert digest_of_file(tmp_path / "large") == expected
    assert digest_of_bytes("é".encode() * (3 << 20)) == expected


@pytest.mark.parametrize("step", [None, 0, 12])
def test_manifest_is_read_as_it_was_written(step: int | None, tmp_path: Path):
    manifest = written(tmp_path, step, policy__a="one", b="two")
    assert read_manifest(tmp_path) == manifest
    assert check_files(tmp_path, manifest, manifest.files) == ""


def test_every_byte_of_a_manifest_counts(tmp_path: Path):
    manifest = written(tmp_path, policy__a="one")
    path = tmp_path / "manifest.json"
    content = path.read_bytes()
    for place in range(len(content)):
        path.write_bytes(content[:place] + bytes([content[place] ^ 1]) + content[place + 1 :])
        try:
            assert read_manifest(tmp_path) == manifest, content[place - 5 : place + 5]
        except Damage as error:
            assert str(path) in str(error)
            continue
        assert content[place : place + 1].isspace()  # between the values


@pytest.mark.parametrize("num_bytes", [0, 1, 50])
def test_cut_manifest_is_damage(num_bytes: int, tmp_path: Path):
    written(tmp_path, a="one")
    path = tmp_path / "manifest.json"
    path.write_bytes(path.read_bytes()[:num_bytes])
    with pytest.raises(Damage, match="not JSON"):
        read_manifest(tmp_path)


@pytest.mark.parametrize("kind", KINDS)
def test_special_file_is_no_manifest(kind: str, tmp_path: Path):
    make_special(tmp_path / "manifest.json", kind)
    with pytest.raises(Damage, match=r"manifest\.json"):
        read_manifest(tmp_path)


def test_missing_manifest_is_damage_and_an_older_form_is_told(tmp_path: Path):
    with pytest.raises(Damage, match="not a checkpoint, or one whose save was cut short"):
        read_manifest(tmp_path)
    (tmp_path / "policy").mkdir()
    (tmp_path / "policy" / ".metadata").write_bytes(b"a pickle")
    with pytest.raises(Damage, match="a checkpoint of before manifests"):
        read_manifest(tmp_path)


@pytest.mark.parametrize(
    ("change", "cause"),
    [
        ({"format": 2}, "format 2, where this Trident reads format 1"),
        ({"format": "x" * 10**6}, "format 'xxx"),
        ({"step": -1}, "no step"),
        ({"step": True}, "no step"),
        ({"step": 1.0}, "no step"),
        ({"step": 10**40}, "no step"),
        ({"files": []}, "no list of files"),
        ({"files": {"../x": {"bytes": 1, "xxh3_128": ""}}}, "is no file of a checkpoint"),
        ({"files": {"/etc/passwd": {"bytes": 1, "xxh3_128": ""}}}, "is no file of a checkpoint"),
        ({"files": {"a/../b": {"bytes": 1, "xxh3_128": ""}}}, "is no file of a checkpoint"),
        ({"files": {"a/b/c": {"bytes": 1, "xxh3_128": ""}}}, "is no file of a checkpoint"),
        ({"files": {"a\0": {"bytes": 1, "xxh3_128": ""}}}, "is no file of a checkpoint"),
        ({"files": {"a\n": {"bytes": 1, "xxh3_128": ""}}}, "is no file of a checkpoint"),
        ({"files": {"": {"bytes": 1, "xxh3_128": ""}}}, "is no file of a checkpoint"),
        ({"files": {"a" * 5000: {"bytes": 1, "xxh3_128": ""}}}, "is no file of a checkpoint"),
        ({"files": {"a": "b"}}, "is no file of a checkpoint"),
        ({"files": {"a": {"bytes": "1", "xxh3_128": ""}}}, "has no bytes or no xxh3_128"),
        ({"files": {"a": {"bytes": -1, "xxh3_128": ""}}}, "has no bytes or no xxh3_128"),
        ({"files": {"a": {"bytes": 10**400, "xxh3_128": ""}}}, "has no bytes or no xxh3_128"),
        ({"files": {"a": {"bytes": 1, "xxh3_128": None}}}, "has no bytes or no xxh3_128"),
    ],
)
def test_hostile_manifest_with_its_checksum_is_an_error(change: dict, cause: str, tmp_path: Path):
    write_wrapped(tmp_path, {"format": 1, "step": 3, "files": {}} | change)
    with pytest.raises(UserError, match=cause) as error:
        read_manifest(tmp_path)
    assert len(str(error.value)) < len(str(tmp_path)) + 300


@pytest.mark.parametrize("change", [0, 1])
def test_manifest_as_deep_as_can_just_be_read_is_damage(change: int, tmp_path: Path):
    for depth in range(800 + change, 1000, 2):
        text = '{"manifest": {"a": ' + "[" * depth + "]" * depth + '}, "xxh3_128": ""}'
        (tmp_path / "manifest.json").write_text(text)
        with pytest.raises(Damage):
            read_manifest(tmp_path)


def test_first_file_that_is_another_is_named(tmp_path: Path):
    manifest = written(tmp_path, a="one", b="two", c="six")
    (tmp_path / "b").write_text("twa")
    path = tmp_path / "b"
    said = f"{path}: damaged: its checksum is not that of what was written"
    assert check_files(tmp_path, manifest, ["a", "b", "c"]) == said
    assert check_files(tmp_path, manifest, ["a", "c"]) == ""
    (tmp_path / "b").write_text("tw")
    assert check_files(tmp_path, manifest, ["b"]) == f"{path}: damaged: 2 bytes, 3 were written"
    path.unlink()
    assert check_files(tmp_path, manifest, ["b"]).startswith(f"{path}: no such file")


def test_links_that_lead_out_of_a_checkpoint_are_damage(tmp_path: Path):
    folder = tmp_path / "step"
    manifest = written(folder, a="one", role__b="two")
    (tmp_path / "elsewhere").write_text("one")
    (folder / "a").unlink()
    (folder / "a").symlink_to("../elsewhere")  # the very bytes
    assert check_files(folder, manifest, ["a"]).endswith("a link that leads out of the checkpoint")
    os.rename(folder / "role", tmp_path / "role")
    (folder / "role").symlink_to("../role")
    assert check_files(folder, manifest, ["role/b"]).endswith("leads out of the checkpoint")
    (folder / "a").unlink()
    (folder / "a").symlink_to("a")
    assert str(folder / "a") in check_files(folder, manifest, ["a"])


@pytest.mark.parametrize("kind", KINDS)
def test_special_files_are_damage(kind: str, tmp_path: Path):
    manifest = written(tmp_path, a="one")
    make_special(tmp_path / "a", kind)
    assert str(tmp_path / "a") in check_files(tmp_path, manifest, ["a"])


@pytest.mark.fuzz
@fuzzed
@given(data=st.data())
def test_any_manifest_is_read_or_refused(tmp_path: Path, data: st.DataObject):
    digest = {"bytes": 3, "xxh3_128": EMPTY}
    good = {
        "format": 1,
        "step": 3,
        "files": {"policy/weights-00000.safetensors": digest, "b": {**digest}},
    }
    content, is_signed = data.draw(near(good)), data.draw(st.booleans())
    if is_signed:
        write_wrapped(tmp_path, content)
    else:
        wrapped = data.draw(near({"manifest": good, "xxh3_128": EMPTY}))
        (tmp_path / "manifest.json").write_text(json.dumps(wrapped))
    found = refused_or_read(lambda: read_manifest(tmp_path))
    if found is not None:
        assert is_signed and content["format"] == 1
        assert all(".." not in name and "\0" not in name for name in found.files)


@pytest.mark.fuzz
@fuzzed
@given(content=st.binary(max_size=200))
def test_bytes_are_no_manifest(tmp_path: Path, content: bytes):
    (tmp_path / "manifest.json").write_bytes(content)
    assert refused_or_read(lambda: read_manifest(tmp_path)) is None
