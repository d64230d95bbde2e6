"""The options that say how a stage's prompts are read (engine/data/prompt_format.py).

Imports neither torch nor megatron.
"""

from dataclasses import dataclass, field
from typing import Literal

from engine.settings.saved import EARLIER, INHERITS
from engine.settings.typed_text import TypedText


@dataclass(frozen=True, kw_only=True)
class PromptOptions:
    """What every stage's data has of them. One that is None is as the run before has it."""

    prompt_suffix: TypedText | None = field(default=None, metadata={INHERITS: True})
    r"""Closes every plain prompt that is not open; \n is a line break. None: as the run before has
    it, else \n. Our choice: the separator is not stated."""
    chat: Literal["turns", "template"] | None = field(
        default=None, metadata={INHERITS: True, EARLIER: "turns"}
    )
    """How messages are written: as turns "User: ...", or by the tokenizer's chat template. None: as
    the run before has it; a Hugging Face folder's by its template, where it has one."""
    plain_prompts: Literal["text", "message"] | None = field(
        default=None, metadata={INHERITS: True, EARLIER: "text"}
    )
    """A plain prompt is read as the text that it is, or as one message of the user's. None: as the
    run before has it, else text."""
    system: TypedText | None = field(default=None, metadata={INHERITS: True, EARLIER: ""})
    """Put before messages that begin without a system's. None: as the run before has it, else
    nothing."""
