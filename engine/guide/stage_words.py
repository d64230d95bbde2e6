"""What a stage's recipe says behind its last step: where things are, and what comes next.

Imports neither torch nor megatron: it is said before they are there.
"""

import shlex
import sys
from collections.abc import Sequence
from pathlib import Path

from engine.errors import UserError, named
from engine.files import MAX_SHOWN_PATH, open_file
from engine.planning.sizes import StageConfig
from engine.printable import command_lines
from engine.settings.ppo import PPOConfig
from engine.settings.rm import RMConfig

_NAME_BYTES = 100  # of what `latest` says
_OWN_SIZES = ("tiny", "hf")  # recipes whose PPO starts from SFT; the paper's have an init policy


def newest_step(directory: Path) -> int | None:
    """Return the step of a run's newest checkpoint by its name, None where it has none."""
    path = directory / "checkpoints" / "latest"
    try:
        with open_file(path) as stream:
            step = stream.read(_NAME_BYTES).decode(errors="replace").strip().rpartition("_")[2]
    except UserError:
        return None
    return int(step) if step.isascii() and step.isdigit() else None


def ending(
    config: StageConfig, first_step: int | None, recipe: Path, *, is_alone: bool
) -> list[str]:
    """Return where a finished run has what it made, and the next command, ready to paste.

    first_step: where this start found it. recipe: the file that was started. is_alone: it is one
    process, which python starts; of others we do not know how they are started.
    """
    folder, last = _shown(config.directory), newest_step(config.directory)
    longer = "--iterations" if isinstance(config, PPOConfig) else "--epochs"
    if first_step == last:
        lines = [f"{folder}: finished before, at step {last}; a higher {longer} goes on"]
    else:
        lines = [f"{folder}: finished at step {last}: checkpoints/, curves.png, metrics.jsonl"]
    following = next_command(config, recipe)
    if following:
        words = ["python", *following] if is_alone else following
        begin = "next:" if is_alone else "next, started likewise:"
        lines += command_lines(begin, *_options([shlex.quote(word) for word in words]))
    return lines


def next_command(config: StageConfig, recipe: Path) -> list[str]:
    """Return the words of the recipe that follows a stage's, none behind a recipe of the user's own
    that has no such neighbour."""
    size = recipe.stem.partition("_")[2]
    directory = str(config.directory)

    def of(stage: str, *words: str) -> list[str]:
        path = recipe.with_name(f"{stage}_{size}.py")
        return [str(path), *words] if path.is_file() else []

    if isinstance(config, PPOConfig):
        path = recipe.with_name("generate.py")
        words = [str(path), "--source", directory, "--prompts", str(config.data.prompts)]
        return [*words, "--out", "answers.jsonl"] if path.is_file() else []
    if isinstance(config, RMConfig):
        policy = [] if config.init_from is None else ["--policy", str(config.init_from)]
        text = [] if size == "hf" else ["--data.pretraining", "pretraining.jsonl"]
        return of(
            "ppo", *policy, "--reward-model", directory, "--data.prompts", "prompts.jsonl", *text
        )
    if config.data.train is None:
        return of("sft", "--init-from", directory, "--data.train", "demonstrations.jsonl")
    if recipe.stem.startswith("sft_") and size not in _OWN_SIZES:  # PPO is compared with it
        return of(
            "ppo", "--data.prompts", "prompts.jsonl", "--data.pretraining", "pretraining.jsonl"
        )
    return of("rm", "--init-from", directory, "--data.train", "comparisons.jsonl")


def recipe_of_process() -> Path:
    """Return the file that this process was started with."""
    return Path(sys.argv[0])


def _options(words: Sequence[str]) -> list[str]:
    """Return words with each option's value behind it, so that no line parts them."""
    found: list[str] = []
    for word in words:
        if found and found[-1].startswith("--") and " " not in found[-1]:
            found[-1] += f" {word}"
        else:
            found.append(word)
    return found


def _shown(path: Path) -> str:
    return named(path, MAX_SHOWN_PATH)
