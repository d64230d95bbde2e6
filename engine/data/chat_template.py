"""A dialogue as the tokens that a model from elsewhere was taught to read: its chat template.

The template is a program of jinja's (as transformers has them), which comes with a tokenizer and
writes a list of messages as one text. Control tokens that it writes become these tokens. Where a
message has the text of one, that stays text: who writes a message does not end the turn.

A template that looks into such a message finds a mark there, which its text is without.

What a template says is not trusted: it runs in jinja's sandbox, sees plain values alone, and the
text that it writes has a limit, part by part. Memory and time within a part have none.
"""

import datetime
import hashlib
import json
import re
from collections.abc import Mapping, Sequence
from typing import Any, NoReturn

import jinja2
import jinja2.nodes
import jinja2.sandbox
import jinja2.utils
import numpy as np

from engine.data.codecs import Control
from engine.data.tokenizer import Tokenizer
from engine.data.tokenizer_settings import ROLES
from engine.errors import UserError

_MOST_CHARACTERS = 1 << 24  # of a dialogue; our choice
_MAX_REASON = 200  # characters of jinja's own words; our choice
_GENERATION = re.compile(r"\{%[-+]?\s*(end)?generation\s*[-+]?%\}")
_Message = Mapping[str, Any]
_MARKS = range(0xE000, 0xF900)  # characters that Unicode leaves to whoever uses them


class ChatTemplate:
    """How a tokenizer's model reads dialogues."""

    def __init__(self, tokenizer: Tokenizer) -> None:
        """Raises UserError for a tokenizer without a template, or with one that does not load."""
        source = template_of(tokenizer)
        if source is None:
            raise UserError(
                f"{tokenizer.path} has no chat template: give a tokenizer that has one, or have "
                "dialogues read as turns"
            )
        tokenizer.read_control("")  # or it cannot
        self._tokenizer = tokenizer
        settings = tokenizer.kept("tokenizer_config.json")
        extra = settings.get("extra_special_tokens")
        named = dict(extra) if isinstance(extra, dict) else {}
        named |= {name: settings.get(name) for name in (f"{role}_token" for role in ROLES)}
        texts = {name: _text_of(token) for name, token in named.items()}
        self._values = {name: text for name, text in texts.items() if text is not None}
        environment, source = _environment(), _GENERATION.sub(_as_condition, source)
        try:
            for node in environment.parse(source).find_all(jinja2.nodes.NSRef):
                _check_public(node.attr)
            self._template = environment.from_string(source)
        except (jinja2.TemplateError, RecursionError) as error:
            raise self._refused("does not load", error) from None

    def text(self, messages: Sequence[_Message], *, is_open: bool = True) -> str:
        """Return the dialogue as the template writes it, with the assistant's turn open or not;
        raises UserError where it refuses the messages, or fails."""
        parts, num_characters = [], 0
        values: dict[str, Any] = {**self._values, "tools": None, "documents": None}
        values |= {"messages": [dict(message) for message in messages]}
        try:
            for part in self._template.generate(**values, add_generation_prompt=is_open):
                parts.append(part)
                num_characters += len(part)
                if num_characters > _MOST_CHARACTERS:
                    raise ValueError(f"it writes more than {_MOST_CHARACTERS} characters")
        except Exception as error:  # the template's own, of any type
            raise self._refused("does not take this dialogue", error) from None
        if not any(parts):
            raise self._refused("does not take this dialogue", ValueError("it writes nothing"))
        return "".join(parts)

    def prompt(self, messages: Sequence[_Message]) -> tuple[str, np.ndarray]:
        """Return the dialogue's text, with the assistant's turn open, and its tokens [n] int64;
        raises UserError as text() does."""
        mark = self._mark_of(messages)
        text = self._text(messages, mark, is_open=True)
        return text.replace(mark, ""), np.asarray(self._tokens(text, mark), dtype=np.int64)

    def reply(self, messages: Sequence[_Message]) -> np.ndarray:
        """Return the tokens [n] int64 of the last message, the assistant's: those of behind(), up
        to and with the first that stops a response; without one all, and the end of text."""
        tokens = self.behind(messages)
        stops = {self._tokenizer.eos_id, *self._tokenizer.also_stops}
        end = next((n for n, token in enumerate(tokens, 1) if token in stops), None)
        ended = [*tokens, self._tokenizer.eos_id] if end is None else tokens[:end]
        return np.asarray(ended, dtype=np.int64)

    def behind(self, messages: Sequence[_Message]) -> list[int]:
        """Return all tokens that the template writes behind the prompt which opens the last
        message's turn; UserError where it writes another prompt before a reply, or none of it."""
        mark = self._mark_of(messages)
        opened = self._text(messages[:-1], mark, is_open=True)
        whole = self._text(messages, mark, is_open=False)
        if not whole.startswith(opened) or not whole[len(opened) :].strip():
            raise UserError(
                f"{self._tokenizer.path}: its chat template writes a reply otherwise than behind "
                "the turn that it opens for one, so that none can be trained; --data.chat turns "
                "does without it"
            )
        asked, tokens = self._tokens(opened, mark), self._tokens(whole, mark)
        if tokens[: len(asked)] == asked:
            return tokens[len(asked) :]
        return self._tokens(whole[len(opened) :], mark)  # the seam is within a token

    def _mark_of(self, messages: Sequence[_Message]) -> str:
        """Return the character that is to part the texts of control tokens in messages; "" where
        none has one."""
        if not any(self._control(message["content"]) for message in messages):
            return ""
        contents = "".join(message["content"] for message in messages)
        return next(chr(code) for code in _MARKS if chr(code) not in contents)

    def _text(self, messages: Sequence[_Message], mark: str, *, is_open: bool) -> str:
        if mark:
            messages = [{**m, "content": self._marked(m["content"], mark)} for m in messages]
        return self.text(messages, is_open=is_open)

    def _tokens(self, text: str, mark: str) -> list[int]:
        """Return the tokens of what the template has written, its own control tokens among them."""
        if not mark:
            return self._tokenizer.read_control(text)[0]
        tokens, end = [], 0
        for start, stop, token in self._control(text):  # the template's own
            tokens += [*self._ordinary(text[end:start].replace(mark, "")), token]
            end = stop
        return tokens + self._ordinary(text[end:].replace(mark, ""))

    def _marked(self, content: str, mark: str) -> str:
        """Return a message with marks between the characters of control tokens' texts, which are
        none then; raises UserError where one is a single character."""
        marked, end = "", 0
        for start, stop, _ in self._control(content):
            marked += content[end:start] + mark.join(content[start:stop])
            end = stop
        marked += content[end:]
        if self._control(marked):
            raise self._refused(
                "does not take this dialogue", ValueError("a message has a control token's text")
            )
        return marked

    def _control(self, text: str) -> list[Control]:
        return self._tokenizer.read_control(text)[1]

    def _ordinary(self, text: str) -> list[int]:
        return self._tokenizer.encode(text) if text else []

    def _refused(self, what: str, error: BaseException) -> UserError:
        reason = str(error).split("\n", 1)[0].strip()[:_MAX_REASON] or type(error).__name__
        return UserError(f"{self._tokenizer.path}: its chat template {what}: {reason}")


def digest_of_template(tokenizer: Tokenizer) -> str:
    """Return a sha256 of a tokenizer's chat template; "" without one."""
    source = template_of(tokenizer)
    return hashlib.sha256(source.encode()).hexdigest() if source else ""


def template_of(tokenizer: Tokenizer) -> str | None:
    """Return a tokenizer's chat template, of several the one named "default"; None without one."""
    kept = tokenizer.kept("tokenizer_config.json").get("chat_template")
    if isinstance(kept, list):
        kept = {each.get("name"): each.get("template") for each in kept if isinstance(each, dict)}
    if isinstance(kept, dict):
        kept = kept.get("default")
    return kept if isinstance(kept, str) and kept else None


def _text_of(token: Any) -> str | None:
    """Return the text of a token of tokenizer_config.json, written as such or with its fields."""
    text = token.get("content") if isinstance(token, Mapping) else token
    return text if isinstance(text, str) else None


def _as_condition(tag: re.Match[str]) -> str:
    """What an assistant wrote is marked for masks, which nothing here asks for."""
    return tag[0].replace("endgeneration", "endif").replace("generation", "if true")


def _namespace(**values: Any) -> jinja2.utils.Namespace:
    for name in values:
        _check_public(name)
    return jinja2.utils.Namespace(values)


def _check_public(name: str) -> None:
    """A namespace hands out any name that was set, past the sandbox."""
    if name.startswith("_"):
        raise jinja2.TemplateError(f"it sets {name!r:.60}")


def _environment() -> jinja2.Environment:
    """Return where templates run: what transformers gives them, and nothing else."""
    found = jinja2.sandbox.ImmutableSandboxedEnvironment(
        trim_blocks=True,
        lstrip_blocks=True,
        optimized=False,  # what is constant is computed when a dialogue asks for it
        extensions=["jinja2.ext.loopcontrols"],
    )
    found.filters["tojson"] = _as_json
    found.globals = {
        "range": jinja2.sandbox.safe_range,
        "namespace": _namespace,
        "dict": lambda **values: dict(**values),
        "raise_exception": _raise,
        "strftime_now": lambda form: datetime.datetime.now().strftime(form),
    }
    return found


def _as_json(
    value: Any,
    ensure_ascii: bool = False,
    indent: int | None = None,
    separators: tuple[str, str] | None = None,
    sort_keys: bool = False,
) -> str:
    """jinja's own escapes what HTML would read."""
    options = {"indent": indent, "separators": separators, "sort_keys": sort_keys}
    return json.dumps(value, ensure_ascii=ensure_ascii, **options)  # type: ignore[arg-type]


def _raise(message: str) -> NoReturn:
    raise jinja2.TemplateError(message)
