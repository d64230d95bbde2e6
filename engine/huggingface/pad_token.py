"""The padding token of an exported tokenizer that is not its end of text.

transformers' sequence classifiers read a score at the last token that is not padding. An answer
ends in the end of text: were that the padding, the score would be read one token early.
"""

import json
from pathlib import Path
from typing import Any

import tokenizers

from engine.errors import UserError
from engine.files import read_object, write_object

PAD = "<|pad|>"  # our choice; it is added where a tokenizer has none that serves
_MAX_BYTES = 64 << 20  # as engine/data/tokenizer_files.py has it
_SWITCHES = dict.fromkeys(("single_word", "lstrip", "rstrip", "normalized"), False)


def ensure_pad_token(folder: Path, eos_id: int) -> int:
    """Return the id of the padding token of the tokenizer in an exported folder.

    That is its own, where it is a special token and ends no text; otherwise one that this adds
    behind all others. No text becomes it. What ends a text is eos_id, and what the folder's
    generation_config.json names. Raises UserError where none can be added.
    """
    listed = _read(folder / "generation_config.json").get("eos_token_id")
    ends = {eos_id, *(listed if isinstance(listed, list) else [listed])}
    settings_path = folder / "tokenizer_config.json"
    settings = _read(settings_path)
    named = settings.get("pad_token")
    text = named.get("content") if isinstance(named, dict) else named
    is_gpt2 = not (folder / "tokenizer.json").exists()
    path = folder / ("vocab.json" if is_gpt2 else "tokenizer.json")
    content = read_object(path, max_bytes=_MAX_BYTES)
    found = content if is_gpt2 else _special_tokens(content)
    if isinstance(text, str) and found.get(text, eos_id) not in ends:
        return found[text]
    pad_id = _add_to_vocabulary(content) if is_gpt2 else _add(path, content)
    write_object(path, content, ensure_ascii=False)
    write_object(settings_path, settings | {"pad_token": PAD}, ensure_ascii=False)
    return pad_id


def _special_tokens(content: dict[str, Any]) -> dict[str, int]:
    added = content.get("added_tokens") or []
    return {token["content"]: token["id"] for token in added if token.get("special")}


def _add_to_vocabulary(content: dict[str, int]) -> int:
    return content.setdefault(PAD, max(content.values()) + 1)


def _add(path: Path, content: dict[str, Any]) -> int:
    """Add PAD to what a tokenizer.json says, under the id that the library gives it."""
    model = tokenizers.Tokenizer.from_str(json.dumps(content))
    others = {text: n for text, n in model.get_vocab().items() if text != PAD}
    model.add_special_tokens([PAD])
    pad_id = model.token_to_id(PAD)
    assert pad_id is not None  # now it has one
    if pad_id in others.values():
        raise UserError(
            f"{path}: a padding token would get id {pad_id}, which another has: the ids have gaps; "
            "name a padding token of the tokenizer's own in its tokenizer_config.json"
        )
    added = [token for token in content.get("added_tokens") or [] if token["content"] != PAD]
    content["added_tokens"] = [*added, {"id": pad_id, "content": PAD, "special": True, **_SWITCHES}]
    return pad_id


def _read(path: Path) -> dict[str, Any]:
    return read_object(path, max_bytes=_MAX_BYTES) if path.exists() else {}
