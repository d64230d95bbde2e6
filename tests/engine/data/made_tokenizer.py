"""Tokenizers made of functions, for tests that look at what is asked of one."""

from collections.abc import Callable
from pathlib import Path
from typing import Any

from engine.data.codecs import Codec
from engine.data.tokenizer import Tokenizer


def made_tokenizer(
    encode: Callable[[list[str]], list[list[int]]],
    *,
    vocab_size: int = 400,
    eos_id: int = 1,
    bos_ids: tuple[int, ...] = (),
    decode: Callable[[list[int]], str] = str,
    files: dict[str, bytes] | None = None,
) -> Tokenizer:
    """Return a tokenizer that encodes and decodes so; files are what it is known by."""
    contents: dict[str, Any] = {"files": files or {}, "meaning": lambda: repr(files).encode()}
    codec = Codec(
        vocab_size=vocab_size,
        num_text_ids=vocab_size,
        eos_id=eos_id,
        eos_text="<|endoftext|>",
        bos_ids=bos_ids,
        encode=encode,
        decode=decode,
        normalize=str,
        **contents,
    )
    return Tokenizer(codec, Path("made"), {})
