"""A dialogue with a checkpoint in the terminal."""

import contextlib
import io
import sys
from collections.abc import Callable

import torch.distributed as dist

from engine.answers.asked import chosen_template, tokens_of_dialogue
from engine.data.tokenizer import Tokenizer
from engine.errors import UserError
from engine.generation.generate import generate
from engine.printable import JOINERS, accept_any_text, printable, say
from engine.settings.generate import GenerateConfig
from engine.stop import interruptible
from engine.training.network import Network

NEXT_TURN = "\n\nUser:"
"""Where a model that was not taught to stop goes on with the user's part."""


def talk(network: Network, tokenizer: Tokenizer, config: GenerateConfig) -> None:
    """Answer what the user types, token by token, until the end of input; /new starts over."""
    parallel = network.parallel
    if parallel.num_replicas > 1:
        raise UserError(
            f"a dialogue takes one replica, and the layout leaves {parallel.num_replicas}: start "
            "fewer ranks, or raise layout.tp"
        )
    if parallel.is_writer:
        _take_any_bytes()
        say("Type a message; /new starts over, Ctrl-C ends an answer, Ctrl-D the dialogue.")
    if parallel.world_size > 1:  # a launcher of several ranks ends all of them at Ctrl-C
        _take_turns(network, tokenizer, config)
        return
    with interruptible(), contextlib.suppress(KeyboardInterrupt):  # that came between two answers
        _take_turns(network, tokenizer, config)


def _take_turns(network: Network, tokenizer: Tokenizer, config: GenerateConfig) -> None:
    parallel = network.parallel
    endings = (_TurnEnded, KeyboardInterrupt) if parallel.world_size == 1 else (_TurnEnded,)
    template = chosen_template(config, tokenizer)
    next_turn = NEXT_TURN if template is None else ""
    messages: list[dict[str, str]] = []
    num_turns = 0
    while (line := _read_line(parallel.is_writer)) is not None:
        if line.strip() in ("", "/new"):
            messages = [] if line.strip() else messages
            continue
        messages.append({"role": "user", "content": line})
        prompt = tokens_of_dialogue(messages, tokenizer, template, config.prompt_suffix)
        while (
            len(messages) > 1 and len(prompt) + _room(network, config) > network.size.context_length
        ):
            messages = messages[2:]  # forgets the oldest turn and its answer
            prompt = tokens_of_dialogue(messages, tokenizer, template, config.prompt_suffix)
        if len(prompt) >= network.size.context_length:
            messages.pop()
            _show(f"That is {len(prompt)} tokens, too long for the model.\n", parallel.is_writer)
            continue
        screen = _Screen(tokenizer, lambda text: _show(text, parallel.is_writer), next_turn)
        with contextlib.suppress(*endings):
            list(
                generate(
                    network,
                    [prompt],
                    config.sampling,
                    eos_id=tokenizer.eos_id,
                    tokenizer=tokenizer,
                    seed=config.seed,
                    sample_indices=[num_turns],
                    on_tokens=screen.add,
                )
            )
        screen.finish()
        messages.append({"role": "assistant", "content": screen.text.strip()})
        num_turns += 1


def _room(network: Network, config: GenerateConfig) -> int:
    """Return the tokens to keep free for an answer: at most half of the context."""
    return min(config.sampling.max_new_tokens, network.size.context_length // 2)


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
        self, tokenizer: Tokenizer, show: Callable[[str], None], next_turn: str = NEXT_TURN
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
