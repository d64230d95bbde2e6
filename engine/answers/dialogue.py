"""A dialogue with a checkpoint in the terminal."""

import contextlib
import io
import re
import sys
from collections.abc import Callable

import numpy as np
import torch.distributed as dist

from engine.answers.asked import asked_as, asks_texts
from engine.containers.row import BadRecord
from engine.data.chat import Asked
from engine.data.examples import encode_prompts
from engine.data.tokenizer import Tokenizer
from engine.errors import UserError
from engine.generation.generate import generate
from engine.printable import JOINERS, accept_any_text, printable, say
from engine.settings.generate import GenerateConfig
from engine.stop import interruptible
from engine.training.network import Network

_HELP = "/new starts over, /help says this, /quit or Ctrl-D ends the dialogue, Ctrl-C an answer."
_ENDINGS = ("exit", "quit", "/exit", "/quit")
_COMMAND = re.compile(r"/[A-Za-z]+")
"""What looks like a command: a path has another slash, and a sentence a space."""


def talk(network: Network, tokenizer: Tokenizer, config: GenerateConfig) -> None:
    """Answer what the user types, token by token, until the end of input; /new starts over."""
    parallel = network.parallel
    if parallel.num_replicas > 1:
        raise UserError(
            f"a dialogue takes one replica, and the layout leaves {parallel.num_replicas}: start "
            "fewer ranks, or raise --layout.tp"
        )
    dialogue = _Dialogue(network, tokenizer, config)
    if parallel.is_writer:
        _take_any_bytes()
        say(f"Type a message; {_HELP}")
        if dialogue.is_by_lines:
            say(
                "This model was trained on plain prompts alone: each line is one, as a file's is, "
                "and it sees none of those before."
            )
    if parallel.world_size > 1:  # a launcher of several ranks ends all of them at Ctrl-C
        dialogue.take_turns()
        return
    with interruptible(), contextlib.suppress(KeyboardInterrupt):  # that came between two answers
        dialogue.take_turns()


class _Dialogue:
    """What was said so far, and the model that answers it."""

    def __init__(self, network: Network, tokenizer: Tokenizer, config: GenerateConfig) -> None:
        self._network, self._tokenizer, self._config = network, tokenizer, config
        self._renderer = asked_as(config, tokenizer)
        self._is_writer = network.parallel.is_writer
        self._messages: list[dict[str, str]] = []
        form, in_texts = self._renderer.form, asks_texts(self._renderer.form, config)
        self._is_in_text = in_texts and bool(form.text_turns)
        self.is_by_lines = in_texts and not form.text_turns
        """Whether each line is a prompt of its own."""
        # Where a model that was not taught to stop goes on with the user's part.
        self._next_turn = form.next_turn if form.chat == "turns" and not in_texts else ""
        if self._is_in_text:
            self._next_turn = form.next_text_turn

    def take_turns(self) -> None:
        """Answer each line until one ends the dialogue."""
        num_turns = 0
        while (line := _read_line(self._is_writer)) is not None:
            said = line.strip()
            if said in _ENDINGS:
                return
            if said in ("", "/new", "/help"):
                self._messages = [] if said == "/new" else self._messages
                _show(f"{_HELP}\n" if said == "/help" else "", self._is_writer)
                continue
            if _COMMAND.fullmatch(said):
                _show(f"{printable(said)}: no such command; {_HELP}\n", self._is_writer)
                continue
            prompt = self._asked(line)
            if prompt is not None:
                self._answer(prompt, num_turns)
                num_turns += 1

    def _asked(self, line: str) -> np.ndarray | None:
        """Return the tokens of the dialogue with a line as the user's turn, the oldest forgotten
        where there is no room for an answer; None, which is said, where it cannot be asked."""
        before = [] if self.is_by_lines else self._messages
        self._messages = [*before, {"role": "user", "content": line}]
        context = self._network.size.context_length
        room = min(self._config.sampling.max_new_tokens, context // 2)  # to keep free
        problem = ""
        try:
            prompt = self._tokens()
            while len(self._messages) > 1 and len(prompt) + room > context:
                self._messages = self._messages[2:]
                prompt = self._tokens()
            if len(prompt) < context:
                return prompt
            problem = f"is {len(prompt)} tokens, too long for the model"
        except BadRecord as error:
            problem = f"cannot be asked: {error}"
        self._messages.pop()
        _show(f"That {printable(problem)}.\n", self._is_writer)
        return None

    def _tokens(self) -> np.ndarray:
        asked = Asked(messages=self._messages)
        if self.is_by_lines:
            asked = Asked(self._messages[-1]["content"])
        elif self._is_in_text:
            asked = Asked(self._renderer.form.in_text(self._messages), is_cut=True)
        return next(encode_prompts([self._renderer.prompt(asked)], self._tokenizer))

    def _answer(self, prompt: np.ndarray, number: int) -> None:
        """Show the answer to a prompt as it comes; number: of the draw."""
        is_alone = self._network.parallel.world_size == 1
        endings = (_TurnEnded, KeyboardInterrupt) if is_alone else (_TurnEnded,)
        screen = _Screen(
            self._tokenizer, lambda text: _show(text, self._is_writer), self._next_turn
        )
        with contextlib.suppress(*endings):
            list(
                generate(
                    self._network,
                    [prompt],
                    self._config.sampling,
                    eos_id=self._tokenizer.eos_id,
                    tokenizer=self._tokenizer,
                    seed=self._config.seed,
                    sample_indices=[number],
                    on_tokens=screen.add,
                )
            )
        screen.finish()
        self._messages.append({"role": "assistant", "content": screen.text.strip()})


def _read_line(is_writer: bool) -> str | None:
    """Return what the user typed, on every rank; None at the end of input."""
    line: list[str | None] = [None]
    if is_writer:
        try:
            line = [input("> ")]
        except (EOFError, KeyboardInterrupt):
            say("")
    dist.broadcast_object_list(line, src=0)
    return line[0]


def _take_any_bytes() -> None:
    """Have what is typed in another encoding read with U+FFFD in place of what it does not know."""
    if isinstance(sys.stdin, io.TextIOWrapper):
        sys.stdin.reconfigure(errors="replace")


def _show(text: str, is_writer: bool) -> None:
    """Write text that is printable already; in parts, a character may be apart from its joiner."""
    if is_writer:
        accept_any_text(sys.stdout)
        sys.stdout.write(text)
        sys.stdout.flush()


class _TurnEnded(Exception):
    """The model has begun to speak for the user."""


class _Screen:
    """Shows an answer as its tokens come, up to where the user's next turn would begin."""

    def __init__(
        self, tokenizer: Tokenizer, show: Callable[[str], None], next_turn: str = ""
    ) -> None:
        self.text = ""
        self._next_turn = next_turn
        self._tokenizer = tokenizer
        self._show = show
        self._tokens: list[int] = []
        self._num_shown = 0

    def add(self, sample_index: int, tokens: list[int]) -> None:
        """Take in tokens, and show what they settle; raises _TurnEnded at the user's next turn."""
        self._tokens += tokens
        text = self._tokenizer.decode(self._tokens)
        self.text, turn = text, self._next_turn
        if turn and turn in text:
            self.text = text[: text.index(turn)]
            raise _TurnEnded
        # What may still change is held back: part of a character, a joiner, part of the mark.
        settled = text.rstrip("\ufffd" + JOINERS)
        held = next((n for n in range(len(turn), 0, -1) if settled.endswith(turn[:n])), 0)
        self._show_up_to(len(settled) - held)

    def finish(self) -> None:
        """Show the rest."""
        self._show_up_to(len(self.text))
        self._show("\n")

    def _show_up_to(self, end: int) -> None:
        shown = printable(self.text[:end])
        if len(shown) > self._num_shown:
            self._show(shown[self._num_shown :])
            self._num_shown = len(shown)
