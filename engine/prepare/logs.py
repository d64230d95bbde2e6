"""Raw logs as records: what a line of a log says, and for which data sets it is."""

import datetime
import math
from collections.abc import Callable, Iterator
from dataclasses import dataclass
from typing import Any

from engine.containers.row import BadRecord, check_text, json_type, required
from engine.data.chat import check_messages
from engine.data.records import RecordReader
from engine.settings.prepare import LogFields, PrepareConfig

SETS = ("sft", "comparisons", "prompts")
"""The data sets, and the names of their files: demonstrations, rankings, prompts alone."""
_SKIP_OPTION = "--skip-bad-lines"
_LIMIT_KIND = 80  # characters of a use case's name; our choice


@dataclass(frozen=True, kw_only=True)
class LogRecord:
    """What one line of a log says."""

    prompt: str | list[dict[str, str]]
    """A text, or a dialogue up to the response."""
    user: str | None
    id: str | None
    time: float
    """Seconds; inf where the line has none."""
    kind: str | None
    response: str | None
    completions: list[str] | None
    ranks: list[int] | None

    def sets(self) -> list[str]:
        """Return the data sets that it is for: those of its labels, or as a prompt alone."""
        labels = {"sft": self.response, "comparisons": self.completions}
        return [name for name, label in labels.items() if label is not None] or ["prompts"]

    def prompt_text(self) -> str:
        """Return all that the prompt says."""
        if isinstance(self.prompt, str):
            return self.prompt
        return "\n\n".join(message["content"] for message in self.prompt)

    def compared_text(self) -> str:
        """Return what is compared to find duplicates: without regard to case and whitespace, and
        without a system message, which an application puts before all its users' prompts."""
        if isinstance(self.prompt, str):
            text = self.prompt
        else:
            said = [m for m in self.prompt if m["role"] != "system"]
            text = " ".join(f"{m['role']}: {m['content']}" for m in said)
        return " ".join(text.split()).casefold()

    def changed(self, change: Callable[[str], str]) -> "LogRecord":
        """Return the record with each of its texts changed."""
        prompt: str | list[dict[str, str]]
        if isinstance(self.prompt, str):
            prompt = change(self.prompt)
        else:
            prompt = [{**message, "content": change(message["content"])} for message in self.prompt]
        return LogRecord(
            prompt=prompt,
            user=self.user,
            id=self.id,
            time=self.time,
            kind=self.kind,
            response=None if self.response is None else change(self.response),
            completions=None if self.completions is None else list(map(change, self.completions)),
            ranks=self.ranks,
        )

    def texts(self) -> list[str]:
        """Return every text that a model would read of it: prompt, response, completions."""
        return [self.prompt_text(), *filter(None, [self.response]), *(self.completions or [])]

    def row(self, name: str, where: str) -> dict[str, Any]:
        """Return the line of one data set, in the form that the stages read. The user is left
        out: no stage reads it, and it may name a person."""
        found: dict[str, Any] = {"prompt": self.prompt}
        if name == "sft":
            found["response"] = self.response
        elif name == "comparisons":
            found |= {"completions": self.completions, "ranks": self.ranks}
        found["id"] = where if self.id is None else self.id
        return found | ({} if self.kind is None else {"kind": self.kind})


def read_logs(
    config: PrepareConfig,
    reading: Callable[[RecordReader[LogRecord]], object],
    on_bad: Callable[[str, str], object],
) -> Iterator[tuple[str, LogRecord]]:
    """Yield (FILE:LINE, record) of all logs, in their order; raises UserError.

    reading is told of each file's reader before its first line, and on_bad of each bad line that is
    skipped: where it stands, and why.
    """
    for path in config.logs:
        reader = RecordReader(
            path,
            lambda row: parse_log(row, config.fields),
            skip_bad_lines=config.skip_bad_lines,
            skip_option=_SKIP_OPTION,
            on_bad=on_bad,
        )
        reading(reader)
        for record in reader:
            yield reader.where, record


def parse_log(row: dict[str, Any], fields: LogFields) -> LogRecord:
    """Return what a line says; BadRecord, which names the field, where that cannot be read."""
    prompt, response = _dialogue(row, fields)
    return LogRecord(
        prompt=prompt,
        user=_name(row, fields.user),
        id=_name(row, fields.id),
        time=_time(row.get(fields.time), fields.time),
        kind=None if (kind := _name(row, fields.kind)) is None else kind[:_LIMIT_KIND],
        response=response,
        **_ranking(row, fields),
    )


def _dialogue(
    row: dict[str, Any], fields: LogFields
) -> tuple[str | list[dict[str, str]], str | None]:
    """Return the prompt, and the response where there is one."""
    name = fields.messages if fields.messages in row and fields.prompt not in row else fields.prompt
    prompt = required(row, name)
    given = fields.response if row.get(fields.response) is not None else "demonstration"
    response = row.get(given)
    if response is not None:
        check_text(response, given)
    if isinstance(prompt, str):
        return check_text(prompt, name), response
    messages = check_messages(prompt, name)
    if messages[-1]["role"] == "assistant":
        if response is not None:
            raise BadRecord(f'ends with the assistant, and there is "{given}" too', field=name)
        messages, response = messages[:-1], messages[-1]["content"]
    if not messages or messages[-1]["role"] != "user":
        raise BadRecord("needs a user message right before the reply", field=name)
    return messages, response


def _ranking(row: dict[str, Any], fields: LogFields) -> dict[str, Any]:
    """Return the completions and their ranks, None and None where there are none."""
    if row.get("chosen") is not None or row.get("rejected") is not None:
        pair = [check_text(required(row, name), name) for name in ("chosen", "rejected")]
        return {"completions": pair, "ranks": [1, 2]}
    completions = row.get(fields.completions)
    if completions is None:
        if row.get(fields.ranks) is not None:
            raise BadRecord(f'is there without "{fields.completions}"', field=fields.ranks)
        return {"completions": None, "ranks": None}
    if not isinstance(completions, list) or len(completions) < 2:
        raise BadRecord("must be a list of two texts or more", field=fields.completions)
    for index, text in enumerate(completions):
        check_text(text, f"{fields.completions}[{index}]")
    ranks = required(row, fields.ranks)
    if not isinstance(ranks, list) or not all(type(rank) is int and rank >= 0 for rank in ranks):
        raise BadRecord("must be a list of whole numbers from 0 up", field=fields.ranks)
    if len(ranks) != len(completions):
        raise BadRecord(
            f"has {len(ranks)} for {len(completions)} {fields.completions}", field=fields.ranks
        )
    if len(set(ranks)) < 2:
        raise BadRecord("are all equal: nothing is learned from a tie", field=fields.ranks)
    if len(set(completions)) < 2:
        raise BadRecord("has the same text each time", field=fields.completions)
    order = sorted(set(ranks))
    return {"completions": completions, "ranks": [order.index(rank) + 1 for rank in ranks]}


def _name(row: dict[str, Any], field: str) -> str | None:
    value = row.get(field)
    if value is None:
        return None
    if isinstance(value, bool) or not isinstance(value, str | int):
        raise BadRecord(f"must be a text or a whole number, not {json_type(value)}", field=field)
    return check_text(str(value), field)


def _time(value: Any, field: str) -> float:
    """Return seconds; a time without its zone is taken for one of UTC."""
    if value is None:
        return math.inf
    if isinstance(value, int | float) and not isinstance(value, bool) and abs(value) < 1e300:
        return float(value)
    try:
        found = datetime.datetime.fromisoformat(value)
    except (TypeError, ValueError):
        raise BadRecord("must be a number, or a time as 2021-03-04T12:00:00", field=field) from None
    if found.tzinfo is None:
        found = found.replace(tzinfo=datetime.UTC)
    return found.timestamp()
