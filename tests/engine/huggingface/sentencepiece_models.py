"""Small sentencepiece models of every kind that is exported, and texts to hold them against."""

import io
import random
from pathlib import Path
from typing import Any

import sentencepiece

KINDS: dict[str, dict[str, Any]] = {
    "unigram": {"model_type": "unigram"},
    "unigram with bytes": {"model_type": "unigram", "byte_fallback": True},
    "byte pairs": {"model_type": "bpe"},
    "byte pairs with bytes": {"model_type": "bpe", "byte_fallback": True},
    "llama": {
        "model_type": "bpe",
        "byte_fallback": True,
        "normalization_rule_name": "identity",
        "remove_extra_whitespaces": False,
    },
    "nfkc": {"model_type": "bpe", "normalization_rule_name": "nfkc", "add_dummy_prefix": False},
    "lossless unigram": {
        "model_type": "unigram",
        "byte_fallback": True,
        "normalization_rule_name": "identity",
        "remove_extra_whitespaces": False,
        "add_dummy_prefix": False,
    },
}
WORDS = ["the", "mill", "is", "a", "cheap", "pub", "near", "the", "river", "and", "serves", "fish"]
_ALWAYS = ["  ", "\n", "\t", "\u2581", "</s>", "<0x0A>", "\u00a0", "e\u0301", "\u200b", "漢", "🙂"]


def write_model(path: Path, **options: Any) -> Path:
    """Train a model on a few words, and write it."""
    draw = random.Random(0)
    texts = [" ".join(draw.choices(WORDS, k=draw.randint(2, 9))) + "." for _ in range(300)]
    model = io.BytesIO()
    size = {"vocab_size": 60 + 256 * options.get("byte_fallback", False), "num_threads": 1}
    sentencepiece.SentencePieceTrainer.train(
        sentence_iterator=iter(texts),
        model_writer=model,
        minloglevel=2,
        hard_vocab_limit=False,
        **size | options,
    )
    path.write_bytes(model.getvalue())
    return path


def any_text(draw: random.Random, real: list[str]) -> str:
    """Draw a text: a part of a real one, characters of all planes, or what tokenizers trip over."""
    kind = draw.randrange(3 if real else 2)
    if kind == 2:
        text = draw.choice(real)
        start = draw.randrange(len(text))
        return text[start : start + draw.randint(1, 200)]
    if kind == 1:
        return "".join(_any_character(draw) for _ in range(draw.randint(1, 20)))
    return "".join(draw.choice(_ALWAYS + WORDS) for _ in range(draw.randint(1, 15)))


def _any_character(draw: random.Random) -> str:
    first, end = draw.choice([(32, 127), (1, 0xD800), (0xE000, 0x110000), (1, 0x300)])
    return chr(draw.randrange(first, end))
