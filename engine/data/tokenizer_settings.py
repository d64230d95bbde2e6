"""What the JSON files beside a tokenizer say of it, and of the model that it is for.

    tokenizer_config.json     eos_token and other special tokens, added tokens, the chat template,
                              whether bos_token is put before texts
    special_tokens_map.json   eos_token and other special tokens
    added_tokens.json         the ids of tokens that the tokenizer's own files do not have
    generation_config.json    eos_token_id: a number or a list; goes before config.json's
    config.json               eos_token_id, and vocab_size: an id beyond it is no token of the model

What transformers makes of them was looked up in transformers 5. What a file does not name, or
names as null, it leaves open.
"""

import os
from collections.abc import Mapping
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any

from engine.errors import UserError
from engine.files import open_file, read_object

MAX_SETTINGS_BYTES = 1 << 20
"""Of one such file, which has a few thousand; our choice."""
_TOKENIZER_CONFIG = "tokenizer_config.json"
_MOST_SHOWN = 60  # characters of a text from a file in an error; our choice
ROLES = ("bos", "eos", "unk", "sep", "pad", "cls", "mask")
_LISTS = ("additional_special_tokens", "extra_special_tokens")
# What a run keeps of tokenizer_config.json. Which class reads the files is ours to say at an
# export, and code is never named.
_KEPT = (
    *(f"{role}_token" for role in ROLES),
    *_LISTS,
    *("chat_template", "model_max_length", "padding_side", "truncation_side"),
    "clean_up_tokenization_spaces",
)
_NOT_KEPT = ("auto_map", "custom_generate", "trust_remote_code")  # of generation_config.json


@dataclass(frozen=True, kw_only=True)
class TokenizerSettings:
    """What was found beside a tokenizer; all of it can be written as JSON."""

    end_of_text: str | None = None
    """The text of the token that the tokenizer's own settings name."""
    end_path: str = ""
    """The file that names it."""
    model_ends: tuple[int, ...] = ()
    """The ids that the model's settings name."""
    model_path: str = ""
    """The file that names them."""
    added: Mapping[str, int] = field(default_factory=dict)
    """Ids of added tokens by their texts."""
    special: tuple[str, ...] = ()
    """Texts of tokens that are control tokens."""
    tokenizer: Mapping[str, Any] = field(default_factory=dict)
    """What is kept of tokenizer_config.json, for whoever uses an export."""
    reader: str = ""
    """The class of transformers' that reads the tokenizer, where that is said."""
    generation: Mapping[str, Any] = field(default_factory=dict)
    """What is kept of generation_config.json."""


def read_settings(folder: Path) -> TokenizerSettings:
    """Read what lies in a tokenizer's folder. Raises UserError for a file that cannot be read, and
    for two that name different ends of text."""
    config = _read(folder / _TOKENIZER_CONFIG)
    special_map = _read(folder / "special_tokens_map.json")
    generation = _read(folder / "generation_config.json")
    end, end_path = _tokenizer_end(folder, config, special_map)
    ends, ends_path = _model_ends(folder, generation)
    kept = {name: _as_config(v) for name in _KEPT if (v := special_map.get(name)) is not None}
    kept |= {name: config[name] for name in _KEPT if config.get(name) is not None}
    adds = _adds_beginning(folder, config, special_map)
    kept |= {} if adds is None else {"add_bos_token": adds}
    template = folder / "chat_template.jinja"
    if os.path.lexists(template):
        kept["chat_template"] = _read_text(template)
    added, flagged = _added_tokens(folder, config)
    return TokenizerSettings(
        end_of_text=end,
        end_path=end_path,
        model_ends=ends,
        model_path=ends_path,
        added=added,
        special=tuple(sorted(flagged | _special_texts(folder, kept))),
        tokenizer=kept,
        reader=_reader(folder, config),
        generation={name: generation[name] for name in generation if name not in _NOT_KEPT},
    )


def _tokenizer_end(
    folder: Path, config: Mapping[str, Any], special_map: Mapping[str, Any]
) -> tuple[str | None, str]:
    """Return the end of text that the tokenizer's settings name, and the file."""
    found: list[tuple[str, str]] = []
    for name, content in ((_TOKENIZER_CONFIG, config), ("special_tokens_map.json", special_map)):
        path = folder / name
        text = token_text(path, "eos_token", content.get("eos_token"))
        if text is not None:
            found.append((text, str(path)))
    if len({text for text, _ in found}) > 1:
        (one, first), (other, second) = found
        raise UserError(
            f"{first} names {_shown(one)} as the end of text (eos_token), {second} "
            f"{_shown(other)}: correct one of them"
        )
    return found[0] if found else (None, "")


def _adds_beginning(
    folder: Path, config: Mapping[str, Any], special_map: Mapping[str, Any]
) -> bool | None:
    """Return whether the settings have bos_token put before texts; None where they do not say."""
    path, other = folder / _TOKENIZER_CONFIG, folder / "special_tokens_map.json"
    adds = config.get("add_bos_token")
    if adds is not None and not isinstance(adds, bool):
        raise UserError(f"{path}: add_bos_token is {_shown(adds)} and must be true or false")
    if not adds:
        return adds
    first = token_text(path, "bos_token", config.get("bos_token"))
    second = token_text(other, "bos_token", special_map.get("bos_token"))
    has_own = os.path.lexists(folder / "tokenizer.json")  # which says itself what begins a text
    if first is not None and second is not None and first != second and not has_own:
        raise UserError(
            f"{path} names {_shown(first)} as what begins a text (bos_token), {other} "
            f"{_shown(second)}: correct one of them"
        )
    # A null there is no token, and not the one that a class or a sentencepiece model has by itself.
    return first is not None or second is not None or "bos_token" not in config


def _reader(folder: Path, config: Mapping[str, Any]) -> str:
    """Return the class that transformers reads the tokenizer with, where that is said."""
    named = config.get("tokenizer_class")
    if isinstance(named, str):
        return named
    model = _read(folder / "config.json")
    return "GPTNeoXTokenizer" if model.get("model_type") == "gpt_neox" else ""


def _as_config(value: Any) -> Any:
    """Return a token of special_tokens_map.json, or a list, as tokenizer_config.json has it."""
    if isinstance(value, list):
        return [_as_config(each) for each in value]
    is_token = isinstance(value, dict) and "content" in value
    return {**value, "__type": "AddedToken"} if is_token else value


def _model_ends(folder: Path, generation: Mapping[str, Any]) -> tuple[tuple[int, ...], str]:
    """Return the ids that end a text by the model's settings, and the file that names them."""
    config = _read(folder / "config.json")
    rows = config.get("vocab_size")
    found: list[tuple[tuple[int, ...], str]] = []
    for name, content in (("generation_config.json", generation), ("config.json", config)):
        path = folder / name
        ids = _token_ids(path, content.get("eos_token_id"))
        # transformers writes 50256 into the config of any GPT-2 that names no end.
        ids = tuple(each for each in ids if not isinstance(rows, int) or each < rows)
        if ids:
            found.append((ids, str(path)))
    if len(found) > 1 and not set(found[0][0]) & set(found[1][0]):
        (one, first), (other, second) = found
        raise UserError(
            f"{first} has eos_token_id {_listed(one)}, {second} {_listed(other)}: correct one of "
            "them"
        )
    return found[0] if found else ((), "")


def _added_tokens(folder: Path, config: Mapping[str, Any]) -> tuple[dict[str, int], set[str]]:
    """Return the ids of added tokens by text, and which of them are said to be special."""
    path = folder / _TOKENIZER_CONFIG
    added: dict[str, int] = {}
    special: set[str] = set()
    decoder = config.get("added_tokens_decoder") or {}
    if not isinstance(decoder, dict):
        raise UserError(f"{path}: added_tokens_decoder is no object")
    for number, fields in decoder.items():
        text = token_text(path, "added_tokens_decoder", fields)
        if text is None or not number.isascii() or not number.isdecimal() or len(number) > 9:
            raise UserError(f"{path}: added_tokens_decoder has {_shown(number)}: {_shown(fields)}")
        added[text] = int(number)
        if isinstance(fields, dict) and fields.get("special") is True:
            special.add(text)
    path = folder / "added_tokens.json"
    for text, number in _read(path).items():
        token_text(path, "a token", text)
        if type(number) is not int or not 0 <= number < 1 << 30:
            raise UserError(f"{path}: {_shown(text)} has {_shown(number)}, which is no id")
        if added.setdefault(text, number) != number:
            raise UserError(
                f"{path}: {_shown(text)} has the id {number}, in {folder / _TOKENIZER_CONFIG} "
                f"{added[text]}: correct one of them"
            )
    return added, special


def _special_texts(folder: Path, kept: Mapping[str, Any]) -> set[str]:
    """Return the texts of all tokens with a role, and of those listed as special."""
    values = [kept.get(f"{role}_token") for role in ROLES]
    for name in _LISTS:
        listed = kept.get(name, [])
        if not isinstance(listed, list | dict):
            raise UserError(f"{folder}: {name} is {_shown(listed)}, which lists no tokens")
        values += listed.values() if isinstance(listed, dict) else listed
    texts = (each.get("content") if isinstance(each, dict) else each for each in values)
    return {text for text in texts if isinstance(text, str) and text}


def token_text(path: Path, name: str, value: Any) -> str | None:
    """Return the text of a token, which is written as a text or as a token's fields; None where it
    is null. Raises UserError."""
    text = value.get("content") if isinstance(value, dict) else value
    if text is None and value is None:
        return None
    try:
        if isinstance(text, str) and text.encode():  # not half of a surrogate pair
            return text
    except UnicodeEncodeError:
        pass
    raise UserError(f"{path}: {name} is {_shown(value)}, which is no token's text")


def _token_ids(path: Path, value: Any) -> tuple[int, ...]:
    """Return the ids in an eos_token_id, which is a number or a list of them."""
    if value is None:
        return ()
    ids = value if isinstance(value, list) else [value]
    if not all(type(each) is int and each >= 0 for each in ids):
        raise UserError(f"{path}: eos_token_id is {_shown(value)}, which is no token's id")
    return tuple(dict.fromkeys(ids))


def _read(path: Path) -> dict[str, Any]:
    """Return the object in a file; an empty one where there is none."""
    return read_object(path, max_bytes=MAX_SETTINGS_BYTES) if os.path.lexists(path) else {}


def _read_text(path: Path) -> str:
    with open_file(path) as stream:
        content = stream.read(MAX_SETTINGS_BYTES + 1)
    if len(content) > MAX_SETTINGS_BYTES:
        raise UserError(f"{path} has more than {MAX_SETTINGS_BYTES} bytes, and is not read")
    try:
        return content.decode()
    except UnicodeDecodeError:
        raise UserError(f"{path} is not UTF-8") from None


def _listed(ids: tuple[int, ...]) -> str:
    return _shown(ids[0] if len(ids) == 1 else list(ids))


def _shown(value: Any) -> str:
    return f"{value!r:.{_MOST_SHOWN}}"
