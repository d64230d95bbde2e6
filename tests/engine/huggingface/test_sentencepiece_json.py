import gzip
import json
import random
from pathlib import Path

import pytest
import tokenizers

from engine.data.tokenizer import Tokenizer, load_tokenizer, train_sentencepiece
from engine.errors import UserError
from engine.huggingface import sentencepiece_json as converter
from engine.huggingface.sentencepiece_json import sentencepiece_json
from tests.engine.huggingface.sentencepiece_models import KINDS, WORDS, any_text, write_model


def theirs_of(tokenizer: Tokenizer) -> tokenizers.Tokenizer:
    theirs = tokenizers.Tokenizer.from_str(sentencepiece_json(tokenizer)[0].decode())
    theirs.encode_special_tokens = True
    return theirs


@pytest.fixture(scope="session")
def real_texts() -> list[str]:
    """Real prose where the data pack is, else none: what needs it then has the other texts."""
    path = Path(__file__).resolve().parents[4] / "shared" / "data" / "pretrain" / "val.jsonl.gz"
    if not path.exists():
        return []
    with gzip.open(path) as stream:
        return [json.loads(line)["text"] for line in stream]


@pytest.mark.parametrize("name", KINDS)
def test_every_kind_gives_the_same_ids_and_text(tmp_path, name, real_texts):
    tokenizer = load_tokenizer(write_model(tmp_path / "a.model", **KINDS[name]))
    theirs = theirs_of(tokenizer)
    draw, differing = random.Random(name), []
    for _ in range(3000):
        text = any_text(draw, real_texts)
        ids = theirs.encode(text, add_special_tokens=False).ids
        if ids != tokenizer.encode(text):
            differing.append(text)
    # Maps that normalise: several marks on a letter; see MAY_DIFFER.
    assert len(differing) <= (1 if "nfkc" in str(KINDS[name]) or name not in LOSSLESS else 0)
    text = "the mill is cheap"
    assert theirs.decode(tokenizer.encode(text)) == tokenizer.decode(tokenizer.encode(text)) == text


LOSSLESS = ("llama", "lossless unigram")


def test_our_own_form_gives_the_same_ids_for_every_text(
    tmp_path, real_texts, pytestconfig
):  # --fuzz-inputs says how many
    texts = [text[:2000] for text in real_texts[:50]] or [" ".join(WORDS)] * 9
    tokenizer = train_sentencepiece(texts, tmp_path / "own.model", vocab_size=300 + 2 * len(texts))
    theirs, draw = theirs_of(tokenizer), random.Random(0)
    for _ in range(max(3000, pytestconfig.getoption("--fuzz-inputs") or 0)):
        text = any_text(draw, real_texts)
        ids = theirs.encode(text, add_special_tokens=False).ids
        assert ids == tokenizer.encode(text), text
        assert theirs.decode(ids) == text


def test_added_control_tokens_go_along(tmp_path):
    write_model(tmp_path / "tokenizer.model", **KINDS["llama"])
    size = load_tokenizer(tmp_path).vocab_size
    added = {"<pad>": size, "<|im_end|>": size + 1}
    (tmp_path / "added_tokens.json").write_text(json.dumps(added))
    named = {"pad_token": "<pad>", "eos_token": "<|im_end|>"}
    (tmp_path / "tokenizer_config.json").write_text(json.dumps(named))
    tokenizer = load_tokenizer(tmp_path)
    assert (tokenizer.vocab_size, tokenizer.eos_id) == (size + 2, size + 1)
    theirs = theirs_of(tokenizer)
    assert [theirs.token_to_id(text) for text in added] == [size, size + 1]
    text = "the <|im_end|> mill"
    assert theirs.encode(text, add_special_tokens=False).ids == tokenizer.encode(text)


@pytest.mark.parametrize(
    ("options", "problem"),
    [
        ({"model_type": "char"}, "words or characters"),
        ({"treat_whitespace_as_suffix": True}, "spaces at the ends"),
    ],
)
def test_what_has_no_such_form_is_refused(tmp_path, options, problem):
    path = write_model(tmp_path / "a.model", **options)
    with pytest.raises(UserError, match=problem) as caught:
        sentencepiece_json(load_tokenizer(path))
    assert str(caught.value).startswith(str(path))


def test_what_would_give_other_ids_is_refused(tmp_path, monkeypatch):
    path = write_model(tmp_path / "a.model", **KINDS["byte pairs"])
    monkeypatch.setattr(converter, "_normalizer_steps", lambda *arguments, **named: [])
    with pytest.raises(UserError, match="would read .* its tokenizer is not exported") as caught:
        sentencepiece_json(load_tokenizer(path))
    assert len(str(caught.value).splitlines()) == 1
