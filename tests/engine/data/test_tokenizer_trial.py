import json
import time
from pathlib import Path

import pytest

from engine.data import tokenizer_trial
from engine.data.codecs import open_codec
from engine.data.tokenizer import train_sentencepiece
from engine.data.tokenizer_files import TokenizerFiles, read_tokenizer_files
from engine.data.tokenizer_trial import check_codec, try_tokenizer
from engine.errors import UserError
from tests.tokenizer_json import (
    added_token,
    replace,
    sequence,
    split,
    tokenizer_json,
    with_model,
)


def huggingface(whole: object) -> TokenizerFiles:
    content = whole if isinstance(whole, bytes) else json.dumps(whole).encode()
    return TokenizerFiles(
        path=Path("elsewhere/tokenizer.json"),
        kind="huggingface",
        contents={"tokenizer.json": content},
    )


def refusal(files: TokenizerFiles) -> str:
    with pytest.raises(UserError) as caught:
        try_tokenizer(files)
    message = str(caught.value)
    assert message.startswith(str(files.path))
    assert len(message.splitlines()) == 1 and len(message) < 600
    return message


def doubling(part: str, times: int, letter: str = "a") -> dict:
    return sequence(part, [replace(letter, letter * 2)] * times)


def templates(times: int) -> dict:
    single = {"Sequence": {"id": "A", "type_id": 0}}
    template = {
        "type": "TemplateProcessing",
        "single": [single] * times,
        "pair": [],
        "special_tokens": {},
    }
    return {"type": "Sequence", "processors": [template]}


def test_sound_tokenizers_pass(tmp_path, tokenizer):
    try_tokenizer(huggingface(tokenizer_json()))
    tokenizer.save(tmp_path)
    try_tokenizer(read_tokenizer_files(tmp_path))
    harmless = [replace("\u2581", " "), {"type": "NFKD"}, {"type": "Lowercase"}]
    try_tokenizer(huggingface(tokenizer_json(normalizer=sequence("normalizers", harmless))))


GROWING = {
    "normalizer of a letter": {"normalizer": doubling("normalizers", 60)},
    "of a rare character": {"normalizer": doubling("normalizers", 60, "\u1234")},
    "beyond the basic plane": {"normalizer": doubling("normalizers", 60, "\U00012345")},
    "by a regex": {"normalizer": sequence("normalizers", [replace(".", "ab", kind="Regex")] * 60)},
    "nested": {"normalizer": sequence("normalizers", [doubling("normalizers", 9)] * 7)},
    "in one step": {"normalizer": replace("z", "ab" * 500_000)},
    "that no piece shows": {"normalizer": replace("z", "\u3456" * 500_000)},
    "prepended": {
        "normalizer": sequence(
            "normalizers", [{"type": "Prepend", "prepend": "ab" * 50_000}, {"type": "NFC"}]
        )
    },
    "template": {"post_processor": templates(100_000)},
    "decoder": {"decoder": doubling("decoders", 60)},
    "decoder of a rare character": {
        "decoder": sequence("decoders", [replace("q", "qq")] * 60),
    },
}


@pytest.mark.parametrize("parts", GROWING.values(), ids=GROWING)
def test_what_grows_without_bound_is_refused(parts):
    message = refusal(huggingface(tokenizer_json(**parts)))
    assert "this tokenizer" in message or "does not" in message


@pytest.mark.parametrize("pattern", ["(a+)+$", "(x+x+)+y", "(?:\u1234|\u1234)*\u1235\u1235$"])
@pytest.mark.parametrize("part", ["pre_tokenizer", "normalizer"])
def test_a_pattern_that_searches_for_ever_is_refused_or_bounded(part, pattern):
    step = split(pattern) if part == "pre_tokenizer" else replace(pattern, "a", kind="Regex")
    files = huggingface(tokenizer_json(**{part: step}))
    start = time.monotonic()
    try:
        try_tokenizer(files)
    except UserError as error:
        assert str(error).startswith(str(files.path))
    else:  # the library has found a short way
        open_codec(files).encode(["a" * 4000 + "x" * 4000 + "\u1234" * 4000 + "!"])
    assert time.monotonic() - start < 60


def test_a_search_without_end_is_refused():
    message = refusal(huggingface(tokenizer_json(pre_tokenizer=split("(a+)+$"))))
    assert "retry-limit" in message or "computing" in message


@pytest.mark.parametrize(
    ("whole", "problem"),
    [
        (b"[" * 100_000, "is not a tokenizer.json that can be read"),
        (b'{"normalizer":' * 100_000, "is not a tokenizer.json that can be read"),
        (b"\xff", "is not a tokenizer.json that can be read"),
        (tokenizer_json(normalizer=sequence("normalizers", [{"type": "NFC"}] * 5000)), "steps"),
        (with_model(vocab={"a": -1}, merges=[]), "expected u32"),
        (with_model(vocab={"a": 2**32}, merges=[]), "expected u32"),
        (with_model(vocab={"a": 2**32 - 1}, merges=[]), "an id of 4294967295 among 2 pieces"),
        (with_model(vocab={"a": 0, "b": 0}, merges=[]), "3 pieces have"),
        (with_model(vocab={"a" * 5000: 0}, merges=[]), "a piece of 5000 characters"),
        (with_model(merges=["q zz"]), "out of vocabulary"),
        (with_model(merges=["x" * 100_000]), "tokenizer.json that can be read"),
        (with_model(type="Unigram", unk_id=77, vocab=[["a", 0.0]]), "tokenizer.json that can"),
        (with_model(type="Unigram", unk_id=None, vocab=[["a", 0.0]]), "does not encode a text"),
        (tokenizer_json(added_tokens=[]), "has no end-of-text token"),
        (tokenizer_json(pre_tokenizer={"type": "FixedLength", "length": 0}), ""),
    ],
)
def test_a_broken_tokenizer_json_is_one_line(whole, problem):
    assert problem in refusal(huggingface(whole))


def test_sections_that_do_not_apply_here_are_left_out():
    padding = {
        "strategy": {"Fixed": 10**9},
        "direction": "Right",
        "pad_to_multiple_of": None,
        "pad_id": 0,
        "pad_type_id": 0,
        "pad_token": "x",
    }
    truncation = {
        "direction": "Right",
        "max_length": 3,
        "strategy": "LongestFirst",
        "stride": 5,
    }
    files = huggingface(tokenizer_json(padding=padding, truncation=truncation))
    try_tokenizer(files)
    assert len(open_codec(files).encode(["a.a.a."])[0]) == 6


def test_added_tokens_by_the_hundred_thousand_end():
    tokens = [added_token(f"<{number}>", 31 + number) for number in range(100_000)]
    eos = added_token("<|endoftext|>", 100_031)
    start = time.monotonic()
    try_tokenizer(huggingface(tokenizer_json(added_tokens=[*tokens, eos])))
    assert time.monotonic() - start < 60


def test_a_trial_out_of_time_or_memory_is_one_line(monkeypatch):
    files = huggingface(tokenizer_json())
    with monkeypatch.context() as patch:
        patch.setattr(tokenizer_trial, "_MAX_WALL_SECONDS", 0.001)
        assert "did not end in 0 seconds" in refusal(files)
    with monkeypatch.context() as patch:
        patch.setattr(
            tokenizer_trial,
            "_PROGRAM",
            tokenizer_trial._PROGRAM.replace("answer_trial()", "while True: pass", 1).replace(
                "from engine", "import resource\nresource.setrlimit(0, (1, 2))\nfrom engine", 1
            ),
        )
        assert "seconds of computing" in refusal(files)
    with monkeypatch.context() as patch:
        patch.setattr(tokenizer_trial, "_PROGRAM", "import os; os.abort()")
        assert "broke its process" in refusal(files)


def test_the_trial_limits_itself(monkeypatch):
    files = huggingface(tokenizer_json())
    program = tokenizer_trial._PROGRAM + (
        "import resource\n"
        "assert resource.getrlimit(resource.RLIMIT_AS)[0] == 4 << 30\n"
        "assert resource.getrlimit(resource.RLIMIT_CPU)[0] == 20\n"
        "x = bytearray(5 << 30)\n"
    )
    monkeypatch.setattr(tokenizer_trial, "_PROGRAM", program.replace("x =", "#"))
    try_tokenizer(files)
    monkeypatch.setattr(tokenizer_trial, "_PROGRAM", program)
    assert "GiB of memory" in refusal(files)


def test_a_sentencepiece_model_with_a_huge_piece_is_refused(tmp_path):
    path = tmp_path / "a.model"
    train_sentencepiece(["pub"] * 9, path, vocab_size=262)
    # One more entry (field 1) with one more piece (its field 1): fields of one number add up.
    piece = b"\x0a" + varint(6000) + b"y" * 6000
    path.write_bytes(path.read_bytes() + b"\x0a" + varint(len(piece)) + piece)
    assert "'yyyyyyyy" in (message := refusal(read_tokenizer_files(path)))
    assert "a piece of 6000 characters; 4096 are the most" in message


def varint(number: int) -> bytes:
    """Return a number as protocol buffers write it: seven bits a byte, the lowest first."""
    high, low = divmod(number, 128)
    return bytes([low | 128]) + varint(high) if high else bytes([low])


def test_gpt2s_files_are_checked_too():
    def gpt2(encoder: bytes, merges: bytes) -> TokenizerFiles:
        contents = {"encoder.json": encoder, "vocab.bpe": merges}
        return TokenizerFiles(path=Path("elsewhere"), kind="gpt2", contents=contents)

    try_tokenizer(gpt2(b'{"a": 0, "<|endoftext|>": 1}', b"#version: 0.2\n"))
    for encoder in (b"[" * 100_000, b"[]", b"null", b'{"a": "b"}', b'{"a": -1}', b"\xff", b"{}"):
        assert refusal(gpt2(encoder, b"")).startswith("elsewhere")
    sound = b'{"a": 0, "b": 1, "<|endoftext|>": 2}'
    for merges in (b"a", b"a b c\n", b"q z\n", b"a b\n", b"\xff", b"x" * 100_000):
        assert "vocab.bpe do not load" in refusal(gpt2(sound, merges))
    huge = b'{"a": 4294967295, "<|endoftext|>": 0}'
    assert "an id of 4294967295" in refusal(gpt2(huge, b""))


def test_the_check_in_process_is_the_trial():
    files = huggingface(tokenizer_json(normalizer=replace("z", "ab" * 500)))
    with pytest.raises(UserError, match="this tokenizer replaces texts by others") as caught:
        check_codec(open_codec(files), files)
    assert str(caught.value) == refusal(files)
