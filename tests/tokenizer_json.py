"""A small tokenizer.json, and parts with which one from elsewhere may be hostile."""

from typing import Any

EOS = "<|endoftext|>"
LETTERS = "abcdefghijklmnopqrstuvwxyz .,"


def tokenizer_json(**parts: Any) -> dict[str, Any]:
    """Return byte pairs over a few letters, with some parts replaced."""
    vocabulary = {letter: number for number, letter in enumerate([*LETTERS, "ab", "abab"])}
    model = {
        "type": "BPE",
        "dropout": None,
        "unk_token": None,
        "continuing_subword_prefix": None,
        "end_of_word_suffix": None,
        "fuse_unk": False,
        "byte_fallback": False,
        "vocab": vocabulary,
        "merges": ["a b", "ab ab"],
    }
    whole = {
        "version": "1.0",
        "truncation": None,
        "padding": None,
        "added_tokens": [added_token(EOS, len(vocabulary))],
        "normalizer": None,
        "pre_tokenizer": None,
        "post_processor": None,
        "decoder": {"type": "Fuse"},
        "model": model,
    }
    return whole | parts


def with_model(**fields: Any) -> dict[str, Any]:
    """Return that tokenizer with some fields of its model replaced."""
    return tokenizer_json(model=tokenizer_json()["model"] | fields)


def added_token(content: str, number: int) -> dict[str, Any]:
    """Return an added token of that id."""
    switches = ("single_word", "lstrip", "rstrip", "normalized")
    return {"id": number, "content": content, "special": True, **dict.fromkeys(switches, False)}


def replace(pattern: str, content: str, *, kind: str = "String") -> dict[str, Any]:
    """Return a step that replaces a text, or a Regex."""
    return {"type": "Replace", "pattern": {kind: pattern}, "content": content}


def split(pattern: str) -> dict[str, Any]:
    """Return a step that splits at a regular expression."""
    return {
        "type": "Split",
        "pattern": {"Regex": pattern},
        "behavior": "Isolated",
        "invert": False,
    }


def sequence(part: str, steps: list[dict[str, Any]]) -> dict[str, Any]:
    """Return steps that follow one another; part: normalizers, pretokenizers, ..."""
    return {"type": "Sequence", part: steps}
