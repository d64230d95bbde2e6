"""What a preparation says at its end: what is odd of what it made, and the next commands."""

import shlex
import textwrap
from collections.abc import Iterator, Mapping
from pathlib import Path
from typing import Any

from engine.prepare.log_fields import other_names
from engine.prepare.split import SPLITS
from engine.printable import TERMINAL_COLUMNS, command_lines
from engine.settings.prepare import LogFields, PrepareConfig

_MOST_ALIKE = 0.1  # share of a data set with one beginning that is not warned of; our choice
_FEW_ALIKE = 5  # records of one beginning, below which it may be chance; our choice
_MOST_HELD_OUT = 0.5  # share of a data set that is not warned of; our choice
_NUM_SHOWN = 8


def remarks(report: Mapping[str, Any], config: PrepareConfig) -> Iterator[str]:
    """Yield what is odd of a report, in sentences; those that want to be acted on are a WARNING."""
    yield from _of_fields(report["fields"], config.fields)
    yield from _of_split(report["split"], report["fields"])
    for name, numbers in report["sets"].items():
        yield from _of_set(name, numbers, config)
    for found in report["largest_duplicates"]:
        share = found["times"] / report["sets"][found["set"]]["read"]
        if share > _MOST_ALIKE and found["times"] >= _FEW_ALIKE:
            yield (
                f"WARNING: {share:.0%} of {found['set']} begin as {found['kept']}, which alone is "
                "kept: raise --prefix-characters where all prompts have one preamble"
            )
    if report["reserved_emails"]:
        yield (
            f"{report['reserved_emails']:,} addresses at domains that are reserved for examples "
            "(example.com, example.org, .test and the like) were left as they are: nobody's"
        )


def _of_fields(seen: Mapping[str, Any], names: LogFields) -> Iterator[str]:
    for shape, number in seen["read_as"].items():
        yield f"read as {shape}: {number:,} of {seen['lines']:,} lines (recipes/DATA.md)"
    listed = [f"{key} ({number:,})" for key, number in seen["not_read"].items()]
    if listed:
        more = f" and {len(listed) - _NUM_SHOWN} more" if len(listed) > _NUM_SHOWN else ""
        yield f"fields that were not read (lines): {', '.join(listed[:_NUM_SHOWN])}{more}"
    for ours, theirs in other_names(names).items():
        number = seen["lines"] - seen["with_field"].get(ours, 0)
        if number:
            yield f"--fields.{ours} {theirs}: {number:,} of {seen['lines']:,} lines have none"


def _of_split(split: Mapping[str, Any], seen: Mapping[str, Any]) -> Iterator[str]:
    with_user = seen["with_field"].get("user", 0)
    if not with_user:
        yield (
            "WARNING: no line says who sent it, so the split is by prompt and no cap holds: "
            "--fields.user names the field of users"
        )
    elif split["by"] == "prompt":
        yield "WARNING: all lines are of one user, so the split is by prompt"
    elif with_user < seen["lines"]:
        number = seen["lines"] - with_user
        yield f"lines without a user: {number:,}; each of their prompts is a user by itself"
    for moved in split["moved"]:
        yield (
            f"{moved['set']}: by the hashes of {moved['of']:,} {split['by']}(s) none was for "
            f"{moved['split']}, so one was moved there"
        )


def _of_set(name: str, numbers: Mapping[str, Any], config: PrepareConfig) -> Iterator[str]:
    kept, total = numbers["kept"], sum(numbers["kept"].values())
    wanted = {"train": 1.0, "valid": config.valid_fraction, "test": config.test_fraction}
    empty = [split for split in SPLITS if wanted[split] and not kept[split]]
    if not total:
        yield f"WARNING: nothing of {name} was kept: dropped.jsonl says why"
    elif empty == ["test"]:
        yield f"{name} has no test file: too few, or none was drawn for it"
    elif empty:
        yield (
            f"WARNING: {name} has nothing for {' and '.join(empty)}: too few were left, or "
            "what was there was dropped (dropped.jsonl)"
        )
    if total and 1 - kept["train"] / total > _MOST_HELD_OUT and kept["train"]:
        share = 1 - kept["train"] / total
        yield (
            f"WARNING: {share:.0%} of {name} are held out, since few have most of them: another "
            "--seed draws others"
        )


def next_commands(folder: Path) -> list[str]:
    """Return the commands that go on with the files of a folder, ready to paste."""

    def option(name: str, file: str) -> list[str]:
        path = folder / f"{file}.jsonl"
        return [f"{name} {shlex.quote(str(path))}"] if path.is_file() else []

    def stage(recipe: str, name: str, train: str, *first: str) -> list[str]:
        options = [*option(train, f"{name}.train"), *option("--data.valid", f"{name}.valid")]
        is_there = (folder / f"{name}.train.jsonl").is_file()
        return command_lines(f"python recipes/{recipe}.py", *first, *options) if is_there else []

    files = [f"{name}.train" for name in ("sft", "comparisons", "prompts")]
    paths = {file: found[0].strip() for file in files if (found := option("", file))}
    if not paths:
        return []
    lines = command_lines("python recipes/tokenizer.py --files", *paths.values())
    lines += stage("sft_tiny", "sft", "--data.train", "--tokenizer runs/tokenizer")
    if "sft.train" in paths:
        lines += stage("rm_tiny", "comparisons", "--data.train")
    if {"sft.train", "comparisons.train"} <= paths.keys():
        policy = ("--policy runs/sft_tiny", "--ptx-coef 0")
        lines += stage("ppo_tiny", "prompts", "--data.prompts", *policy)
    return [
        "next, from nothing (sft_hf.py, rm_hf.py and ppo_hf.py: of a pretrained model):",
        *lines,
    ]


def wrapped(text: str) -> str:
    """Return a sentence in lines of a terminal's width, no word of it broken."""
    return textwrap.fill(
        text,
        TERMINAL_COLUMNS,
        subsequent_indent="    ",
        break_long_words=False,
        break_on_hyphens=False,
    )
