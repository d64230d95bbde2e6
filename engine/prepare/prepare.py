"""From raw logs to the data sets of the three stages, as in section 3.2 and appendix A.

    OUT/{sft,comparisons,prompts}.{train,valid,test}.jsonl    what has records, in the stages' form
    OUT/dropped.jsonl                                         what was dropped, from where, and why
    OUT/report.json  OUT/report.md  OUT/config.json           how many, how long, in which languages

The logs are read twice: for what a choice needs to know of each record (engine/prepare/entries.py),
and to be written. So memory holds some hundred bytes a record and none of its text. The folder
appears when all of it is there, or not at all.
"""

import itertools
import os
from collections.abc import Callable, Mapping
from pathlib import Path
from typing import Any

from engine.checkpoints.manifest import digest_of_file
from engine.claim import holding_claims, making
from engine.data.records import RecordReader
from engine.data.tokenizer import load_tokenizer
from engine.environment import world_size_of_environment
from engine.errors import UserError
from engine.files import read_object, replacing, write_object
from engine.prepare.choice import Verdict, first_verdicts, original_of, verdicts_of
from engine.prepare.ending import next_commands, remarks, wrapped
from engine.prepare.entries import EntryList
from engine.prepare.languages import open_languages
from engine.prepare.lengths import measures_of
from engine.prepare.log_fields import FieldsSeen
from engine.prepare.logs import LogRecord, read_logs
from engine.prepare.outputs import Decided, Outputs, largest_duplicates
from engine.prepare.personal import PersonalData
from engine.prepare.split import filled, side_of
from engine.prepare.summary import Summary, for_screen, in_markdown, tables
from engine.printable import open_console, say
from engine.progress import LongWork
from engine.settings.prepare import PrepareConfig
from engine.settings.saved import changed_fields, save_config

_MAX_LOGS = 1 << 16
_NUM_LARGEST = 10  # groups of duplicates that the report names; our choice
_NUM_TABLES = 3  # of the report on screen; our choice
_RECORDS_A_WORD = 1000  # between two looks at how far the reading is


@holding_claims()
def prepare(config: PrepareConfig) -> Path:
    """Make the folder of data sets and return it. Raises UserError for logs that cannot be read,
    and for a folder that is there and was made otherwise."""
    if world_size_of_environment() > 1:
        raise UserError("one process prepares data: start it with python, without torchrun or srun")
    if not config.logs or config.out is None:
        raise UserError("--logs FILE [FILE ...] and --out FOLDER are required")
    if len(config.logs) > _MAX_LOGS:
        raise UserError(f"--logs: {len(config.logs)} files; {_MAX_LOGS} are the most")
    # Before anything is read: what is not installed, a tokenizer that is none.
    searching = config.personal != "keep"
    personal = PersonalData(config.personal_kinds, config.phone_regions) if searching else None
    language = open_languages() if config.languages else lambda text: ""
    summary = Summary(measures_of(_encode(config.tokenizer) if config.tokenizer else None))
    with LongWork("prepare: digests of the logs", is_writer=True):
        logs = [
            {"file": str(path), "xxh3_128": digest_of_file(path).xxh3_128} for path in config.logs
        ]
    if os.path.lexists(config.out):
        _check_same(config, config.out, logs)
        say(f"{config.out}: finished already, of these logs and settings")
        _say_next(config.out)
        return config.out
    seen = FieldsSeen()
    with making(config.out) as folder:
        chosen, first_digests = _choose(config, seen)
        outputs = Outputs(config, chosen, summary, personal, language)
        with outputs.within(folder):
            digests = _read(config, "prepare: write", outputs.record, outputs.bad_line)
        if digests != first_digests:
            raise UserError("a log was changed while it was read; start again")
        alike = largest_duplicates(chosen, _NUM_LARGEST)
        report = {"logs": logs, "fields": seen.as_object(), "split": chosen.split_as_object()}
        report |= {**summary.as_object(), "largest_duplicates": alike}
        write_object(folder / "report.json", report)
        with replacing(folder / "report.md") as stream:
            stream.write(in_markdown(report, remarks(report, config)).encode())
        save_config(config, folder / "config.json")
    _show(report, config, config.out)
    return config.out


def _encode(path: Path) -> Callable[[str], list[int]]:
    """Return a tokenizer's way from a text to its tokens; the path may be a run's."""
    own = path / "tokenizer"
    return load_tokenizer(own if own.exists() else path).encode


def _choose(config: PrepareConfig, seen: FieldsSeen) -> tuple[Decided, list[str]]:
    """Read the logs, counting their fields, and choose; return the logs' digests too."""
    found = EntryList(prefix_characters=config.prefix_characters, seed=config.seed)
    digests = _read(config, "prepare: read", found.add, lambda *bad: None, seen)
    seen.check(config.fields)
    entries = found.entries()
    original = original_of(entries)
    first = first_verdicts(entries, original, max_prompts_per_user=config.max_prompts_per_user)
    side, moved = filled(
        entries,
        first == Verdict.KEPT,
        side_of(
            entries.divided,
            valid_fraction=config.valid_fraction,
            test_fraction=config.test_fraction,
        ),
        has_valid=config.valid_fraction > 0,
    )
    verdict = verdicts_of(entries, first, side)
    chosen = Decided(entries=entries, original=original, side=side, verdict=verdict, moved=moved)
    return chosen, digests


def _read(
    config: PrepareConfig,
    title: str,
    on_record: Callable[[str, LogRecord], object],
    on_bad: Callable[[str, str], object],
    seen: FieldsSeen | None = None,
) -> list[str]:
    """Read all logs once, saying how far it is; return their digests as they were read."""
    readers: list[RecordReader[LogRecord]] = []
    with LongWork(title, is_writer=True) as work:
        for number, found in enumerate(read_logs(config, readers.append, on_bad, seen)):
            if number % _RECORDS_A_WORD == 0:
                work.tell(f"{readers[-1].source.name} {readers[-1].share_read:.0%}")
            on_record(*found)
    return [reader.report().xxh3_128 for reader in readers]


def _check_same(config: PrepareConfig, folder: Path, logs: list[dict[str, str]]) -> None:
    """Raise UserError where a folder that is there was not made of these logs by these settings."""
    advice = "name another --out, or remove it"
    if not (folder / "report.json").exists() or not (folder / "config.json").exists():
        raise UserError(f"--out {folder} exists already, and is no preparation; {advice}")
    made_of = read_object(folder / "report.json").get("logs")
    if not isinstance(made_of, list) or _digests(made_of) != _digests(logs):
        raise UserError(f"--out {folder} was made of other logs; {advice}")
    changed = changed_fields(config, folder / "config.json")
    for name, (before, now) in changed.items():
        if name not in ("logs", "out"):
            raise UserError(f"--out {folder} was made with {name} {before}, not {now}; {advice}")


def _digests(logs: list[Any]) -> list[Any]:
    return [log.get("xxh3_128") if isinstance(log, dict) else None for log in logs]


def _show(report: Mapping[str, Any], config: PrepareConfig, folder: Path) -> None:
    """Say what came of it: the first of the report's tables, what is odd, what comes next."""
    for table in itertools.islice(tables(report), _NUM_TABLES):
        open_console().print(for_screen(table))
    for remark in remarks(report, config):
        say(wrapped(remark))
    say(f"{folder}: what was dropped and why is in report.md and dropped.jsonl")
    _say_next(folder)


def _say_next(folder: Path) -> None:
    for line in next_commands(folder):
        say(line)
