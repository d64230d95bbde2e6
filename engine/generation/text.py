"""Text in, text out: a file of prompts answered by a checkpoint, or a dialogue in the terminal."""

import contextlib
import sys
from collections.abc import Callable
from dataclasses import dataclass, field
from pathlib import Path
from typing import Literal

import torch.distributed as dist

from engine.checkpoint import load_weights
from engine.config import UserError
from engine.convert import load_huggingface, read_size
from engine.data.batches import deal
from engine.data.chat import render_prompt
from engine.data.examples import encode_prompts
from engine.data.prompts import prompt_examples, read_prompts
from engine.data.tokenizer import Tokenizer
from engine.found_network import find_network, size_of
from engine.generation.answers import Answers, Origin, digest_of_prompts
from engine.generation.generate import generate
from engine.network import Network, build_network
from engine.parallel import said_by_first_rank, start_parallel
from engine.run import load_shared_tokenizer, require_path
from engine.settings.layout import ParallelLayout
from engine.settings.numerics import Numerics
from engine.settings.sampling import SamplingConfig

NEXT_TURN = "\n\nUser:"
"""Where a model that was not taught to stop goes on with the user's part."""


@dataclass(frozen=True, kw_only=True)
class GenerateConfig:
    """A batch of prompts, or without `prompts` a dialogue in the terminal."""

    source: Path | None = None
    """A run, one of its checkpoints, a network in one, or a Hugging Face GPT-2 folder."""
    role: str = "policy"
    """Which network of a checkpoint: policy, reference or ema."""
    tokenizer: Path | None = None
    """Tokenizer file or folder; none: the one that lies with the source."""
    prompts: Path | None = None
    """Prompts to answer, .jsonl or .jsonl.gz with {"prompt"} or {"messages"}."""
    out: Path = Path("responses.jsonl")
    """Their answers: {"prompt", "response", "sample", "tokens", "logprob", "has_eos"} a line, in
    the prompts' order. Until all are there they are kept in OUT.partial, where the same command
    goes on."""
    num_samples: int = 1
    """Answers to each prompt."""
    prompt_suffix: str = "\n"
    """Closes every prompt of the file, as in training; a dialogue closes its own."""
    skip_bad_lines: bool = False
    """Count and report bad lines instead of stopping at the first."""
    sampling: SamplingConfig = field(default_factory=lambda: SamplingConfig(max_new_tokens=256))
    """How answers are drawn."""
    dtype: Literal["fp32", "fp16", "bf16"] = "fp32"
    """Of weights and computation."""
    seed: int = 1
    """Seeds the draws."""
    layout: ParallelLayout = field(default_factory=ParallelLayout)
    """Ranks that share the model; those left over share the prompts."""


def generate_text(config: GenerateConfig) -> None:
    """Answer the prompts of a file, or the user's in the terminal. Raises UserError."""
    if config.num_samples < 1:
        raise UserError(f"num_samples must be at least 1, got {config.num_samples}")
    config.sampling.check()
    network, tokenizer = load_model(config)
    try:
        if config.prompts is None:
            talk(network, tokenizer, config)
        else:
            answer_file(network, tokenizer, config, config.prompts)
    except FloatingPointError as error:
        raise UserError(f"{config.source}: {error}") from None


def load_model(config: GenerateConfig) -> tuple[Network, Tokenizer]:
    """Return the language model at the source, on the ranks of the layout, and its tokenizer."""
    parallel = start_parallel(config.layout, config.seed)
    weights, is_huggingface = _weights(config)
    if is_huggingface:
        size, beside = read_size(weights), weights
    else:
        size = size_of(weights, config.role)
        # RUN/checkpoints/step/role: the tokenizer lies in RUN.
        beside = weights.resolve().parents[2] / "tokenizer"
    tokenizer = load_shared_tokenizer(lambda: config.tokenizer or beside)
    network = build_network("language", size, parallel, numerics=Numerics(dtype=config.dtype))
    if is_huggingface:
        load_huggingface(network, weights)
    else:
        fingerprint = tokenizer.fingerprint()
        load_weights(network, weights, role=config.role, tokenizer_fingerprint=fingerprint)
    return network, tokenizer


def _weights(config: GenerateConfig) -> tuple[Path, bool]:
    """Return the folder of the network at the source, and whether it is Hugging Face's."""
    source = require_path(config.source, "source")

    def look() -> str:
        is_theirs = (source / "config.json").exists() and not (source / "checkpoints").exists()
        return "theirs" if is_theirs else ""

    if said_by_first_rank(look):
        return source, True
    return find_network(source, config.role), False


def answer_file(
    network: Network, tokenizer: Tokenizer, config: GenerateConfig, prompts: Path
) -> None:
    """Write num_samples answers to each prompt of the file, in its order. Raises UserError.

    What an earlier run of the same settings has answered is kept.
    """
    parallel = network.parallel
    texts, read_report = read_prompts(prompts, skip_bad_lines=config.skip_bad_lines)
    examples, length_report = prompt_examples(
        texts,
        tokenizer,
        max_prompt_length=network.size.context_length - 1,
        prompt_suffix=config.prompt_suffix,
    )
    origin = Origin(
        weights=str(_weights(config)[0].resolve()),
        prompts=digest_of_prompts([e.tokens for e in examples], tokenizer.fingerprint()),
        num_samples=config.num_samples,
        sampling=config.sampling,
        dtype=config.dtype,
        seed=config.seed,
    )
    answers = Answers(config.out, origin, parallel)
    num_answers = len(examples) * config.num_samples
    if parallel.is_writer and answers.kept:
        print(f"{config.out}: {len(answers.kept)} of {num_answers} answers are there already")
    missing = [number for number in range(num_answers) if number not in answers.kept]
    # The samples of a prompt stay on one replica, which computes it once.
    open_prompts = sorted({number // config.num_samples for number in missing})
    lengths = [len(examples[index].tokens) for index in open_prompts]
    dealt = deal(lengths, parallel.num_replicas, parallel.replica_rank)
    mine = {open_prompts[place] for place in dealt}
    numbers = [number for number in missing if number // config.num_samples in mine]
    for response in generate(
        network,
        [examples[number // config.num_samples].tokens for number in numbers],
        config.sampling,
        eos_id=tokenizer.eos_id,
        seed=config.seed,
        sample_indices=numbers,
    ):
        index, sample = divmod(response.sample_index, config.num_samples)
        answer = {
            "prompt": texts[length_report.kept[index]],
            "response": tokenizer.decode(response.tokens.tolist()),
            "sample": sample,
            "tokens": len(response.tokens),
            "logprob": float(response.logprobs.sum()),
            "has_eos": response.has_eos,
        }
        answers.add(response.sample_index, answer)
    answers.finish(num_answers)
    if parallel.is_writer:
        print(f"{config.out}: {num_answers} answers; {read_report}; prompts: {length_report}")


def talk(network: Network, tokenizer: Tokenizer, config: GenerateConfig) -> None:
    """Answer what the user types, token by token, until the end of input; /new starts over."""
    parallel = network.parallel
    if parallel.num_replicas > 1:
        raise UserError(
            f"a dialogue takes one replica, and the layout leaves {parallel.num_replicas}: start "
            "fewer ranks, or raise layout.tp"
        )
    if parallel.is_writer:
        print("Type a message; /new starts over, Ctrl-C ends an answer, Ctrl-D the dialogue.")
    # A launcher of several ranks ends all of them at Ctrl-C.
    endings = (_TurnEnded,) if parallel.world_size > 1 else (_TurnEnded, KeyboardInterrupt)
    messages: list[dict[str, str]] = []
    num_turns = 0
    while (line := _read_line(parallel.is_writer)) is not None:
        if line.strip() in ("", "/new"):
            messages = [] if line.strip() else messages
            continue
        messages.append({"role": "user", "content": line})
        prompt = next(encode_prompts([render_prompt(messages, "messages")], tokenizer))
        while (
            len(messages) > 1 and len(prompt) + _room(network, config) > network.size.context_length
        ):
            messages = messages[2:]  # forgets the oldest turn and its answer
            prompt = next(encode_prompts([render_prompt(messages, "messages")], tokenizer))
        if len(prompt) >= network.size.context_length:
            messages.pop()
            _show(f"That is {len(prompt)} tokens, too long for the model.\n", parallel.is_writer)
            continue
        screen = _Screen(tokenizer, lambda text: _show(text, parallel.is_writer))
        with contextlib.suppress(*endings):
            list(
                generate(
                    network,
                    [prompt],
                    config.sampling,
                    eos_id=tokenizer.eos_id,
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
            print()
    dist.broadcast_object_list(line, src=0)
    return line[0]


def _show(text: str, is_writer: bool) -> None:
    if is_writer:
        sys.stdout.write(text)
        sys.stdout.flush()


class _TurnEnded(Exception):
    """The model has begun to speak for the user."""


class _Screen:
    """Shows an answer as its tokens come, up to where the user's next turn would begin."""

    def __init__(self, tokenizer: Tokenizer, show: Callable[[str], None]) -> None:
        self.text = ""
        self._tokenizer = tokenizer
        self._show = show
        self._tokens: list[int] = []
        self._num_shown = 0

    def add(self, sample_index: int, tokens: list[int]) -> None:
        """Take in tokens, and show what they settle; raises _TurnEnded at the user's next turn."""
        self._tokens += tokens
        text = self._tokenizer.decode(self._tokens)
        self.text, mark, _ = text.partition(NEXT_TURN)
        if mark:
            raise _TurnEnded
        # What may still change is held back: part of a character, or of the mark.
        settled = text.rstrip("\ufffd")
        held = next((n for n in range(len(NEXT_TURN), 0, -1) if settled.endswith(NEXT_TURN[:n])), 0)
        self._show_up_to(len(settled) - held)

    def finish(self) -> None:
        """Show the rest."""
        self._show_up_to(len(self.text))
        self._show("\n")

    def _show_up_to(self, end: int) -> None:
        if end > self._num_shown:
            self._show(self.text[self._num_shown : end])
            self._num_shown = end
