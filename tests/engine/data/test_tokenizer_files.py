import json
import os
import re
from pathlib import Path

import pytest
from hypothesis import given
from hypothesis import strategies as st

from engine.data.tokenizer_files import read_tokenizer_files
from engine.errors import UserError
from tests.fuzzing import fuzzed
from tests.special_files import KINDS, make_special


def refusal(path: Path) -> str:
    with pytest.raises(UserError) as caught:
        read_tokenizer_files(path)
    message = str(caught.value)
    assert len(message.splitlines()) == 1 and len(message) < 600
    return message


@pytest.mark.parametrize(
    ("names", "kind", "contents"),
    [
        (["tokenizer.model"], "sentencepiece", {"tokenizer.model": b"0"}),
        (["any.model"], "sentencepiece", {"tokenizer.model": b"0"}),
        (["encoder.json", "vocab.bpe"], "gpt2", {"encoder.json": b"0", "vocab.bpe": b"1"}),
        (["vocab.json", "merges.txt"], "gpt2", {"encoder.json": b"0", "vocab.bpe": b"1"}),
        (
            ["tokenizer.json", "vocab.json", "merges.txt", "a.model"],
            "huggingface",
            {"tokenizer.json": b"0"},
        ),
    ],
)
def test_files_are_found_in_a_folder_and_by_name(tmp_path, names, kind, contents):
    for number, name in enumerate(names):
        (tmp_path / name).write_text(str(number))
    for path in (tmp_path, tmp_path / names[0]):
        files = read_tokenizer_files(path)
        assert (files.kind, files.contents) == (kind, contents)
        assert files.settings.end_of_text is None
        assert files.names == tuple(names[: len(contents)])


@pytest.mark.parametrize("name", ["tokenizer.json", "tokenizer.model", "vocab.json", "merges.txt"])
def test_a_pointer_of_git_lfs_is_said_to_be_one(tmp_path, name):
    pointer = "version https://git-lfs.github.com/spec/v1\noid sha256:0a1b\nsize 500000\n"
    (tmp_path / "vocab.json").write_text("{}")
    if name.startswith("tokenizer"):
        (tmp_path / "vocab.json").unlink()
    (tmp_path / name).write_text(pointer)
    said = f"{re.escape(str(tmp_path / name))} is a git-lfs pointer and not the file: run `git lfs"
    with pytest.raises(UserError, match=said):
        read_tokenizer_files(tmp_path)
    (tmp_path / name).unlink()
    (tmp_path / name).symlink_to("blobs/0a1b")
    with pytest.raises(UserError, match=r"is a link to nothing \(blobs/0a1b is gone\)"):
        read_tokenizer_files(tmp_path)


def test_weights_and_a_cache_of_the_hub_are_answered_with_the_folder_to_give(tmp_path):
    (tmp_path / "model.safetensors").touch()
    with pytest.raises(UserError, match=f"is a file of weights: give the .* folder, {tmp_path}"):
        read_tokenizer_files(tmp_path / "model.safetensors")
    (tmp_path / "snapshots").mkdir()
    with pytest.raises(UserError, match="cache of the hub: give a folder in its snapshots/"):
        read_tokenizer_files(tmp_path)


def test_the_digest_is_of_all_that_matters(tmp_path):
    (tmp_path / "tokenizer.json").write_text("{}")
    digests = [read_tokenizer_files(tmp_path).digest()]
    (tmp_path / "tokenizer_config.json").write_text('{"eos_token": "<stop>"}')
    digests.append(read_tokenizer_files(tmp_path).digest())
    (tmp_path / "tokenizer.json").write_text("{} ")
    digests.append(read_tokenizer_files(tmp_path).digest())
    (tmp_path / "tokenizer_config.json").write_text('{"eos_token": "<stop>", "other": 3}')
    assert read_tokenizer_files(tmp_path).digest() == digests[-1]
    assert len(set(digests)) == 3


@pytest.mark.parametrize("kind", KINDS)
@pytest.mark.parametrize(
    "name", ["tokenizer.json", "tokenizer_config.json", "encoder.json", "vocab.bpe", "a.model"]
)
def test_only_regular_files_are_read(tmp_path, name, kind):
    if name == "tokenizer_config.json":
        (tmp_path / "tokenizer.json").write_text("{}")
    if name == "vocab.bpe":
        (tmp_path / "encoder.json").write_text("{}")
    make_special(tmp_path / name, kind)
    assert name in refusal(tmp_path)


@pytest.mark.parametrize(
    "name", ["tokenizer.json", "tokenizer_config.json", "encoder.json", "vocab.bpe", "a.model"]
)
def test_a_file_of_gigabytes_is_not_read(tmp_path, name):
    for beside in ("tokenizer.json", "encoder.json"):
        if {name, beside} in ({"tokenizer_config.json", "tokenizer.json"}, {"vocab.bpe", beside}):
            (tmp_path / beside).write_text("{}")
    (tmp_path / name).touch()
    os.truncate(tmp_path / name, 3 << 30)  # sparse
    if name == "vocab.bpe":
        (tmp_path / "tokenizer.json").unlink(missing_ok=True)
    assert f"{name} has 3221225472 bytes" in refusal(tmp_path)


@pytest.mark.parametrize(
    "content",
    [
        *(b"", b"[]", b"null", b"3", b'{"eos_token": "<|endof', b"\xe9", b'{"eos_token": "\xe9"}'),
        *(b"[" * 100_000, b'{"a":' * 100_000, b'{"a": ' + b"1" * 100_000 + b"}"),
        *(b'{"eos_token": %s}' % each for each in (b"3", b"[]", b'["a"]', b"true", b'""', b"{}")),
        *(b'{"eos_token": {"content": %s}}' % each for each in (b"3", b"null", b"{}", b'""')),
        b'{"eos_token": "\\ud800"}',
        b'{"eos_token": {"lstrip": "%s"}}' % (b"x" * 500_000),
    ],
)
def test_a_config_of_anything_is_one_line(tmp_path, content):
    (tmp_path / "tokenizer.json").write_text("{}")
    (tmp_path / "tokenizer_config.json").write_bytes(content)
    assert refusal(tmp_path).startswith(str(tmp_path / "tokenizer_config.json"))


@pytest.mark.parametrize("content", ["{}", '{"eos_token": null}', '{"special_tokens_map": 3}'])
def test_a_config_that_names_no_end_leaves_it_open(tmp_path, content):
    (tmp_path / "tokenizer.json").write_text("{}")
    (tmp_path / "tokenizer_config.json").write_text(content)
    assert read_tokenizer_files(tmp_path).settings.end_of_text is None


VALUES = st.recursive(
    st.none() | st.booleans() | st.integers() | st.floats() | st.text(max_size=9),
    lambda inner: st.lists(inner, max_size=3) | st.dictionaries(st.text(max_size=3), inner),
    max_leaves=5,
)
ENDS = VALUES | st.fixed_dictionaries({"content": VALUES})


@pytest.fixture(scope="module")
def spoiled(tmp_path_factory) -> Path:
    folder = tmp_path_factory.mktemp("spoiled")
    (folder / "tokenizer.json").write_text("{}")
    return folder


@pytest.mark.fuzz
@fuzzed
@given(config=st.fixed_dictionaries({}, optional={"eos_token": ENDS}) | VALUES | st.binary())
def test_any_config_names_an_end_or_none_or_is_one_line(spoiled, config):
    content = config if isinstance(config, bytes) else json.dumps(config).encode()
    (spoiled / "tokenizer_config.json").write_bytes(content)
    try:
        end = read_tokenizer_files(spoiled).settings.end_of_text
    except UserError as error:
        assert len(str(error).splitlines()) <= 2 and len(str(error)) < 2000
        assert str(spoiled) in str(error)
        return
    named = json.loads(content).get("eos_token")
    assert end in (named, named and isinstance(named, dict) and named["content"])
