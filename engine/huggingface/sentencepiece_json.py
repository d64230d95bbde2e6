"""A sentencepiece model as the tokenizer.json of Hugging Face's `tokenizers`, which gives the same
ids or is not written.

sentencepiece normalises a text by a map of its own, changes its spaces, and looks for pieces. Here
the map is a step `Precompiled`, the spaces a few `Replace`, and the pieces a model BPE or Unigram.
Pieces are written with the space that sentencepiece writes as U+2581: so a U+2581 of the text,
which its byte pieces spell, is no space. Fields and their senses: sentencepiece_model.proto.
"""

import base64
import json
import re
from collections import defaultdict
from collections.abc import Iterator
from pathlib import Path
from typing import Any

import sentencepiece
import tokenizers
from sentencepiece import sentencepiece_model_pb2

from engine.data.beginning_of_text import template
from engine.data.tokenizer import Tokenizer
from engine.errors import UserError
from engine.huggingface.hard_texts import hard_texts

_SPACE_MARK = "\u2581"
_KINDS = {1: "unigram", 2: "bpe"}  # TrainerSpec.ModelType; not word and char
_NORMAL, _UNKNOWN, _CONTROL, _USER_DEFINED, _UNUSED, _BYTE = 1, 2, 3, 4, 5, 6
_NOTHING = "\x01"  # to the maps that have nmt in their names
_MOST_SHOWN = 60  # characters of a text in an error; our choice
MAY_DIFFER = (
    "this sentencepiece model normalises texts; in transformers those with several marks on one "
    "letter, in an order that Unicode does not use, may get other ids"
)
"""What no check of some texts can exclude."""


def sentencepiece_json(tokenizer: Tokenizer) -> tuple[bytes, bool]:
    """Return the tokenizer.json of a tokenizer that is a sentencepiece model, and whether
    MAY_DIFFER is to be said of it.

    Raises UserError, naming its file, where it has what `tokenizers` has not. So it does where any
    of many hard texts gets other ids there than from the tokenizer.
    """
    model, path = tokenizer.sentencepiece_model(), tokenizer.path
    assert model is not None  # as the caller has seen
    spec = sentencepiece_model_pb2.ModelProto.FromString(model)  # type: ignore[attr-defined]
    kind = _KINDS.get(spec.trainer_spec.model_type)
    if kind is None or spec.trainer_spec.treat_whitespace_as_suffix:
        what = "words or characters" if kind is None else "spaces at the ends of pieces"
        raise UserError(f"{path}: a sentencepiece model of {what} has no form as tokenizer.json")
    processor = sentencepiece.SentencePieceProcessor()
    processor.load_from_serialized_proto(model)
    is_lossless = processor.normalize("  a ") == "  a ".replace(" ", _SPACE_MARK)
    steps = list(_normalizer_steps(spec.normalizer_spec, processor, keeps_marks=is_lossless))
    whole = {
        "version": "1.0",
        "truncation": None,
        "padding": None,
        "added_tokens": list(_added_tokens(spec, tokenizer)),
        "normalizer": {"type": "Sequence", "normalizers": steps} if steps else None,
        "pre_tokenizer": _apart(spec) if kind == "unigram" else None,
        "post_processor": _post_processor(tokenizer),
        "decoder": _decoder(spec),
        "model": _bpe(spec) if kind == "bpe" else _unigram(spec),
    }
    content = json.dumps(whole, ensure_ascii=False).encode()
    _compare(content, tokenizer, path)
    return content, bool(spec.normalizer_spec.precompiled_charsmap)


def _normalizer_steps(
    spec: Any, processor: sentencepiece.SentencePieceProcessor, *, keeps_marks: bool
) -> Iterator[dict[str, Any]]:
    """Yield what is done to a text before pieces are looked for."""
    if spec.precompiled_charsmap:
        # `Precompiled` applies the map to single characters and to few sequences: NFC, which all
        # maps of NFKC agree with, composes the others before and behind it.
        for content, characters in _to_spaces(processor):
            if characters:
                yield _replace({"Regex": f"[{''.join(map(re.escape, characters))}]"}, content)
        composes = processor.normalize("e\u0301").endswith("\u00e9")
        if composes:
            yield {"type": "NFC"}
        if processor.normalize(f"a{_NOTHING}b") == processor.normalize("ab"):
            # It loses a mark behind a character that it changes. What the map takes away keeps them
            # apart until then.
            yield _replace({"Regex": r"(?<=[^\x00-\x7F])(?=\p{M}|\x{200D})"}, _NOTHING)
        charsmap = base64.b64encode(spec.precompiled_charsmap).decode()
        yield {"type": "Precompiled", "precompiled_charsmap": charsmap}
        if composes:
            yield {"type": "NFC"}
    if spec.remove_extra_whitespaces:
        yield _replace({"Regex": r"\A +"}, "")
        yield _replace({"Regex": " {2,}"}, " ")
    if spec.add_dummy_prefix:
        yield {"type": "Prepend", "prepend": " "}
    if not keeps_marks:  # to sentencepiece a mark in the text is a space, but for the two above
        yield _replace({"String": _SPACE_MARK}, " ")
    if spec.remove_extra_whitespaces:
        yield _replace({"Regex": r" +\z"}, "")


def _to_spaces(
    processor: sentencepiece.SentencePieceProcessor,
) -> Iterator[tuple[str, list[str]]]:
    """Yield which characters the map makes a space of, and which it takes away."""
    plane = [chr(code) for code in (*range(1, 0xD800), *range(0xE000, 0x10000))]
    for content in (" ", ""):
        # Twice: a mark that is no space to the map is still one behind it, and does not merge.
        wanted = processor.normalize(f"a{content}{content}b")
        asked = (c for c in plane if c not in content)
        yield content, [c for c in asked if processor.normalize(f"a{c}{c}b") == wanted]


def _replace(pattern: dict[str, str], content: str) -> dict[str, Any]:
    return {"type": "Replace", "pattern": pattern, "content": content}


def _decoder(spec: Any) -> dict[str, Any]:
    steps: list[dict[str, Any]] = [{"type": "ByteFallback"}, {"type": "Fuse"}]
    if spec.normalizer_spec.add_dummy_prefix:
        steps.append({"type": "Strip", "content": " ", "start": 1, "stop": 0})
    return {"type": "Sequence", "decoders": steps}


def _texts(spec: Any) -> list[str]:
    return [
        piece.piece if piece.type in (_CONTROL, _UNKNOWN) else _spaced(piece.piece)
        for piece in spec.pieces
    ]


def _spaced(piece: str) -> str:
    return piece.replace(_SPACE_MARK, " ")


def _added_tokens(spec: Any, tokenizer: Tokenizer) -> Iterator[dict[str, Any]]:
    """Yield the tokens that are no pieces of a text, and those that are always pieces."""
    added = tokenizer.added_tokens()
    for number, piece in enumerate(spec.pieces):
        if piece.type in (_CONTROL, _UNKNOWN):
            yield _added(number, piece.piece, is_special=True)
        elif piece.type == _USER_DEFINED:
            yield _added(number, _spaced(piece.piece), is_special=False)
    for text, number in sorted(added.items(), key=lambda item: item[1]):
        yield _added(number, text, is_special=True)


def _added(number: int, text: str, *, is_special: bool) -> dict[str, Any]:
    switches = dict.fromkeys(("single_word", "lstrip", "rstrip", "normalized"), False)
    return {"id": number, "content": text, "special": is_special, **switches}


def _bpe(spec: Any) -> dict[str, Any]:
    """Return byte pairs: two neighbours merge where together they are a piece, the piece of the
    highest score first."""
    texts = _texts(spec)
    ids = {text: number for number, text in enumerate(texts)}
    mergeable = {
        texts[number]: piece.score
        for number, piece in enumerate(spec.pieces)
        if piece.type == _NORMAL
    }
    found = defaultdict(list)
    for text, score in mergeable.items():
        for cut in range(1, len(text)):
            left, right = text[:cut], text[cut:]
            if left in mergeable and right in mergeable:
                found[score].append((ids[left], ids[right], left, right))
    merges = [
        [left, right]
        for score in sorted(found, reverse=True)
        for _, _, left, right in sorted(found[score])
    ]
    return {
        "type": "BPE",
        "dropout": None,
        "unk_token": _unknown(spec),
        "continuing_subword_prefix": None,
        "end_of_word_suffix": None,
        "fuse_unk": True,
        "byte_fallback": spec.trainer_spec.byte_fallback,
        "ignore_merges": False,
        "vocab": ids,
        "merges": merges,
    }


def _unigram(spec: Any) -> dict[str, Any]:
    """Return the pieces with their scores. What no text becomes has the least of them, by which
    `tokenizers` finds that of an unknown character, as sentencepiece does."""
    least = min((p.score for p in spec.pieces if p.type == _NORMAL), default=0.0)
    scores = [p.score if p.type in (_NORMAL, _USER_DEFINED) else least for p in spec.pieces]
    return {
        "type": "Unigram",
        "unk_id": next((n for n, p in enumerate(spec.pieces) if p.type == _UNKNOWN), None),
        "vocab": [[text, score] for text, score in zip(_texts(spec), scores, strict=True)],
        "byte_fallback": spec.trainer_spec.byte_fallback,
    }


def _apart(spec: Any) -> dict[str, Any]:
    """Return the step that cuts the texts of control tokens and of byte pieces in two, where no
    piece of a text has both sides: so such a text is no piece."""
    pieces = [p.piece for p in spec.pieces if p.type in (_NORMAL, _USER_DEFINED)]
    known = set("".join(pieces))
    has_bytes = spec.trainer_spec.byte_fallback
    texts = [p.piece for p in spec.pieces if p.type in (_CONTROL, _UNKNOWN, _BYTE)]
    patterns = []
    for text in (text for text in texts if len(text) > 1):
        # Unknown characters side by side are one unknown token, but where bytes spell them.
        cuts = [n for n in range(1, len(text)) if has_bytes or known & {text[n - 1], text[n]}]
        pairs = {n: text[n - 1 : n + 1] for n in cuts}
        cut = next((n for n in cuts if not any(pairs[n] in piece for piece in pieces)), 1)
        patterns.append(f"{re.escape(text[:cut])}(?={re.escape(text[cut:])})")
    return {
        "type": "Split",
        "pattern": {"Regex": "|".join(patterns) or r"\z"},
        "behavior": "MergedWithPrevious",
        "invert": False,
    }


def _post_processor(tokenizer: Tokenizer) -> dict[str, Any] | None:
    return template(tokenizer.bos_text, tokenizer.bos_ids[0]) if tokenizer.bos_ids else None


def _unknown(spec: Any) -> str | None:
    return next((piece.piece for piece in spec.pieces if piece.type == _UNKNOWN), None)


def _compare(content: bytes, tokenizer: Tokenizer, path: Path) -> None:
    """Raise UserError for the first hard text that gets other ids in `tokenizers`."""
    try:
        theirs = tokenizers.Tokenizer.from_str(content.decode())
    except Exception as error:  # the library's own, of no narrower class
        raise UserError(f"{path}: no tokenizer.json can be made of it: {error}") from None
    theirs.encode_special_tokens = True  # as ours: the text of a control token is ordinary text
    for text in hard_texts():
        ours, found = tokenizer.encode(text), theirs.encode(text, add_special_tokens=False).ids
        if ours != found:
            raise UserError(
                f"{path}: Hugging Face's tokenizers would read {text!r:.{_MOST_SHOWN}} as "
                f"{found!s:.{_MOST_SHOWN}}, and this model was trained with "
                f"{ours!s:.{_MOST_SHOWN}}: its tokenizer is not exported"
            )
