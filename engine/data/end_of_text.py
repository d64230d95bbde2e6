"""Which token ends a text: the one rule, over all that a tokenizer's folder says.

1. The tokenizer's settings go first: eos_token of tokenizer_config.json or special_tokens_map.json,
   which must name the same; then the end that its own file has (sentencepiece's).
2. The model's ids must have it among them: eos_token_id of generation_config.json, or of
   config.json where that names none. A list with it is no disagreement: chat models list every
   token that stops them.
3. Where the tokenizer names none, it is the model's one id.
4. Where nothing names any, it is the one token of the vocabulary with a usual name.

What disagrees, and what leaves several to choose from, is a UserError that names the files and the
values. Training closes a response with this one token: it is the end of a turn where a chat
template has turns. Sampling stops at it, and at all others of the model's list as transformers
does: a model that was trained to stop there has nothing to say behind it.
"""

from collections.abc import Mapping, Sequence
from dataclasses import dataclass
from pathlib import Path

from engine.data.tokenizer_settings import TokenizerSettings
from engine.errors import UserError

END_OF_TEXT = "<|endoftext|>"
_USUAL = (END_OF_TEXT, "<|end_of_text|>", "</s>", "<eos>")
_MOST_SHOWN = 60  # characters of a text from a file in an error; our choice
_HINT = 'name it in tokenizer_config.json as {"eos_token": ...}'


@dataclass(frozen=True, kw_only=True)
class EndOfText:
    """The end of text, and what else stops a response."""

    text: str
    id: int
    also_stops: tuple[int, ...]
    """Other tokens at which the model's settings have it stop, sorted."""


def find_end(
    settings: TokenizerSettings, ids: Mapping[str, int], path: Path, own: str | None = None
) -> EndOfText:
    """Return the end of text of a tokenizer with these ids; raises UserError.

    path: of the tokenizer, for errors. own: the end that its own file names.
    """
    stops = {number for number in settings.model_ends if number in set(ids.values())}
    named = settings.end_of_text or own
    if named is None:
        named = _model_choice(settings, ids, stops, path) or _usual(ids, path)
    if named not in ids:
        raise UserError(f"{path} has no end-of-text token ({named:.{_MOST_SHOWN}}); {_HINT}")
    found = ids[named]
    if settings.model_ends and found not in settings.model_ends:
        ends = settings.model_ends
        raise UserError(
            f"{settings.end_path or path} names {named!r:.{_MOST_SHOWN}} (id {found}) as the end "
            f"of text, {settings.model_path} has eos_token_id "
            f"{(ends[0] if len(ends) == 1 else list(ends))!s:.{_MOST_SHOWN}}: correct one of them"
        )
    return EndOfText(text=named, id=found, also_stops=tuple(sorted(stops - {found})))


def _model_choice(
    settings: TokenizerSettings, ids: Mapping[str, int], stops: set[int], path: Path
) -> str | None:
    """Return the token of the one id that the model's settings name; None where they name none."""
    ends: Sequence[int] = settings.model_ends
    if not ends:
        return None
    if not stops:
        raise UserError(
            f"{settings.model_path} has eos_token_id {list(ends)!s:.{_MOST_SHOWN}}, which {path} "
            f"lacks; {_HINT}"
        )
    if len(stops) > 1:
        raise UserError(
            f"{settings.model_path} has eos_token_id {list(ends)!s:.{_MOST_SHOWN}}, and nothing "
            f"says which of them ends a text; {_HINT}"
        )
    return next(text for text, number in ids.items() if number in stops)


def _usual(ids: Mapping[str, int], path: Path) -> str:
    found = [text for text in _USUAL if text in ids]
    if len(found) == 1:
        return found[0]
    if found:
        raise UserError(
            f"{path} has {' and '.join(found)}, and nothing says which of them ends a text; {_HINT}"
        )
    raise UserError(f"{path} has no end-of-text token ({', '.join(_USUAL)}); {_HINT}")
