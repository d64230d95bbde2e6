"""Whether two tokenizers make the same ids of every text: also where one has tokens that the other
lacks and no text becomes, as a control token for padding."""

import json
import re
from typing import Any

_BYTE = re.compile(r"<0x[0-9A-F]{2}>")  # a piece of a byte, which a text may become


def read_alike(meaning: bytes, other: bytes) -> bool:
    """Return whether two tokenizers differ in no more than special tokens that were added, and
    pieces of byte pairs that no merge makes; both as Codec.meaning has them.

    To a Codec the text of a special token is ordinary text. Any doubt is a difference.
    """
    first, second = json.loads(meaning), json.loads(other)
    if isinstance(first, list) and isinstance(second, list):  # sentencepiece: [model, added]
        return bool(first[0] == second[0] and _agree(first[1], second[1]))
    if isinstance(first, list) or isinstance(second, list):
        return False
    return bool(_without_lone_tokens(first, second) == _without_lone_tokens(second, first))


def _agree(ids: dict[str, int], others: dict[str, int]) -> bool:
    """Return whether what both have, has the same id in both."""
    return all(ids[text] == others[text] for text in ids.keys() & others)


def _without_lone_tokens(content: dict[str, Any], other: dict[str, Any]) -> dict[str, Any]:
    """Return a tokenizer.json without what it alone has and no text becomes."""
    known = {token["content"] for token in other["added_tokens"]}
    added = [t for t in content["added_tokens"] if not t["special"] or t["content"] in known]
    return {**content, "added_tokens": added, "model": _without_lone_pieces(content, other)}


def _without_lone_pieces(content: dict[str, Any], other: dict[str, Any]) -> dict[str, Any]:
    model: dict[str, Any] = content["model"]
    if model.get("type") != "BPE" or model["ignore_merges"]:
        return model
    if model["continuing_subword_prefix"] or model["end_of_word_suffix"]:
        return model
    made = {"".join(pair) for pair in model["merges"]}
    known = other["model"].get("vocab", {})

    def may_be_text(piece: str) -> bool:
        is_made = piece in made or len(piece) == 1
        return is_made or piece == model["unk_token"] or bool(_BYTE.fullmatch(piece))

    kept = {t: n for t, n in model["vocab"].items() if t in known or may_be_text(t)}
    return {**model, "vocab": kept}
