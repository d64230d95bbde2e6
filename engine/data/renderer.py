"""What a record asks, and its replies, as a model reads them: by one format, in every stage.

A dialogue in turns is each "Role: content", joined by an empty line. The prompt ends in the open
turn that the reply fills, and the reply begins with the space after the colon:

    System: Answer in one word.

    User: What colour is the sky?

    Assistant:| Blue

where | is the seam between prompt and response. There are no special tokens: a base model reads it
as text. A chat template (engine/data/chat_template.py) writes its own, and ends a reply itself.

A plain prompt is closed by the suffix, once, unless it is open: that is seen in the prompt alone,
as whoever answers has nothing else. One that was cut out of a pair goes on where it was cut.
"""

import os.path
from collections.abc import Callable, Mapping, Sequence
from dataclasses import replace
from typing import Any, TypeVar

import numpy as np

from engine.containers.row import BadRecord
from engine.data.chat import Asked
from engine.data.chat_template import ChatTemplate, digest_of_template
from engine.data.prompt_format import (
    CLOSING,
    DIALOGUES,
    TEXTS,
    Prompt,
    PromptFormat,
    Reply,
    having_text_turns,
    trained_on,
)
from engine.data.tokenizer import Tokenizer
from engine.errors import UserError, quoted

_FIRST = 16  # characters of a prompt that mostly have a token; our choice
_Made = TypeVar("_Made")
Parts = tuple[tuple[int, int], ...]
"""Parts of a prompt's tokens, from a first to behind a last."""


class Renderer:
    """A format, with the tokenizer that it is for."""

    def __init__(
        self,
        form: PromptFormat | None = None,
        tokenizer: Tokenizer | None = None,
        others: Mapping[str, PromptFormat] | None = None,
    ) -> None:
        """Without a tokenizer there are texts alone. others: the formats of networks that read the
        same prompts, by their options. Raises UserError where its chat template is wanted, and it
        has none, or another than the format's."""
        self.form = form or PromptFormat()
        self.others = dict(others or {})
        """The formats of networks that read the same prompts, by their options."""
        self._closing_otherwise = {
            option: other
            for option, other in self.others.items()
            if any(getattr(other, each) != getattr(self.form, each) for each in CLOSING)
        }
        self._noted = self.form
        self.seen: tuple[str, ...] = ()
        """What note() was told of: texts, dialogues."""
        self.tokenizer = tokenizer
        self._template: ChatTemplate | None = None
        if self.form.chat == "template" and tokenizer is not None:
            self._template = ChatTemplate(tokenizer)
            if self.form.chat_template not in ("", digest_of_template(tokenizer)):
                raise UserError(
                    f"{tokenizer.path}: its chat template is another than the one that was trained "
                    "by; give the tokenizer that lies with the run before, or --data.chat turns"
                )

    def note(self, prompts: Sequence[Prompt]) -> None:
        """Have the run remember what it was trained on."""
        self.seen = trained_on(self.seen, prompts)
        self._noted = having_text_turns(self.form, prompts)

    def kept(self) -> PromptFormat:
        """Return the format as the run keeps it."""
        tokenizer = self.tokenizer
        seen = trained_on((*self.form.trained_on, *self.seen), ())
        form = replace(self._noted, trained_on=seen)
        if tokenizer is None:
            return form
        return replace(
            form,
            chat_template=digest_of_template(tokenizer) if self._template else "",
            begins_with=tuple(tokenizer.bos_ids),
            ends_with=tokenizer.eos_id,
        )

    def prompt(self, asked: Asked) -> Prompt:
        """Return what a record asks; BadRecord where the template does not take it, or no token
        comes of it. UserError where one of the others reads it otherwise."""
        messages = self._messages(asked)
        if messages and self._template is not None:
            text, tokens = self._taken(lambda t: t.prompt(messages), asked)
            return Prompt(text, is_dialogue=True, tokens=tokens)
        text = self._turns(messages) if messages else asked.text
        suffix = _closing(self.form, asked, text, is_dialogue=bool(messages))
        self._check_others(asked, text, suffix, is_dialogue=bool(messages))
        self._check_tokens(text + suffix, asked)
        return Prompt(text, suffix, is_dialogue=bool(messages))

    def reply(self, asked: Asked, content: str) -> Reply:
        """Return a reply to what a record asks; BadRecord as prompt()."""
        messages = self._messages(asked)
        if not messages:
            return Reply(content)
        if self._template is None:
            return Reply(f" {content}")
        whole = [*messages, {"role": "assistant", "content": content}]
        return Reply(content, self._taken(lambda t: t.reply(whole), asked))

    def earlier_replies(self, asked: Asked) -> tuple[Prompt, Parts]:
        """Return what a record asks, with its tokens, and which of these are replies that a
        dialogue has already, but for those of weight 0. BadRecord as prompt(), and where the
        template writes them otherwise than when they are the last."""
        assert self.tokenizer is not None
        prompt, messages = self.prompt(asked), self._messages(asked)
        tokens = prompt.tokens
        if tokens is None:
            written = self.tokenizer.encode(prompt.text + prompt.suffix)
            tokens = np.asarray([*self.tokenizer.bos_ids, *written], dtype=np.int64)
        parts = [
            self._part(messages, index, tokens, asked)
            for index, message in enumerate(messages)
            if message["role"] == "assistant" and message.get("weight") != 0
        ]
        found = tuple((start, end) for start, end in parts if start < end)
        return Prompt(prompt.text, prompt.suffix, prompt.is_dialogue, tokens), found

    def _check_others(self, asked: Asked, text: str, suffix: str, *, is_dialogue: bool) -> None:
        """Raise UserError where another network was trained to read a prompt otherwise closed."""
        for option, form in self._closing_otherwise.items():
            theirs = _closing(form, asked, text, is_dialogue=is_dialogue)
            is_known = (DIALOGUES if is_dialogue else TEXTS) in form.trained_on
            if is_known and theirs != suffix:
                raise UserError(
                    f"{option} was trained by another version, which closes the prompt "
                    f"{quoted(text)} by {theirs!r}, and this run by {suffix!r}: train that one "
                    "anew, or leave such prompts out"
                )

    def _messages(self, asked: Asked) -> list[dict[str, Any]]:
        """Return what is asked as messages; an empty list where it is a text."""
        messages = list(asked.messages)
        if not messages and self.form.plain_prompts == "message" and not asked.is_cut:
            messages = [{"role": "user", "content": asked.text}]
        if messages and self.form.system and messages[0]["role"] != "system":
            messages.insert(0, {"role": "system", "content": self.form.system})
        return messages

    def _turns(self, messages: Sequence[dict[str, Any]]) -> str:
        open_turn = self.form.open_turn.removeprefix(self.form.separator)
        return self.form.separator.join([*map(self.form.turn, messages), open_turn])

    def _taken(self, ask: Callable[[ChatTemplate], _Made], asked: Asked) -> _Made:
        """Return what the template makes of a record; BadRecord where it does not take it."""
        assert self._template is not None
        try:
            return ask(self._template)
        except UserError as error:
            raise BadRecord(f"is not taken: {error}", field=asked.field) from None

    def _check_tokens(self, text: str, asked: Asked) -> None:
        tokenizer = self.tokenizer
        if tokenizer is None or tokenizer.bos_ids or tokenizer.encode(text[:_FIRST]):
            return
        if not tokenizer.encode(text):
            raise BadRecord(
                "becomes no token: the tokenizer leaves all of it out", field=asked.field
            )

    def _part(
        self, messages: Sequence[dict[str, Any]], index: int, tokens: np.ndarray, asked: Asked
    ) -> tuple[int, int]:
        """Return where in a dialogue's tokens a reply of it is. What is in a token with something
        else is none of it."""
        if self._template is not None:
            return self._part_by_template(messages[: index + 1], tokens, asked)
        assert self.tokenizer is not None
        num_before = len(self.tokenizer.bos_ids)
        text = self._turns(messages[:index])
        opened = self.tokenizer.encode(text)
        filled = self.tokenizer.encode(f"{text} {messages[index]['content']}")
        whole = tokens[num_before:].tolist()
        start, end = (len(os.path.commonprefix([part, whole])) for part in (opened, filled))
        start += start < len(opened)
        return num_before + start, num_before + end

    def _part_by_template(
        self, messages: Sequence[dict[str, Any]], tokens: np.ndarray, asked: Asked
    ) -> tuple[int, int]:
        """Return where the last of some messages is in the tokens of a longer dialogue."""
        _, opened = self._taken(lambda t: t.prompt(messages[:-1]), asked)
        behind = self._taken(lambda t: t.behind(messages), asked)
        reply = self._taken(lambda t: t.reply(messages), asked)[: len(behind)]
        start, end = len(opened), len(opened) + len(reply)
        if not np.array_equal(tokens[:end], np.concatenate([opened, reply])):
            raise BadRecord(
                "has a reply that the chat template writes otherwise where another follows; "
                "--data.replies last trains the last alone",
                field=asked.field,
            )
        return start, end


def _closing(form: PromptFormat, asked: Asked, text: str, *, is_dialogue: bool) -> str:
    """Return what a format puts behind the text of what is asked."""
    goes_on = is_dialogue or asked.is_cut
    return "" if goes_on and not form.closes_open else form.closing(text)
