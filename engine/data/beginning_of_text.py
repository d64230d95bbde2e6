"""Which tokens a tokenizer's files put around every text, by one rule.

1. A tokenizer.json says so itself, by its post_processor. What add_bos_token says beside it counts
   for nothing, as in transformers 5; older ones followed it, so that a difference is told.
2. Other files do where tokenizer_config.json has add_bos_token: bos_token, of that file or of
   special_tokens_map.json, or else the beginning that a sentencepiece model names.

What stands before a text begins each sequence and each document, once, and is never predicted in a
prompt. What they put behind a text is put nowhere: a response and a document are closed with the
end of text in any case, and a prompt stays open. So only another token there is told of.
"""

import json
from collections.abc import Mapping
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import tokenizers

from engine.data.tokenizer_settings import TokenizerSettings, token_text
from engine.errors import UserError

_MOST = 16  # tokens before a text; our choice: GLM has two, most have one
_MOST_SHOWN = 60  # characters of a text from a file in an error; our choice
_REBUILT = ("GPTNeoXTokenizer", "GPTNeoXTokenizerFast")
"""Classes of transformers that read a tokenizer.json without its post_processor."""


@dataclass(frozen=True, kw_only=True)
class Around:
    """Tokens around every text, with what they are called."""

    before: tuple[tuple[int, str], ...] = ()
    behind: tuple[tuple[int, str], ...] = ()

    @property
    def bos_ids(self) -> tuple[int, ...]:
        """The ids of those before it."""
        return tuple(number for number, _ in self.before)

    @property
    def bos_text(self) -> str:
        """What those before it are called, with a space between two."""
        return " ".join(text for _, text in self.before)


def named_beginning(
    settings: TokenizerSettings,
    ids: Mapping[str, int],
    path: Path,
    folder: Path,
    own: str | None = None,
) -> str | None:
    """Return the token that the settings beside a tokenizer put before a text, by its text; raises
    UserError where it is not named, or no token.

    path: of the tokenizer, for errors, as its folder. own: the beginning that its own file names.
    """
    if settings.tokenizer.get("add_bos_token") is not True:
        return None
    config = folder / "tokenizer_config.json"
    text = token_text(config, "bos_token", settings.tokenizer.get("bos_token")) or own
    if text is None:
        raise UserError(
            f'{config} has add_bos_token, and nothing names the token: name it as {{"bos_token": '
            "...}, or remove add_bos_token"
        )
    if text not in ids:
        raise UserError(
            f"{config} puts the bos_token {text!r:.{_MOST_SHOWN}} before texts, which {path} "
            "lacks: correct one of them"
        )
    return text


def template(text: str, number: int) -> dict[str, Any]:
    """Return the post_processor, as tokenizer.json has it, that puts one token before a text."""
    special = {"SpecialToken": {"id": text, "type_id": 0}}
    first, second = ({"Sequence": {"id": name, "type_id": 0}} for name in "AB")
    return {
        "type": "TemplateProcessing",
        "single": [special, first],
        "pair": [special, first, second],
        "special_tokens": {text: {"id": text, "ids": [number], "tokens": [text]}},
    }


def put_before(model: tokenizers.Tokenizer, text: str, number: int) -> None:
    """Have a tokenizer of the library's put that token before a text, and nothing else."""
    processor = tokenizers.processors.TemplateProcessing(single="$A", pair="$A $B")
    processor.__setstate__(json.dumps(template(text, number)).encode())  # any text is a name here
    model.post_processor = processor


def put_around(model: tokenizers.Tokenizer, path: Path) -> Around:
    """Return what a tokenizer's post_processor puts around a text; raises UserError where that is
    no token, or the text does not stay in one piece between."""
    if model.post_processor is None:
        return Around()
    # Its ids are in its own words: any text shows them, such as the one token of another model.
    probe = tokenizers.Tokenizer(tokenizers.models.WordLevel({"a": 0}, unk_token="a"))
    probe.post_processor = model.post_processor
    found = probe.encode("a")
    is_put = found.special_tokens_mask
    if is_put.count(0) != 1:
        raise UserError(
            f"{path}: this tokenizer repeats or drops a text in its post_processor, which may only "
            "put tokens around it"
        )
    seam = is_put.index(0)
    if seam > _MOST:
        raise UserError(
            f"{path}: its post_processor puts {seam} tokens before a text; {_MOST} are the most"
        )
    put = list(zip(found.ids, found.tokens, strict=True))
    around = Around(before=tuple(put[:seam]), behind=tuple(put[seam + 1 :]))
    for number, text in around.before:
        if model.id_to_token(number) != text:
            raise UserError(
                f"{path}: its post_processor puts {text!r:.{_MOST_SHOWN}} before a text as the id "
                f"{number}, which is not that token's"
            )
    return around


def check_reader(settings: TokenizerSettings, path: Path, around: Around) -> None:
    """Raise UserError where a tokenizer.json puts tokens before a text, and the class that
    transformers reads it with does not."""
    if around.before and settings.reader in _REBUILT:
        raise UserError(
            f"{path}: its post_processor puts {around.bos_text:.{_MOST_SHOWN}} before a text, and "
            f"{path.parent / 'tokenizer_config.json'}, or config.json there, has transformers read "
            f"it as a {settings.reader}, which puts nothing: correct one of them (the "
            "tokenizer_class PreTrainedTokenizerFast reads it as it stands)"
        )


def notes(settings: TokenizerSettings, around: Around, eos_id: int) -> tuple[str, ...]:
    """Return what is to be said of a tokenizer.json that puts these tokens around a text."""
    found = []
    adds = settings.tokenizer.get("add_bos_token")
    if adds is not None and adds != bool(around.before):
        found.append(
            f"tokenizer_config.json has add_bos_token {str(adds).lower()}, and the post_processor "
            f"puts {around.bos_text or 'nothing'} before a text: so it is done here, as in "
            "transformers 5; older ones went by add_bos_token"
        )
    behind = " ".join(text for number, text in around.behind if number != eos_id)
    if behind:
        found.append(
            f"its post_processor puts {behind} behind every text, and here nothing is: a model "
            "that was trained with it reads texts without, and transformers reads those of an "
            "export with it"
        )
    return tuple(found)
