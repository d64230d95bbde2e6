import json
from pathlib import Path

import pytest
from hypothesis import given
from hypothesis import strategies as st

from engine.data.tokenizer_settings import MAX_SETTINGS_BYTES, read_settings
from engine.errors import UserError
from tests.fuzzing import fuzzed
from tests.special_files import KINDS, make_special

NAMES = (
    "tokenizer_config.json",
    "special_tokens_map.json",
    "added_tokens.json",
    "generation_config.json",
    "config.json",
)


def write(folder: Path, **files: object) -> Path:
    for name, content in files.items():
        (folder / f"{name}.json").write_text(json.dumps(content))
    return folder


def refusal(folder: Path) -> str:
    with pytest.raises(UserError) as caught:
        read_settings(folder)
    message = str(caught.value)
    assert len(message.splitlines()) == 1 and len(message) < 700
    return message


def test_an_empty_folder_names_nothing(tmp_path):
    found = read_settings(tmp_path)
    assert (found.end_of_text, found.model_ends, found.added, found.special) == (None, (), {}, ())
    assert found.tokenizer == found.generation == {}


@pytest.mark.parametrize("name", ["tokenizer_config", "special_tokens_map"])
@pytest.mark.parametrize("token", ["<stop>", {"content": "<stop>", "lstrip": False}])
def test_either_file_names_the_end(tmp_path, name, token):
    found = read_settings(write(tmp_path, **{name: {"eos_token": token}}))
    assert (found.end_of_text, found.end_path) == ("<stop>", str(tmp_path / f"{name}.json"))
    assert found.special == ("<stop>",)


def test_two_ends_of_the_tokenizer_are_one_error(tmp_path):
    one, other = {"eos_token": "<a>"}, {"eos_token": {"content": "<b>"}}
    message = refusal(write(tmp_path, tokenizer_config=one, special_tokens_map=other))
    for part in ("tokenizer_config.json", "special_tokens_map.json", "'<a>'", "'<b>'"):
        assert part in message
    write(tmp_path, special_tokens_map=one)
    assert read_settings(tmp_path).end_of_text == "<a>"


@pytest.mark.parametrize(
    ("generation", "config", "expected", "source"),
    [
        (None, 5, (5,), "config.json"),
        (None, [5, 6, 5], (5, 6), "config.json"),
        ([5, 6], 5, (5, 6), "generation_config.json"),  # Qwen's chat models
        ([5, 6], 6, (5, 6), "generation_config.json"),  # Llama 3's
        (5, [5, 6], (5,), "generation_config.json"),
        (None, None, (), ""),
        (None, 50256, (), ""),  # what transformers writes beside a smaller vocabulary
        ([50256, 7], 50256, (7,), "generation_config.json"),
    ],
)
def test_the_models_ends_are_a_number_or_a_list(tmp_path, generation, config, expected, source):
    write(
        tmp_path,
        generation_config={"eos_token_id": generation},
        config={"eos_token_id": config, "vocab_size": 100},
    )
    found = read_settings(tmp_path)
    assert found.model_ends == expected
    assert found.model_path == (source and str(tmp_path / source))


def test_a_model_whose_files_share_no_end_is_refused(tmp_path):
    message = refusal(
        write(tmp_path, generation_config={"eos_token_id": [7, 8]}, config={"eos_token_id": 5})
    )
    assert f"{tmp_path / 'generation_config.json'} has eos_token_id [7, 8]" in message
    assert f"{tmp_path / 'config.json'} 5: correct one" in message


@pytest.mark.parametrize("value", [True, 3, "<a><b>"])
def test_what_lists_no_tokens_is_refused(tmp_path, value):
    for name in ("additional_special_tokens", "extra_special_tokens"):
        message = refusal(write(tmp_path, tokenizer_config={name: value}))
        assert f"{name} is {value!r}, which lists no tokens" in message


@pytest.mark.parametrize("value", [True, -1, 1.5, "5", [5, "6"], {}, [[5]]])
def test_what_is_no_id_is_refused(tmp_path, value):
    assert "no token's id" in refusal(write(tmp_path, config={"eos_token_id": value}))


def test_added_tokens_come_from_both_files_with_what_is_special(tmp_path):
    decoder = {"7": {"content": "<a>", "special": True}, "8": {"content": "<b>", "special": False}}
    config = {"added_tokens_decoder": decoder, "pad_token": "<pad>"}
    write(tmp_path, tokenizer_config=config, added_tokens={"<b>": 8, "<pad>": 9})
    found = read_settings(tmp_path)
    assert found.added == {"<a>": 7, "<b>": 8, "<pad>": 9}
    assert found.special == ("<a>", "<pad>")
    write(tmp_path, added_tokens={"<b>": 9})
    message = refusal(tmp_path)
    assert "added_tokens.json: '<b>' has the id 9, in" in message and "8: correct" in message


@pytest.mark.parametrize(
    "files",
    [
        {"added_tokens": {"<a>": "7"}},
        {"added_tokens": {"<a>": -1}},
        {"added_tokens": {"<a>": 2**40}},
        {"added_tokens": {"\ud800": 3}},
        {"tokenizer_config": {"added_tokens_decoder": {"x": {"content": "<a>"}}}},
        {"tokenizer_config": {"added_tokens_decoder": {"7": {}}}},
        {"tokenizer_config": {"added_tokens_decoder": [1]}},
    ],
)
def test_added_tokens_of_anything_are_one_line(tmp_path, files):
    assert str(tmp_path) in refusal(write(tmp_path, **files))


def test_what_the_run_does_not_use_is_kept_and_code_is_not(tmp_path):
    kept = {
        "pad_token": "<pad>",
        "bos_token": {"content": "<s>"},
        "additional_special_tokens": ["<x>"],
        "chat_template": "{{ messages }}",
        "model_max_length": 77,
    }
    code = {"auto_map": {"AutoTokenizer": ["a.B", None]}, "tokenizer_class": "B"}
    generation = {"top_p": 0.9, "eos_token_id": [5]}
    write(
        tmp_path,
        tokenizer_config=kept | code,
        generation_config=generation | {"custom_generate": "there", "auto_map": {}},
    )
    found = read_settings(tmp_path)
    assert (found.tokenizer, found.generation) == (kept, generation)
    assert found.special == ("<pad>", "<s>", "<x>")
    (tmp_path / "chat_template.jinja").write_text("of a file")  # goes first in transformers
    assert read_settings(tmp_path).tokenizer["chat_template"] == "of a file"


@pytest.mark.parametrize("kind", KINDS)
@pytest.mark.parametrize("name", [*NAMES, "chat_template.jinja"])
def test_only_regular_files_are_read(tmp_path, name, kind):
    make_special(tmp_path / name, kind)
    assert name in refusal(tmp_path)


@pytest.mark.parametrize("name", [*NAMES, "chat_template.jinja"])
def test_a_file_is_bounded(tmp_path, name):
    (tmp_path / name).write_bytes(b" " * (MAX_SETTINGS_BYTES + 1))
    assert str(MAX_SETTINGS_BYTES) in refusal(tmp_path)


VALUES = st.recursive(
    st.none() | st.booleans() | st.integers(-9, 2**31) | st.text(max_size=9),
    lambda inner: st.lists(inner, max_size=3) | st.dictionaries(st.text(max_size=3), inner),
    max_leaves=5,
)
FIELDS = ("eos_token", "eos_token_id", "vocab_size", "added_tokens_decoder", "pad_token", "7")
LISTS = ("additional_special_tokens", "extra_special_tokens", "chat_template")


@pytest.fixture(scope="module")
def spoiled(tmp_path_factory) -> Path:
    return tmp_path_factory.mktemp("spoiled")


@pytest.mark.fuzz
@fuzzed
@given(
    name=st.sampled_from(NAMES),
    content=st.dictionaries(st.sampled_from(FIELDS + LISTS) | st.text(max_size=3), VALUES)
    | VALUES
    | st.binary(),
)
def test_any_content_is_settings_or_one_line(spoiled, name, content):
    path = spoiled / name
    path.write_bytes(content if isinstance(content, bytes) else json.dumps(content).encode())
    try:
        found = read_settings(spoiled)
        json.dumps([found.added, found.special, found.tokenizer, found.generation])
    except UserError as error:
        assert len(str(error).splitlines()) <= 2 and len(str(error)) < 2000
        assert str(spoiled) in str(error)
    finally:
        path.unlink()
