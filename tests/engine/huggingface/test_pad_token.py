import json
from pathlib import Path
from typing import Any

import pytest
from transformers import AutoTokenizer

from engine.data.tokenizer import load_tokenizer
from engine.errors import UserError
from engine.huggingface.pad_token import PAD, ensure_pad_token
from tests.tokenizer_json import EOS, added_token, tokenizer_json

PLAIN = {"tokenizer_class": "PreTrainedTokenizerFast", "eos_token": EOS}
EOS_ID = tokenizer_json()["added_tokens"][0]["id"]
TEXT = "abab, the cat sat on a mat."


def written(folder: Path, *, tokens: tuple[str, ...] = (), **settings: Any) -> Path:
    """Write a tokenizer.json with more special tokens behind its end of text, and its settings."""
    whole = tokenizer_json()
    whole["added_tokens"] += [added_token(t, EOS_ID + n) for n, t in enumerate(tokens, start=1)]
    (folder / "tokenizer.json").write_text(json.dumps(whole))
    (folder / "tokenizer_config.json").write_text(json.dumps(PLAIN | settings))
    return folder


def assert_both_read_it(folder: Path, pad_id: int, before: list[int]) -> None:
    theirs = AutoTokenizer.from_pretrained(folder)
    assert (theirs.pad_token_id, theirs.eos_token_id) == (pad_id, EOS_ID)
    assert theirs.encode(TEXT, add_special_tokens=False) == before
    ours = load_tokenizer(folder)
    assert ours.encode(TEXT) == before and ours.eos_id == EOS_ID


@pytest.mark.parametrize("form", ["[PAD]", {"__type": "AddedToken", "content": "[PAD]"}])
def test_a_special_token_that_is_the_tokenizers_own_stays(tmp_path, form):
    written(tmp_path, tokens=("<unk>", "[PAD]"), pad_token=form)
    before = {path: path.read_bytes() for path in tmp_path.iterdir()}
    ids = load_tokenizer(tmp_path).encode(TEXT)
    assert ensure_pad_token(tmp_path, EOS_ID) == EOS_ID + 2
    assert {path: path.read_bytes() for path in tmp_path.iterdir()} == before
    assert_both_read_it(tmp_path, EOS_ID + 2, ids)


@pytest.mark.parametrize("named", [None, EOS, "a", "[GONE]"])
def test_one_is_added_where_it_is_none_the_end_a_letter_or_unknown(tmp_path, named):
    written(tmp_path, tokens=("<unk>",), pad_token=named)
    ids = load_tokenizer(tmp_path).encode(TEXT)
    assert ensure_pad_token(tmp_path, EOS_ID) == EOS_ID + 2
    assert_both_read_it(tmp_path, EOS_ID + 2, ids)
    assert AutoTokenizer.from_pretrained(tmp_path).pad_token == PAD
    assert ensure_pad_token(tmp_path, EOS_ID) == EOS_ID + 2  # once is enough


@pytest.mark.parametrize("ends", [EOS_ID + 1, [EOS_ID, EOS_ID + 1]])
def test_what_ends_an_answer_beside_the_end_of_text_is_no_padding(tmp_path, ends):
    written(tmp_path, tokens=("<|end|>", "<|other|>"), pad_token="<|end|>")
    assert ensure_pad_token(tmp_path, EOS_ID) == EOS_ID + 1
    (tmp_path / "generation_config.json").write_text(json.dumps({"eos_token_id": ends}))
    assert ensure_pad_token(tmp_path, EOS_ID) == EOS_ID + 3


def test_gpt2s_two_files_get_it_behind_their_last_piece(tmp_path):
    alphabet = ["a", "b", "c", "ab", EOS]
    (tmp_path / "vocab.json").write_text(json.dumps({t: n for n, t in enumerate(alphabet)}))
    (tmp_path / "merges.txt").write_text("#version: 0.2\na b\n")
    (tmp_path / "tokenizer_config.json").write_text(
        json.dumps({"tokenizer_class": "GPT2Tokenizer"})
    )
    assert ensure_pad_token(tmp_path, 4) == 5
    theirs = AutoTokenizer.from_pretrained(tmp_path)
    assert (theirs.pad_token_id, theirs.eos_token_id) == (5, 4)
    assert theirs.encode("abc") == load_tokenizer(tmp_path).encode("abc") == [3, 2]


def test_ids_with_gaps_are_refused_with_what_to_do(tmp_path):
    whole = tokenizer_json()
    whole["model"]["vocab"]["q"] = EOS_ID + 1  # the library counts pieces, and would give it twice
    whole["model"]["vocab"][EOS] = EOS_ID
    del whole["model"]["vocab"]["z"]
    (tmp_path / "tokenizer.json").write_text(json.dumps(whole))
    with pytest.raises(UserError, match="the ids have gaps; name a padding token"):
        ensure_pad_token(tmp_path, EOS_ID)
