"""What a prompt becomes before a model reads it: one object, which a run keeps.

    RUN/prompt_format.json       also of an export, beside its config.json

Later stages and generate.py have it from the run before them (engine/identity/prompt_formats.py).
"""

import json
import os
import re
from collections import Counter
from collections.abc import Collection, Mapping, Sequence
from dataclasses import asdict, dataclass, field, fields, replace
from pathlib import Path
from typing import Any

import numpy as np

from engine.errors import UserError, named, quoted
from engine.files import MAX_SHOWN_PATH, read_object, replacing
from engine.settings.prompt_options import PromptOptions

PROMPT_FORMAT = "prompt_format.json"
OPTIONS = tuple(each.name for each in fields(PromptOptions))
"""The fields that a stage has options for."""
CLOSING = ("closes_open", "leaves_spaced")
"""The fields in which versions differ: what of prompts the suffix closes."""
TEXTS, DIALOGUES = "texts", "dialogues"
_MAX_BYTES = 1 << 20  # of such a file, which has a few hundred; our choice
_CHOICES = {"chat": ("turns", "template"), "plain_prompts": ("text", "message")}
_ROLES = {"system": "System", "user": "User", "assistant": "Assistant"}
_TEXT_TURN = re.compile(r"(\n\n)?(Human|User):(?= )")
"""What a dialogue in text begins with: HH-RLHF's "\n\nHuman:", or as others have written it."""


@dataclass(frozen=True, kw_only=True)
class PromptFormat:
    """How plain prompts and dialogues become the text that a model reads."""

    prompt_suffix: str = "\n"
    """Closes a plain prompt that is not open; see closing()."""
    plain_prompts: str = "text"
    """"text": a plain prompt is the text that it is; "message": one message of the user's."""
    chat: str = "turns"
    """"turns": a dialogue is "Role: content", turn by turn; "template": by the chat template."""
    chat_template: str = ""
    """A sha256 of the chat template; "" of turns, and where it is not known."""
    system: str = ""
    """A system message, put before dialogues that begin with none; "": none is."""
    roles: Mapping[str, str] = field(default_factory=lambda: dict(_ROLES))
    """What turns call who speaks."""
    separator: str = "\n\n"
    """Between two turns."""
    closes_open: bool = False
    """Whether the suffix closes what is open too: dialogues, prompts cut out of pairs. So it was in
    runs of before there was this file."""
    leaves_spaced: bool = False
    """Whether whitespace at a prompt's end stands for a suffix of whitespace, and another suffix is
    written again where it is there. So it was in runs whose file has not this field."""
    trained_on: tuple[str, ...] = ()
    """What the run, and those before it, were trained on: texts, dialogues or both."""
    text_turns: str = ""
    """What the user's first turn begins with where most of the run's plain prompts are dialogues in
    text: "Human:", behind an empty line in HH-RLHF's; "" where most are none."""
    text_end: str = ""
    """What stands behind the open turn in most of those: a space, or nothing."""
    begins_with: tuple[int, ...] = ()
    """For people: the ids that the tokenizer puts before a text."""
    ends_with: int | None = None
    """For people: the id that ends a response."""

    def turn(self, message: Mapping[str, Any]) -> str:
        """Return a message as a turn."""
        return f"{self.roles[message['role']]}: {message['content']}"

    @property
    def open_turn(self) -> str:
        """What a dialogue ends in where the assistant is to speak."""
        return f"{self.separator}{self.roles['assistant']}:"

    @property
    def next_turn(self) -> str:
        """Where the user's next turn begins."""
        return f"{self.separator}{self.roles['user']}:"

    def closing(self, text: str) -> str:
        """Return what closes a plain prompt: nothing where it ends in the open turn, else what of
        the suffix it does not end in already: all of that, or whitespace that it begins with. So a
        closed prompt ends in the suffix, once."""
        suffix = self.prompt_suffix
        if self.closes_open:
            return suffix
        if (text if self.leaves_spaced else text.rstrip(" ")).endswith(self.open_turn):
            return ""
        if self.leaves_spaced:
            return "" if text[-1:].isspace() and suffix.isspace() else suffix
        if text.endswith(suffix):
            return ""
        num_spaces = len(suffix) - len(suffix.lstrip())
        there = (n for n in range(num_spaces, 0, -1) if text.endswith(suffix[:n]))
        return suffix[next(there, 0) :]

    def text_turns_of(self, text: str) -> str:
        """Return what the user's first turn begins with in a plain prompt that is a dialogue in
        text and ends in the open turn; "" in any other."""
        found = _TEXT_TURN.match(text) if text.rstrip(" ").endswith(self.open_turn) else None
        return found[0] if found else ""

    @property
    def next_text_turn(self) -> str:
        """Where the user's next turn begins in a dialogue in text."""
        return self.separator + self.text_turns.lstrip()

    def in_text(self, messages: Sequence[Mapping[str, Any]]) -> str:
        """Return a dialogue of user and assistant as the run's dialogues in text are written, with
        the reply open."""
        begin = {"user": self.next_text_turn, "assistant": self.open_turn}
        turns = "".join(f"{begin[m['role']]} {m['content']}" for m in messages)
        turns = turns.removeprefix(self.next_text_turn)
        return f"{self.text_turns}{turns}{self.open_turn}{self.text_end}"

    def having(self, options: Mapping[str, str | None]) -> "PromptFormat":
        """Return the format with the options that are not None; another `chat` has no template that
        is known."""
        given = {name: options[name] for name in OPTIONS if options.get(name) is not None}
        if given.get("chat", self.chat) != self.chat:
            given["chat_template"] = ""
        return replace(self, **given)  # type: ignore[arg-type]


@dataclass(frozen=True)
class Prompt:
    """What a model is asked; equal ones have equal texts."""

    text: str
    """As the model reads it, but for the suffix."""
    suffix: str = ""
    is_dialogue: bool = False
    tokens: np.ndarray | None = field(default=None, compare=False, repr=False)
    """[n] int64, with what begins a text, where more than the text decides them."""

    @property
    def key(self) -> str:
        """What a prompt is known by where the held-out ones are told from the others: whitespace at
        its end may be the suffix."""
        return self.text.rstrip()


@dataclass(frozen=True)
class Reply:
    """What a prompt is answered with."""

    text: str
    """As the model writes it, but for control tokens."""
    tokens: np.ndarray | None = field(default=None, compare=False, repr=False)
    """[n] int64, with the one that ends it, where a chat template says which they are."""


def read_prompt_format(folder: Path) -> PromptFormat | None:
    """Return what a run's folder or an export says, None where it says nothing; raises UserError.

    Of a run from before there was such a file, config.json says what its prompts were.
    """
    path = folder / PROMPT_FORMAT
    if os.path.lexists(path):
        values = read_object(path, max_bytes=_MAX_BYTES)
        try:
            return prompt_format_of(values)
        except ValueError as error:
            raise UserError(f"{named(path, MAX_SHOWN_PATH)}: {error}") from None
    return _of_settings(folder / "config.json")


def write_prompt_format(form: PromptFormat, folder: Path) -> None:
    """Write it into a folder, whole or not at all."""
    with replacing(folder / PROMPT_FORMAT) as stream:
        stream.write((json.dumps(asdict(form), indent=2) + "\n").encode())


def prompt_format_beside(path: Path) -> PromptFormat | None:
    """Return read_prompt_format of what a path means: a run, also where one of its checkpoints or a
    network in one is named, or a Hugging Face folder."""
    is_within = any((path / name).exists() for name in ("manifest.json", "network.json"))
    for folder in (path, *(path.absolute().parents[1:3] if is_within else ())):
        if (found := read_prompt_format(folder)) is not None:
            return found
    return None


def format_differences(kept: PromptFormat, now: PromptFormat) -> dict[str, tuple[Any, Any]]:
    """Return {field: (kept, now)} of what a run was trained with and is otherwise now; nothing that
    it was not trained on counts. Nor does what closes some prompts alone: each says so itself
    (engine/data/renderer.py)."""
    names: list[str] = []
    if TEXTS in kept.trained_on:
        names += ["prompt_suffix", "plain_prompts"]
    elif kept.trained_on and kept.plain_prompts == "message":
        names += ["plain_prompts"]
    if DIALOGUES in kept.trained_on:
        names += ["chat", "chat_template", "system", "roles", "separator"]
        names += ["prompt_suffix"] if kept.closes_open and TEXTS not in kept.trained_on else []
    found = {name: (getattr(kept, name), getattr(now, name)) for name in names}
    if "" in found.get("chat_template", ()) or "chat" in found and kept.chat != now.chat:
        found.pop("chat_template", None)
    return {name: both for name, both in found.items() if both[0] != both[1]}


def in_words(found: Mapping[str, tuple[Any, Any]], kept: str, now: str) -> str:
    """Return differences as a sentence has them; kept, now: whose they are."""
    return "; ".join(
        f"{name} {quoted(a)} {kept}, {quoted(b)} {now}" for name, (a, b) in found.items()
    )


def trained_on(before: Collection[str], prompts: Collection[Prompt]) -> tuple[str, ...]:
    """Return what a run is trained on, with these prompts after `before`."""
    kinds = {DIALOGUES if prompt.is_dialogue else TEXTS for prompt in prompts}
    return tuple(kind for kind in (TEXTS, DIALOGUES) if kind in kinds | set(before))


def having_text_turns(form: PromptFormat, prompts: Collection[Prompt]) -> PromptFormat:
    """Return the format with what the dialogues in text begin and end with that most of the plain
    prompts are, nothing where most are none; the format itself where there are no plain prompts."""
    texts = [prompt.text for prompt in prompts if not prompt.is_dialogue]
    if not texts:
        return form
    ((begin, number),) = Counter(map(form.text_turns_of, texts)).most_common(1)
    if not begin or number <= len(texts) / 2:
        return replace(form, text_turns="", text_end="")
    ends = (text[len(text.rstrip(" ")) :] for text in texts if form.text_turns_of(text) == begin)
    ((end, _),) = Counter(ends).most_common(1)
    return replace(form, text_turns=begin, text_end=end)


def _of_settings(path: Path) -> PromptFormat | None:
    """Return the format that a stage's config.json has, None where it is none's."""
    if not os.path.lexists(path):
        return None
    try:
        data = read_object(path, max_bytes=_MAX_BYTES).get("data")
    except UserError:  # who reads the run says what is wrong with it
        return None
    if not isinstance(data, dict) or not isinstance(data.get("prompt_suffix"), str):
        return None
    was_asked = "train" not in data or data["train"] is not None
    values = {name: data[name] for name in OPTIONS if isinstance(data.get(name), str)}
    try:
        return prompt_format_of(
            {
                **values,
                "closes_open": "chat" not in data,
                "leaves_spaced": False,
                "trained_on": [TEXTS, DIALOGUES] if was_asked else [],
            }
        )
    except ValueError:
        return None


def prompt_format_of(values: Mapping[str, Any]) -> PromptFormat:
    """Return the format of a file's values; raises ValueError for what is none."""
    known, default = {each.name for each in fields(PromptFormat)}, PromptFormat()
    for name, value in values.items():
        if name not in known:
            raise ValueError(f"unknown field {named(name)}")
        is_sound = isinstance(value, type(getattr(default, name)))
        if name in _CHOICES:
            is_sound = value in _CHOICES[name]
        elif isinstance(value, str):
            is_sound = is_sound and _is_text(value)
        elif name == "roles":
            is_sound = is_sound and value.keys() == _ROLES.keys()
            is_sound = is_sound and all(_is_text(each) for each in value.values())
        elif name == "trained_on":
            is_sound = isinstance(value, list)
            is_sound = is_sound and all(each in (TEXTS, DIALOGUES) for each in value)
        elif name == "begins_with":
            is_sound = isinstance(value, list) and all(type(each) is int for each in value)
        elif name == "ends_with":
            is_sound = value is None or type(value) is int
        if not is_sound:
            raise ValueError(f"{name} cannot be {quoted(value)}")
    found: dict[str, Any] = {n: tuple(v) if isinstance(v, list) else v for n, v in values.items()}
    return PromptFormat(**{"leaves_spaced": True} | found)


def _is_text(value: Any) -> bool:
    """Return whether a value is a text that a tokenizer can read: JSON can spell half of a pair."""
    try:
        return isinstance(value, str) and bool(value.encode() or True)
    except UnicodeEncodeError:
        return False
