"""A tokenizer of one's own text, of either kind: what recipes/tokenizer.py and the quickstart make.

OUT/tokenizer.model or tokenizer.json    what every stage's --tokenizer takes
OUT/trained_on.json                      of which files, and how well it does
"""

import re
import shlex
from collections.abc import Callable, Iterable, Iterator, Sequence
from pathlib import Path
from typing import Any

import tokenizers
from tokenizers import decoders, models, pre_tokenizers, trainers

from engine.claim import holding_claims, making
from engine.containers.json_lines import not_utf8
from engine.containers.kinds import ENDINGS, ending_of
from engine.containers.lines import read_lines
from engine.containers.row import BadRecord, check_text, json_type
from engine.containers.sources import one_source
from engine.data.end_of_text import END_OF_TEXT
from engine.data.records import RecordReader
from engine.data.tokenizer import Tokenizer, load_tokenizer, train_sentencepiece
from engine.errors import UserError, named
from engine.files import MAX_SHOWN_PATH, write_object, writing
from engine.prepare.labels import labels_of
from engine.printable import say
from engine.progress import LongWork
from engine.settings.tokenizer import TokenizerConfig
from engine.shapes.canonical import Purpose
from engine.shapes.fields import choice_of, value_at
from engine.shapes.held_lists import with_lists
from engine.shapes.shapes import PLAIN, SHAPES, DataShape, recognised

_TEXTS = ("prompt", "response", "completions", "chosen", "rejected", "messages", "text")
_PAIR = {"chosen", "rejected"}
_SMALLEST, _LARGEST = 512, 32_000  # of a vocabulary that is chosen by the text; our choice
_BYTES_AN_ENTRY = 1000  # our choice: the quickstart's, 1,400 entries for a megabyte and a half
_CHECKED_BYTES = 1 << 20  # of text that goes through the tokenizer and back
# What a tokenizer must give back, whether it was trained on any of it or not.
_HARD_TEXTS = (
    "  two  spaces, a tab\tand\n\nlines\r\n",
    "Ünïcödé, 中文, العربية, 👩‍👩‍👧, \u200b",
    f"{END_OF_TEXT} as text",
    "x" * 300,
    "0123456789 3.14 10,000",
)
# What sentencepiece says that a vocabulary may be at most, and must be at least.
_HIGHEST, _LOWEST = re.compile(r"<= (\d+)"), re.compile(r"required_chars\. \d+ vs (\d+)")
_NULS = re.compile(r"[\0\s]*")
_FEWEST_ENTRIES = 2  # of which sentencepiece says how many there must be


@holding_claims()
def train_tokenizer(config: TokenizerConfig) -> Path:
    """Train a tokenizer, look whether it gives texts back, and return its folder. Raises UserError,
    also where the folder is there."""
    if not config.files:
        raise UserError("--files FILE [FILE ...] is required: the files that the stages will read")
    by = _RecordTexts(config.fields, "--fields")
    texts = _Texts(config, by)
    for path in config.files:
        next(texts.of(path))  # each is one that is read
    with making(config.out) as folder, LongWork("tokenizer: train", is_writer=True) as work:
        num_bytes, cut = texts.measure()
        by.check_used()
        wanted = config.vocab_size or _size_for(num_bytes)
        if config.kind == "byte_level":
            _train_byte_level(texts, folder / "tokenizer.json", wanted)
        else:
            path = folder / "tokenizer.model"
            train_fitting(texts, path, wanted, is_exact=config.vocab_size is not None)
        work.tell("check")
        tokenizer = load_tokenizer(folder)
        if config.vocab_size is not None and tokenizer.vocab_size != config.vocab_size:
            raise UserError(_too_large(config.vocab_size, tokenizer.vocab_size))
        bytes_a_token = _checked(tokenizer, texts)
        facts = {
            "files": [str(path) for path in config.files],
            "bytes": num_bytes,
            "entries": tokenizer.vocab_size,
            "bytes_a_token": round(bytes_a_token, 3),
        }
        if config.fields != "auto":
            facts["fields"] = config.fields
        write_object(folder / "trained_on.json", facts)
    for path in cut:
        say(f"{path}: not all of it was read (--max-megabytes {config.max_megabytes:g})")
    say(
        f"{config.out}: {tokenizer.vocab_size} entries from {_amount(num_bytes)} of text; "
        f"{bytes_a_token:.2f} bytes a token"
    )
    say(f"next: python recipes/sft_tiny.py --tokenizer {shlex.quote(str(config.out))} \\")
    say(f"    {_next_data(config.files, by)}")
    return config.out


def train_fitting(
    texts: Iterable[str], path: Path, vocab_size: int, *, is_exact: bool, with_space: bool = False
) -> None:
    """Train a sentencepiece model of so many entries, or where not exact, of as many as the texts
    give, or want for their characters. Raises UserError. `texts` is read once or a few times."""
    size = max(vocab_size, _FEWEST_ENTRIES)
    try:
        tokenizer = train_sentencepiece(texts, path, vocab_size=size, with_space=with_space)
    except UserError as error:
        highest, lowest = _HIGHEST.search(str(error)), _LOWEST.search(str(error))
        if highest is None and lowest is None:
            raise
        if is_exact and highest:
            raise UserError(_too_large(vocab_size, int(highest[1]))) from None
        if is_exact and lowest:
            raise UserError(
                f"--vocab-size {vocab_size} is too few: this text wants {lowest[1]} at least, the "
                f"256 bytes, two marks and its characters; give --vocab-size {lowest[1]} or more"
            ) from None
        fitting = int(highest[1]) if highest else vocab_size + int(lowest[1] if lowest else 0)
        train_fitting(texts, path, fitting, is_exact=False, with_space=with_space)
    else:
        # Of a script that has none, or few.
        if not with_space and tokenizer.decode(tokenizer.encode(" ")) != " ":
            train_fitting(texts, path, vocab_size, is_exact=is_exact, with_space=True)


def _too_large(vocab_size: int, highest: int) -> str:
    return (
        f"--vocab-size {vocab_size} does not fit the training text, which gives {highest} at most: "
        f"give --vocab-size {highest} or less, leave the option out, or give more text"
    )


def texts_of(
    path: Path,
    *,
    skip_bad_lines: bool = False,
    skip_option: str = "",
    text_of: Callable[[dict[str, Any]], str] | None = None,
) -> Iterator[str]:
    """Yield the texts of a file of the stages, one a record, of a .txt one a line; raises
    UserError. text_of: what a record says, or raises BadRecord; None: as by its fields."""
    if ending_of(path) in ENDINGS["text"]:
        is_empty = True
        for number, line in read_lines(path):
            is_empty = is_empty and line.isspace()
            try:
                yield line.decode("utf-8-sig" if number == 1 else "utf-8")
            except UnicodeDecodeError as error:
                where = f"{named(path, MAX_SHOWN_PATH)}:{number}"
                raise UserError(f"{where}: {not_utf8(error.start + 1)}") from None
        if is_empty:
            raise UserError(f"{named(path, MAX_SHOWN_PATH)}: the file is empty; it needs text")
        return
    source = one_source(path)
    if all(ending_of(file) in ENDINGS["text"] for file in source.files):
        for file in source.files:
            yield from texts_of(file)
        return
    yield from RecordReader(
        source,
        text_of or _RecordTexts("auto"),
        skip_bad_lines=skip_bad_lines,
        skip_option=skip_option,
    )


class _RecordTexts:
    """What a record says, by the choice of fields, where it has them."""

    def __init__(self, fields: str, option: str = "") -> None:
        """option: names the fields; "" for a command that has none."""
        self.fields, self._option = fields, option
        self._name, mapping = choice_of(fields, option)
        text = {ours: theirs for ours, theirs in mapping.items() if ours == "text"}
        others = {ours: theirs for ours, theirs in mapping.items() if ours != "text"}
        self._groups = (others, text)  # as files have them, pretraining text apart
        self._is_used = fields == "auto"
        self._first: list[str] = []

    def __call__(self, record: dict[str, Any]) -> str:
        """Return all of it, part below part; BadRecord where it says nothing."""
        chosen = self.chosen(record)
        self._is_used = self._is_used or bool(chosen)
        self._first = self._first or list(record)
        for rows in (chosen or _canonical(record), [record]):
            found = [
                part for row in rows for name in _TEXTS for part in _parts(row.get(name), name)
            ]
            if found:
                return "\n".join(found)
        advice = f"; name them by {self._option} OURS=THEIRS,..." if self._option else ""
        there = _keys(list(record))
        raise BadRecord(f"none of the fields {', '.join(_TEXTS)}; there is {there}{advice}")

    def chosen(self, record: dict[str, Any]) -> list[dict[str, Any]]:
        """Return what the choice makes of a record, nothing where it has none of the fields;
        BadRecord where it has some."""
        if self._name == PLAIN:
            return [record]
        if self._name is not None:
            shape = SHAPES[self._name]
            is_of = shape.claimed(record) or (not shape.keys and record.keys() >= _PAIR)
            return (_given(shape, record) or [record]) if is_of else []
        found: dict[str, Any] = {}
        for group in self._groups:
            if any(_leads(record, theirs) for theirs in group.values()):
                found |= {ours: value_at(record, theirs) for ours, theirs in group.items()}
        kept = {name: record[name] for name in _TEXTS if name in record}
        return [with_lists(kept | found)] if found else []

    def check_used(self) -> None:
        """Raise UserError for a choice that no record had the fields of."""
        if not self._is_used:
            raise UserError(
                f"{self._option} {named(self.fields)}: no record of the files has such fields; "
                f"there is {_keys(self._first)}"
            )


def _leads(record: dict[str, Any], path: str) -> bool:
    try:
        return value_at(record, path) is not None
    except BadRecord:
        return False


def _keys(names: Sequence[str]) -> str:
    return ", ".join(map(named, names[:8])) or "nothing"


def _canonical(record: dict[str, Any]) -> list[dict[str, Any]]:
    """Return what a row of a public data set gives the stages; nothing of one in our own fields, or
    where several rows make a record."""
    shapes = [SHAPES[name] for name in recognised(record) if name != PLAIN]
    return _given(shapes[0], record) if len(shapes) == 1 else []


def _given(shape: DataShape, record: dict[str, Any]) -> list[dict[str, Any]]:
    if shape.gather is not None:
        return []
    purposes: tuple[Purpose, ...] = ("comparisons", "demonstrations", "prompts")
    for purpose in purposes:
        if purpose in shape.has:
            found = [each for each in shape.read(record, purpose) if isinstance(each, dict)]
            if found:
                return found
    return []


def _parts(value: Any, field: str) -> list[str]:
    if value is None:
        return []
    if isinstance(value, str):
        return [check_text(value, field)]
    if isinstance(value, dict):  # a message, as a turn that the stages make of it
        role = str(value.get("role")).capitalize()
        return [f"{role}: {part}" for part in _parts(value.get("content"), field)]
    if isinstance(value, list):
        return [part for each in value for part in _parts(each, field)]
    problem = f"must be a text, or a list of texts or messages, not {json_type(value)}"
    raise BadRecord(problem, field=field)


class _Texts:
    """The texts to train on, of each file a like share of what is read at most; iterate it anew for
    each pass."""

    def __init__(self, config: TokenizerConfig, by: _RecordTexts) -> None:
        self._config, self._by = config, by

    def __iter__(self) -> Iterator[str]:
        for path in self._config.files:
            yield from self.of(path)

    def measure(self) -> tuple[int, list[Path]]:
        """Return the bytes of all of it, and the files that have more; UserError for a file of NULs
        alone."""
        num_bytes, cut = 0, []
        for path in self._config.files:
            num_here, has_text = 0, False
            for text in self.of(path):
                num_here += len(text.encode())
                has_text = has_text or not _NULS.fullmatch(text)
            if not has_text:
                raise UserError(
                    f"{named(path, MAX_SHOWN_PATH)}: NUL characters (U+0000) alone are no text, as "
                    "a copy leaves them that was cut off: leave the file out, or write it again"
                )
            num_bytes += num_here
            if num_here > self._most():
                cut.append(path)
        return num_bytes, cut

    def _most(self) -> float:
        return self._config.max_megabytes * 1e6 / len(self._config.files)

    def of(self, path: Path) -> Iterator[str]:
        """Yield those of one file."""
        num_here = 0
        for text in texts_of(
            path,
            skip_bad_lines=self._config.skip_bad_lines,
            skip_option="--skip-bad-lines",
            text_of=self._by,
        ):
            num_here += len(text.encode())
            yield text
            if num_here > self._most():
                return


def _amount(num_bytes: int) -> str:
    return f"{num_bytes / 1e6:.2f} MB" if num_bytes >= 1e5 else f"{num_bytes:,} bytes"


def _next_data(files: Sequence[Path], by: _RecordTexts) -> str:
    """Return the option by which SFT reads the first of the files that it can: demonstrations, else
    text to pretrain on."""
    for option, is_for in (("--data.train", _has_response), ("--data.pretraining", _has_text)):
        for path in files:
            row = _first_row(path)
            try:
                chosen = by.chosen(row)
                if is_for(chosen[0] if chosen else row):
                    more = f" --data.fields {shlex.quote(by.fields)}" if chosen else ""
                    return f"{option} {shlex.quote(str(path))}{more}"
            except BadRecord:
                continue
    return "--data.train demonstrations.jsonl"


def _first_row(path: Path) -> dict[str, Any]:
    if ending_of(path) in ENDINGS["text"]:
        return {"text": ""}
    try:
        return next(iter(RecordReader(path, dict[str, Any], skip_bad_lines=False)))
    except UserError:
        return {}


def _has_response(row: dict[str, Any]) -> bool:
    return labels_of(row, are_named=False)[0].response is not None


def _has_text(row: dict[str, Any]) -> bool:
    return isinstance(row.get("text", row.get("content")), str)


def _size_for(num_bytes: int) -> int:
    return min(_LARGEST, max(_SMALLEST, num_bytes // _BYTES_AN_ENTRY))


def _train_byte_level(texts: Iterable[str], path: Path, vocab_size: int) -> None:
    """Train byte pairs over bytes, cut into words as GPT-2's are, and write a tokenizer.json."""
    alphabet = pre_tokenizers.ByteLevel.alphabet()
    if vocab_size <= len(alphabet):
        raise UserError(
            f"--vocab-size {vocab_size} is too few: byte_level wants {len(alphabet) + 1} at least, "
            "one a byte and the end of text"
        )
    tokenizer = tokenizers.Tokenizer(models.BPE())
    tokenizer.pre_tokenizer = pre_tokenizers.ByteLevel(add_prefix_space=False)
    tokenizer.decoder = decoders.ByteLevel()
    trainer = trainers.BpeTrainer(
        vocab_size=vocab_size,
        initial_alphabet=sorted(alphabet),
        special_tokens=[END_OF_TEXT],
        show_progress=False,
    )
    tokenizer.train_from_iterator(texts, trainer)
    with writing(path):
        path.write_text(tokenizer.to_str())


def _checked(tokenizer: Tokenizer, texts: Iterable[str]) -> float:
    """Return the bytes a token of a megabyte of the texts; UserError where one of them, or a hard
    one, does not come back from its tokens."""
    num_bytes, num_tokens = 0, 0
    sample: list[str] = []
    for text in texts:
        sample.append(text)
        num_bytes += len(text.encode())
        if num_bytes > _CHECKED_BYTES:
            break
    for text, ids in zip(sample, tokenizer.encode_all(sample), strict=True):
        num_tokens += len(ids)
        _check_back(tokenizer, text, ids)
    for text in _HARD_TEXTS:
        _check_back(tokenizer, text, tokenizer.encode(text))
    return num_bytes / max(1, num_tokens)


def _check_back(tokenizer: Tokenizer, text: str, ids: Sequence[int]) -> None:
    if tokenizer.decode(ids) != text:
        raise UserError(f"the tokenizer does not give a text back as it was: {named(text)}")
