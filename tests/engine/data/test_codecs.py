import io
import json
from pathlib import Path

import pytest
import sentencepiece
from hypothesis import given
from hypothesis import strategies as st

from engine.data.codecs import open_codec
from engine.data.tokenizer_files import TokenizerFiles
from engine.data.tokenizer_settings import TokenizerSettings
from engine.errors import UserError
from tests.fuzzing import fuzzed
from tests.tokenizer_json import EOS, added_token, replace, sequence, split, tokenizer_json


def files_of(kind: str, *contents: bytes) -> TokenizerFiles:
    names = {
        "huggingface": ["tokenizer.json"],
        "sentencepiece": ["tokenizer.model"],
        "gpt2": ["encoder.json", "vocab.bpe"],
    }[kind]
    return TokenizerFiles(
        path=Path("elsewhere") / names[0],
        kind=kind,
        contents=dict(zip(names, contents, strict=True)),
    )


def huggingface(**parts: object) -> TokenizerFiles:
    return files_of("huggingface", json.dumps(tokenizer_json(**parts)).encode())


def test_a_codec_says_what_its_files_do():
    codec = open_codec(huggingface(normalizer={"type": "Lowercase"}))
    assert codec.normalize("ABba") == "abba"
    assert codec.encode(["ABab", "c"]) == [[30], [2]]
    assert codec.decode([30, codec.eos_id, 2]) == "ababc"
    assert (codec.vocab_size, codec.eos_id) == (32, 31)
    assert json.loads(codec.steps[0]) == {"type": "Lowercase"}
    assert open_codec(huggingface()).normalize("ABba") == "ABba"


def test_what_the_library_would_put_before_a_text_is_known_and_not_encoded():
    special = {EOS: {"id": EOS, "ids": [31], "tokens": [EOS]}}
    parts = [{"SpecialToken": {"id": EOS, "type_id": 0}}, {"Sequence": {"id": "A", "type_id": 0}}]
    template = {
        "type": "TemplateProcessing",
        "single": parts,
        "pair": parts,
        "special_tokens": special,
    }
    codec = open_codec(huggingface(post_processor=template))
    assert (codec.bos_ids, codec.bos_text) == ((31,), EOS)
    assert codec.encode(["abab"]) == [[30]]
    assert (open_codec(huggingface()).bos_ids, open_codec(huggingface()).bos_text) == ((), "")


def test_two_files_of_gpt2_without_a_piece_are_refused():
    with pytest.raises(UserError, match=r"encoder\.json: a vocabulary without a piece"):
        open_codec(files_of("gpt2", b"{}", b""))


def test_a_panic_of_the_library_is_one_line():
    codec = open_codec(huggingface(pre_tokenizer=split("(a+)+$")))
    with pytest.raises(UserError, match=r"tokenizer.json does not encode a text: .*retry-limit"):
        codec.encode(["a" * 64 + "b"])


@pytest.mark.parametrize(
    ("parts", "problem"),
    [
        ({"added_tokens": []}, "has no end-of-text token"),
        ({"added_tokens": [added_token("x" * 5000, 31), added_token(EOS, 32)]}, "5000 characters"),
    ],
)
def test_an_unfit_vocabulary_is_named(parts, problem):
    with pytest.raises(UserError, match=problem) as caught:
        open_codec(huggingface(**parts))
    assert len(str(caught.value)) < 300


def test_a_long_name_of_the_end_is_cut():
    files = huggingface()
    named = TokenizerFiles(
        path=files.path,
        kind=files.kind,
        contents=files.contents,
        settings=TokenizerSettings(end_of_text="x" * 10**6),
    )
    with pytest.raises(UserError) as caught:
        open_codec(named)
    assert len(str(caught.value)) < 300


# Any bytes: in this process, without the trial, which test_tokenizer_trial has for some.

TEXTS = ["abab, the mill.", "é \u2581漢🙂\n\n", ""]


def assert_loads_or_is_one_line(files: TokenizerFiles) -> None:
    try:
        codec = open_codec(files, num_threads=1)
        for ids in codec.encode(TEXTS[:1]) + [codec.encode([text])[0] for text in TEXTS]:
            assert all(0 <= token < codec.vocab_size for token in ids)
            codec.decode(ids)
        codec.decode(list(range(codec.vocab_size)))
        assert 0 <= codec.eos_id < codec.vocab_size
    except UserError as error:
        assert str(error).startswith(str(files.path))
        assert len(str(error).splitlines()) <= 2 and len(str(error)) < 2000


NUMBERS = st.sampled_from([0, 1, 2, 30, 31, -1, 2**31, 2**32 - 1, 2**32, 1.5])
SHORT = st.text("ab <>\u2581\\(+*?)[.$^", max_size=6)
STEPS = st.recursive(
    st.one_of(
        st.builds(replace, SHORT, SHORT, kind=st.sampled_from(["String", "Regex"])),
        st.builds(split, SHORT),
        st.builds(lambda text: {"type": "Prepend", "prepend": text}, SHORT),
        st.builds(
            lambda text, a, b: {"type": "Strip", "content": text, "start": a, "stop": b},
            SHORT,
            NUMBERS,
            NUMBERS,
        ),
        st.builds(
            lambda name: {"type": name},
            st.sampled_from(
                ["NFC", "NFKD", "Lowercase", "Fuse", "ByteFallback", "Nmt", "Whitespace", "Digits"]
            ),
        ),
        st.builds(
            lambda blob: {"type": "Precompiled", "precompiled_charsmap": blob},
            st.sampled_from(["", "AAAA", "////////", "BAAAAAAAAAA="]),
        ),
        st.none(),
    ),
    lambda inner: st.builds(
        sequence,
        st.sampled_from(["normalizers", "pretokenizers", "decoders", "processors"]),
        st.lists(inner, max_size=3),
    ),
    max_leaves=4,
)
MODELS = st.fixed_dictionaries(
    {"type": st.sampled_from(["BPE", "WordPiece", "WordLevel", "Unigram", "None"])},
    optional={
        "vocab": st.dictionaries(SHORT | st.just(EOS), NUMBERS, max_size=5)
        | st.lists(st.tuples(SHORT, st.floats()), max_size=4),
        "merges": st.lists(st.tuples(SHORT, SHORT) | SHORT, max_size=3),
        "unk_token": SHORT | st.none(),
        "unk_id": NUMBERS | st.none(),
        "continuing_subword_prefix": SHORT,
        "max_input_chars_per_word": NUMBERS,
        "byte_fallback": st.booleans(),
        "dropout": NUMBERS,
    },
)


@pytest.mark.fuzz
@fuzzed
@given(
    parts=st.fixed_dictionaries(
        {},
        optional={
            "normalizer": STEPS,
            "pre_tokenizer": STEPS,
            "decoder": STEPS,
            "post_processor": STEPS,
            "model": MODELS,
            "added_tokens": st.lists(
                st.builds(added_token, SHORT | st.just(EOS), NUMBERS), max_size=3
            ),
            "truncation": STEPS,
            "padding": STEPS,
        },
    )
)
def test_any_parts_of_a_tokenizer_json_load_or_are_one_line(parts):
    assert_loads_or_is_one_line(huggingface(**parts))


@pytest.fixture(scope="module", params=["bpe", "unigram"])
def model(request: pytest.FixtureRequest) -> bytes:
    """A sentencepiece model; of the second kind its normalizer is a table of 240 KB."""
    stream = io.BytesIO()
    sentencepiece.SentencePieceTrainer.train(
        sentence_iterator=iter(["the mill is a cheap pub near the river"] * 8),
        model_writer=stream,
        model_type=request.param,
        vocab_size=285,
        byte_fallback=True,
        hard_vocab_limit=False,
        unk_id=0,
        eos_id=1,
        bos_id=-1,
        normalization_rule_name="identity" if request.param == "bpe" else "nmt_nfkc",
        minloglevel=3,
    )
    return stream.getvalue()


def test_a_key_that_interrupts_is_no_fault_of_the_file(model, monkeypatch):
    def interrupt(*_: object, **__: object) -> None:
        raise KeyboardInterrupt

    codec = open_codec(files_of("sentencepiece", model))
    monkeypatch.setattr(sentencepiece.SentencePieceProcessor, "encode", interrupt)
    with pytest.raises(KeyboardInterrupt):
        codec.encode(["the mill"])


def spoil(content: bytes, start: int, new: bytes, end: int | None) -> bytes:
    start %= len(content)
    return (content[:start] + new + content[start + len(new) :])[:end]


CHANGES = st.tuples(
    st.integers(0, 1 << 20), st.binary(max_size=4), st.none() | st.integers(0, 6000)
)


@pytest.mark.fuzz
@fuzzed
@given(changes=st.lists(CHANGES, min_size=1, max_size=3))
def test_any_bytes_of_a_tokenizer_json_load_or_are_one_line(changes):
    steps = sequence("normalizers", [replace("a", "b"), {"type": "NFKC"}])
    content = json.dumps(tokenizer_json(normalizer=steps, pre_tokenizer=split(" +"))).encode()
    for change in changes:
        content = spoil(content or b"{", *change)
    assert_loads_or_is_one_line(files_of("huggingface", content))


@pytest.mark.fuzz
@fuzzed
@given(changes=st.lists(CHANGES, min_size=1, max_size=4))
def test_any_bytes_of_a_sentencepiece_model_load_or_are_one_line(model, changes):
    for change in changes:
        model = spoil(model or b"\x0a", *change)
    assert_loads_or_is_one_line(files_of("sentencepiece", model))


@pytest.mark.fuzz
@fuzzed
@given(
    encoder=st.dictionaries(SHORT | st.just(EOS), NUMBERS, max_size=5)
    | st.just({"a": 0, "b": 1, "ab": 2, EOS: 3})
    | st.lists(NUMBERS, max_size=2)
    | st.binary(max_size=20),
    merges=st.sampled_from([b"", b"#version: 0.2\na b\n", b"a b", b"a  b\n", b"a b c\n", b"ab a\n"])
    | st.binary(max_size=20),
)
def test_any_two_files_of_gpt2_load_or_are_one_line(encoder, merges):
    content = encoder if isinstance(encoder, bytes) else json.dumps(encoder).encode()
    assert_loads_or_is_one_line(files_of("gpt2", content, merges))
