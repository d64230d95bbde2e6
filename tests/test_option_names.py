"""Options that messages name are options of the command that says them."""

import ast
import contextlib
import functools
import io
import re
from collections.abc import Iterator
from pathlib import Path

import pytest

from engine import plan_command, recipe
from engine.quickstart.settings import QuickstartConfig
from engine.settings.command_line import parse_config
from engine.settings.convert import ConvertConfig
from engine.settings.generate import GenerateConfig
from engine.settings.ppo import PPOConfig
from engine.settings.preflight import PreflightConfig
from engine.settings.prepare import PrepareConfig
from engine.settings.replay import ReplayConfig
from engine.settings.rm import RMConfig
from engine.settings.sft import SFTConfig
from engine.settings.tokenizer import TokenizerConfig
from tests.sources import ROOT

COMMANDS = {
    "sft": lambda: recipe._stage_job(SFTConfig()),
    "rm": lambda: recipe._stage_job(RMConfig()),
    "ppo": lambda: recipe._stage_job(PPOConfig()),
    "generate": GenerateConfig,
    "convert": lambda: ConvertConfig(direction="import"),
    "replay": ReplayConfig,
    "preflight": PreflightConfig,
    "quickstart": QuickstartConfig,
    "plan": plan_command.PlanOptions,
    "prepare": PrepareConfig,
    "tokenizer": TokenizerConfig,
}
STAGES = ("sft", "rm", "ppo")
# Whose messages a file's or a room's are; of any other file some stage must have the option.
SAID_BY = {
    "engine/sft.py": ("sft",),
    "engine/selection.py": ("sft",),
    "engine/rm.py": ("rm",),
    "engine/ppo.py": ("ppo",),
    "engine/rollout.py": ("ppo",),
    "engine/answers/": ("generate",),
    "engine/huggingface/": ("convert", *STAGES),  # of an import a stage starts
    "engine/replay/": ("replay",),
    "engine/evidence/": ("replay",),
    "engine/preflight/": ("preflight",),
    "engine/quickstart/": ("quickstart", "generate"),
    "engine/planning/": ("plan", *STAGES),
    "engine/prepare/tokenizer_training.py": ("tokenizer", "sft"),
    "engine/prepare/ending.py": ("prepare", "tokenizer", "sft", "ppo"),
    "engine/prepare/": ("prepare", "sft"),
    "engine/settings/prepare.py": ("prepare",),
    "engine/guide/": ("ppo", "sft", "rm", "generate"),
    "engine/claim.py": ("tokenizer", "prepare"),
}
OPTION = re.compile(r"(?<![\w-])--[a-z][a-z0-9]*(?:[.-][a-z0-9]+)*")
# git's, torchrun's, hf's, everybody's, and the beginning of several
NOT_OURS = {"--short", "--max-restarts", "--repo-type", "--help", "--layout", "--fields"}


@functools.cache
def options_of(command: str) -> frozenset[str]:
    """Return the options in a command's help."""
    with contextlib.redirect_stdout(io.StringIO()) as said, pytest.raises(SystemExit):
        parse_config(COMMANDS[command](), ["--help"])
    return frozenset(OPTION.findall(said.getvalue()))


def said_options(path: Path) -> Iterator[tuple[int, str]]:
    """Yield (line, option) of a file's texts that are no docstrings, nor a page's style."""
    tree = ast.parse(path.read_text())
    docstrings = {id(node.value) for node in ast.walk(tree) if isinstance(node, ast.Expr)}
    for node in ast.walk(tree):
        text = node.value if isinstance(node, ast.Constant) and id(node) not in docstrings else None
        if isinstance(text, str) and "</style>" not in text:
            yield from ((node.lineno, option) for option in OPTION.findall(text))


def test_messages_name_options_that_the_command_has():
    wrong, num_seen = [], 0
    for path in sorted((ROOT / "engine").rglob("*.py")):
        name = str(path.relative_to(ROOT))
        rooms = [commands for begin, commands in SAID_BY.items() if name.startswith(begin)]
        commands = rooms[0] if rooms else STAGES
        for line, option in said_options(path):
            num_seen += 1
            if option not in NOT_OURS and not any(option in options_of(c) for c in commands):
                wrong.append(f"{name}:{line}: {option} is no option of {', '.join(commands)}")
    assert not wrong
    assert num_seen > 40


@pytest.mark.parametrize("command", ["generate", "convert", "replay", "quickstart", *STAGES])
def test_who_waits_for_ranks_has_the_option_that_says_how_long(command: str):
    assert "--waiting.join-seconds" in options_of(command)  # engine/ranks/meeting.py names it
