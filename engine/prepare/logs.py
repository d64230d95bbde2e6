"""Raw logs as records: what a line of a log says, and for which data sets it is."""

import dataclasses
from collections.abc import Callable, Iterator
from dataclasses import dataclass
from typing import Any

from engine.containers.row import BadRecord
from engine.data.chat import Messages
from engine.data.records import RecordReader
from engine.prepare.labels import labels_of
from engine.prepare.log_fields import (
    ABOUT,
    FieldsSeen,
    are_named,
    in_their_words,
    name_in,
    other_names,
    time_in,
    user_in,
    values_of,
)
from engine.settings.prepare import LogFields, PrepareConfig

SETS = ("sft", "comparisons", "prompts")
"""The data sets, and the names of their files: demonstrations, rankings, prompts alone."""
_SKIP_OPTION = "--skip-bad-lines"
_LIMIT_KIND = 80  # characters of a use case's name; our choice


@dataclass(frozen=True, kw_only=True)
class LogRecord:
    """What one line of a log says."""

    prompt: str | Messages
    """A text, or a dialogue up to the response."""
    is_cut: bool
    """Whether the prompt is what two texts have in common."""
    user: str | None
    id: str | None
    time: float
    """Seconds; inf where the line has none."""
    kind: str | None
    response: str | None
    completions: list[str] | None
    ranks: list[int] | None
    left_out: tuple[tuple[str, str], ...]
    """(data set, why) of labels from which nothing is learned: ties, replies of weight 0."""

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
        prompt: str | Messages
        if isinstance(self.prompt, str):
            prompt = change(self.prompt)
        else:
            prompt = [{**message, "content": change(message["content"])} for message in self.prompt]
        return dataclasses.replace(
            self,
            prompt=prompt,
            response=None if self.response is None else change(self.response),
            completions=None if self.completions is None else list(map(change, self.completions)),
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
        elif name == "comparisons" and self.is_cut:  # so that a stage knows that it was
            assert isinstance(self.prompt, str) and self.completions is not None
            texts = [self.prompt + text for text in self.completions]
            found = dict(zip(("chosen", "rejected"), texts, strict=True))
        elif name == "comparisons":
            found |= {"completions": self.completions, "ranks": self.ranks}
        found["id"] = where if self.id is None else self.id
        return found | ({} if self.kind is None else {"kind": self.kind})


def read_logs(
    config: PrepareConfig,
    reading: Callable[[RecordReader[LogRecord]], object],
    on_bad: Callable[[str, str], object],
    seen: FieldsSeen | None = None,
) -> Iterator[tuple[str, LogRecord]]:
    """Yield (FILE:LINE, record) of all logs, in their order; raises UserError.

    reading is told of each file's reader before its first line, and on_bad of each bad line that is
    skipped: where it stands, and why. seen: counts the fields.
    """
    for path in config.logs:
        reader = RecordReader(
            path,
            lambda row: parse_log(row, config.fields, seen),
            skip_bad_lines=config.skip_bad_lines,
            skip_option=_SKIP_OPTION,
            on_bad=on_bad,
        )
        reading(reader)
        for record in reader:
            yield reader.where, record


def parse_log(row: dict[str, Any], names: LogFields, seen: FieldsSeen | None = None) -> LogRecord:
    """Return what a line says, and count its fields; BadRecord, which names the field, where that
    cannot be read."""
    values, others = values_of(row, names), other_names(names)
    ours = {name: value for name, value in values.items() if name not in ABOUT}
    taken = {*others, *others.values()}
    rest = {key: value for key, value in row.items() if key not in taken}
    try:
        labels, shape, read = labels_of(rest | ours, are_named=are_named(names))
    except BadRecord as error:
        raise in_their_words(error, row, names) from None
    about = {name: name_in(values.get(name), getattr(names, name)) for name in ("id", "kind")}
    record = LogRecord(
        **vars(labels),
        user=user_in(values.get("user"), names.user),
        id=about["id"],
        time=time_in(values.get("time"), names.time),
        kind=None if about["kind"] is None else about["kind"][:_LIMIT_KIND],
    )
    if seen is not None:
        if record.user is None:
            values.pop("user", None)
        seen.add(row, values, read, shape, names)
    return record
