import copy
import json
from pathlib import Path
from typing import Any

import pytest

from engine.data.tokenizer import Tokenizer, load_tokenizer, train_sentencepiece
from engine.data.tokenizer_likeness import read_alike
from tests.beginnings import write_sentencepiece
from tests.tokenizer_json import EOS, added_token, tokenizer_json, with_model

EOS_ID = tokenizer_json()["added_tokens"][0]["id"]
VOCABULARY = tokenizer_json()["model"]["vocab"]


def written(folder: Path, whole: dict[str, Any], *, gpt2: bool = False) -> Tokenizer:
    folder.mkdir()
    if gpt2:
        (folder / "vocab.json").write_text(json.dumps(whole))
        (folder / "merges.txt").write_text("#version: 0.2\na b\n")
    else:
        (folder / "tokenizer.json").write_text(json.dumps(whole))
    return load_tokenizer(folder)


def with_added(*texts: str, **fields: Any) -> dict[str, Any]:
    whole = tokenizer_json()
    tokens = (added_token(text, EOS_ID + n) for n, text in enumerate(texts, start=1))
    whole["added_tokens"] += [token | fields for token in tokens]
    return whole


def assert_alike(one: Tokenizer, other: Tokenizer, *, alike: bool = True) -> None:
    assert one.reads_as(other) is other.reads_as(one) is alike
    assert not one.is_same_as(other)


@pytest.mark.parametrize("texts", [("<|pad|>",), ("<|im_start|>", "<|im_end|>")])
def test_added_control_tokens_leave_all_texts_alike(tmp_path, texts):
    plain = written(tmp_path / "plain", tokenizer_json())
    more = written(tmp_path / "more", with_added(*texts))
    assert_alike(plain, more)
    assert_alike(more, written(tmp_path / "others", with_added("<|other|>")))  # of the same id
    for text in ("abab <|pad|>", "<|im_start|>a"):
        assert plain.encode(text) == more.encode(text)


def test_an_added_word_another_id_and_another_merge_are_differences(tmp_path):
    plain = written(tmp_path / "plain", tokenizer_json())
    others = {
        "word": with_added("abc", special=False),
        "merge": with_model(
            vocab=VOCABULARY | {EOS: EOS_ID, "ca": 32}, merges=["a b", "ab ab", "c a"]
        ),
        "turned": with_model(vocab=VOCABULARY | {"ab": 30, "abab": 29}),
        "step": tokenizer_json(normalizer={"type": "Lowercase"}),
        "letter": with_model(vocab=VOCABULARY | {EOS: EOS_ID, "é": 32}),
    }
    for name, whole in others.items():
        assert_alike(plain, written(tmp_path / name, whole), alike=False)


def test_another_end_of_text_is_a_difference(tmp_path):
    plain = written(tmp_path / "plain", with_added("<|end|>"))
    (tmp_path / "plain" / "tokenizer_config.json").write_text('{"eos_token": "<|end|>"}')
    assert_alike(plain, load_tokenizer(tmp_path / "plain"), alike=False)


def test_a_piece_that_no_merge_makes_is_no_text(tmp_path):
    pieces = {t: n for n, t in enumerate(["a", "b", "ab", EOS])}
    plain = written(tmp_path / "plain", pieces, gpt2=True)
    assert_alike(plain, written(tmp_path / "more", pieces | {"<|pad|>": 4}, gpt2=True))
    assert_alike(plain, written(tmp_path / "letter", pieces | {"c": 4}, gpt2=True), alike=False)
    byte = pieces | {"<0x0A>": 4}
    assert_alike(plain, written(tmp_path / "byte", byte, gpt2=True), alike=False)
    meaning = json.loads(plain._codec.meaning())
    for field, value in (
        ("ignore_merges", True),  # then whole words are looked up
        ("continuing_subword_prefix", "##"),
        ("unk_token", "<|pad|>"),
        ("type", "WordPiece"),
    ):
        one, other = copy.deepcopy(meaning), copy.deepcopy(meaning)
        one["model"][field] = other["model"][field] = value
        assert read_alike(json.dumps(one).encode(), json.dumps(other).encode())
        other["model"]["vocab"]["<|pad|>"] = 4
        assert not read_alike(json.dumps(one).encode(), json.dumps(other).encode())


def test_tokens_added_to_a_sentencepiece_model_are_control_tokens(tmp_path):
    texts = ["the mill is a cheap pub near the river"] * 20
    plain = train_sentencepiece(texts, tmp_path / "tokenizer.model", vocab_size=290)
    (tmp_path / "more").mkdir()
    plain.save(tmp_path / "more")
    (tmp_path / "more" / "added_tokens.json").write_text('{"<|pad|>": 290}')
    (tmp_path / "more" / "special_tokens_map.json").write_text('{"pad_token": "<|pad|>"}')
    assert_alike(plain, load_tokenizer(tmp_path / "more"))
    other = train_sentencepiece(texts, tmp_path / "other.model", vocab_size=289)
    assert_alike(plain, other, alike=False)
    byte_pairs = written(tmp_path / "json", tokenizer_json())
    assert_alike(plain, byte_pairs, alike=False)


def test_another_beginning_of_text_is_a_difference(tmp_path):
    plain = load_tokenizer(write_sentencepiece(tmp_path / "plain"))
    begun = load_tokenizer(write_sentencepiece(tmp_path / "begun", add_bos_token=True))
    assert plain.encode("the mill") == begun.encode("the mill")
    assert_alike(plain, begun, alike=False)
