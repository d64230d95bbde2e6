"""Pretraining text, tokenised once into a memory-mapped file of token ids.

Documents follow one another, each behind what begins a text, where the tokenizer has that, and with
an end of text after it. Sequences are cut from that stream without regard to documents (GPT-3,
arXiv 2005.14165, appendix B): a beginning inside of one is predicted as any other token is.
"""

import codecs
import hashlib
import itertools
import json
import math
import os
import sys
import time
from collections.abc import Iterable, Iterator
from dataclasses import asdict, dataclass
from pathlib import Path
from typing import Any

import numpy as np
import xxhash

from engine import stop
from engine.containers.json_lines import UTF8_BOM, not_utf8
from engine.containers.kinds import ENDINGS, ending_of
from engine.containers.lines import read_lines
from engine.containers.packed import beginning_of
from engine.containers.refused import HEAD_BYTES, refuse_other_kinds
from engine.containers.row import check_text, required
from engine.containers.sources import DataSource, sources_of
from engine.data.examples import Example, Shape
from engine.data.records import ReadReport, RecordReader, joined_report
from engine.data.tokenizer import Tokenizer, in_batches
from engine.errors import UserError, named
from engine.files import MAX_SHOWN_PATH, open_file, read_object, replacing
from engine.printable import ERROR_CHARACTERS, say
from engine.shapes.fields import Fields

_PIECE_CHARACTERS = 1 << 16  # a .txt file may not fit in memory
_PART_BYTES = 1 << 20  # of a line of a .txt file, which may have no other line; our choice
_SECONDS_A_LINE = 15.0
_MOST_STEM = 100  # characters of a name, of the 255 that a file's may have
_CHECKED_BYTES = 1 << 22  # at a time, which caches hold; our choice


class TokenSequences:
    """Sequences of one length, cut in order from a token stream; an incomplete last one is not."""

    def __init__(self, tokens: np.ndarray, length: int) -> None:
        self._rows = tokens[: len(tokens) // length * length].reshape(-1, length)

    def __len__(self) -> int:
        return len(self._rows)

    def __getitem__(self, index: int) -> Example:
        """Return one sequence, all of it predicted but the first token; reads it from the file."""
        return Example(tokens=self._rows[index].astype(np.int64), prompt_length=1)

    def shapes(self, index: int) -> list[Shape]:
        """Return the shape of a sequence, all of which are alike, without reading it."""
        return [(self._rows.shape[1], 1)]


@dataclass(frozen=True, kw_only=True, eq=False)
class TokenFile:
    """The token stream of one source."""

    tokens: np.ndarray
    """[N] uint16 or uint32, memory-mapped."""
    report: ReadReport
    """How reading the source went; num_read is its documents."""
    source: Path

    def sequences(self, length: int) -> TokenSequences:
        """Return the stream cut into sequences of `length` tokens; UserError when it has none."""
        if length < 2:
            raise UserError(f"a pretraining sequence of {length} tokens has none to predict")
        if len(self.tokens) < length:
            raise UserError(
                f"{self.source}: its {len(self.tokens)} tokens do not fill one sequence of {length}"
            )
        return TokenSequences(self.tokens, length)

    def held_out(self, length: int) -> TokenSequences:
        """Return the same of held-out text, whose loss is worth knowing where it is short too: then
        all of it is one sequence."""
        return self.sequences(min(length, max(2, len(self.tokens))))


def open_token_file(
    source: Path | str,
    tokenizer: Tokenizer,
    cache_dir: Path | str,
    *,
    fields: str = "auto",
    skip_bad_lines: bool = False,
) -> TokenFile:
    """Return the tokens of {"text"} in any container, or of .txt and .md files, each of them one
    document; made where `cache_dir` lacks them. fields: as engine.shapes.fields; UserError."""
    path = make_token_file(
        source, tokenizer, cache_dir, fields=fields, skip_bad_lines=skip_bad_lines
    )
    return read_token_file(path, source)


def make_token_file(
    source: Path | str,
    tokenizer: Tokenizer,
    cache_dir: Path | str,
    *,
    fields: str = "auto",
    skip_bad_lines: bool = False,
) -> Path:
    """Return the file of a source's tokens, made where it is not there: reads all of the source.

    The source may be several files, as sources_of has them. It is encoded on all cores; a long one
    says now and then how far it is, and a signal that asks the run to stop leaves nothing of it.
    Its tokens are kept in `cache_dir` under the source's content and the tokenizer's fingerprint,
    with a checksum: where they are damaged they are made again. Several processes may make them at
    once: all write the same bytes, each whole; the ranks of a run save the work (engine/run.py).
    Raises UserError.
    """
    source, cache_dir = Path(source), Path(cache_dir)
    sources = sources_of(source)
    # What is no text is refused before all of it is read for its digest.
    next(itertools.chain.from_iterable(_Documents(sources, skip_bad_lines, fields)))
    documents = _Documents(sources, skip_bad_lines, fields)
    dtype = np.dtype(np.uint16 if tokenizer.vocab_size <= 1 << 16 else np.uint32)
    key = f"{source.name} {_content(sources)} {tokenizer.fingerprint()} {skip_bad_lines}"
    if "text=" in fields:  # another field is the text
        key += f" {fields}"
    stem = source.name.split(".")[0][:_MOST_STEM]
    stem += f"-{hashlib.sha256(os.fsencode(key)).hexdigest()[:20]}"
    tokens_path = cache_dir / f"{stem}.{dtype.name}"

    if not _is_whole(tokens_path, tokenizer.vocab_size):
        if os.path.lexists(tokens_path) and os.path.lexists(_report_path(tokens_path)):
            say(
                f"WARNING: {tokens_path}: damaged, or of an earlier version; it is made again",
                stream=sys.stderr,
                limit=ERROR_CHARACTERS,
            )
        progress, digest, num_bytes = _Progress(source), xxhash.xxh3_128(), 0
        with replacing(tokens_path) as stream:
            for batch in in_batches(_pieces(documents, tokenizer)):
                encoded = np.asarray(_ids_of(batch, tokenizer), dtype=dtype).tobytes()
                stream.write(encoded)
                digest.update(encoded)
                num_bytes += len(encoded)
                progress.show(documents.share_read, num_bytes // dtype.itemsize)
                if stop.is_noted():
                    stop.leave(f"while {source} was read")
        summary = asdict(documents.report()) | {"num_bytes": num_bytes}
        del summary["path"]  # of who made it, and others come to read it
        digest.update(json.dumps(summary).encode())
        with replacing(_report_path(tokens_path)) as stream:  # last: where it is, all are there
            stream.write(json.dumps(summary | {"checksum": digest.hexdigest()}).encode())
    return tokens_path


def read_token_file(path: Path, source: Path | str) -> TokenFile:
    """Return the tokens that make_token_file has left at `path`, without reading them yet."""
    summary = read_object(_report_path(path))
    report = ReadReport(
        num_read=summary["num_read"],
        num_bad=summary["num_bad"],
        first_errors=tuple(summary["first_errors"]),
        path=str(source),
        read_as=summary.get("read_as", ""),
        sources=tuple((name, said) for name, said in summary.get("sources", ())),
        parts=tuple(summary.get("parts", ())),
    )
    with open_file(path) as stream:
        tokens = np.memmap(stream, dtype=np.dtype(path.suffix[1:]), mode="r")
    return TokenFile(tokens=tokens, report=report, source=Path(source))


def _pieces(
    documents: Iterable[Iterable[str]], tokenizer: Tokenizer
) -> Iterator[str | tuple[int, ...]]:
    """Yield the texts of all documents, and the ids that stand before and behind each document."""
    for document in documents:
        yield tokenizer.bos_ids
        yield from document
        yield (tokenizer.eos_id,)


def _ids_of(batch: list[str | tuple[int, ...]], tokenizer: Tokenizer) -> list[int]:
    """Return the ids of a batch: those that are given, and those of its texts."""
    encoded = tokenizer.encode_all(piece for piece in batch if isinstance(piece, str))
    return [n for piece in batch for n in (next(encoded) if isinstance(piece, str) else piece)]


class _Progress:
    """Says on screen how far a long file has been read."""

    def __init__(self, source: Path) -> None:
        self._source = source
        self._start = self._last = time.monotonic()

    def show(self, share: float, num_tokens: int) -> None:
        """Print a line where the last one is some seconds old."""
        now = time.monotonic()
        if now - self._last < _SECONDS_A_LINE:
            return
        self._last, seconds = now, now - self._start
        minutes, rest = divmod(int(seconds / max(share, 1e-9) - seconds), 60)
        say(
            f"{self._source}: {share:.0%} read, {num_tokens / 1e6:,.1f} million tokens, "
            f"{num_tokens / seconds / 1e6:.2f} million a second, eta {minutes}:{rest:02d}"
        )


def _report_path(tokens_path: Path) -> Path:
    return tokens_path.with_suffix(".json")


def _is_whole(tokens_path: Path, vocab_size: int) -> bool:
    """Return whether tokens and their report are there as they were written, and all ids are below
    vocab_size: reads all of both."""
    report_path, dtype = _report_path(tokens_path), np.dtype(tokens_path.suffix[1:])
    if not report_path.exists() or not tokens_path.exists():
        return False
    try:
        summary = read_object(report_path)
    except UserError:  # damaged
        return False
    digest = xxhash.xxh3_128()
    with open_file(tokens_path) as stream:
        while content := stream.read(_CHECKED_BYTES):
            if len(content) % dtype.itemsize or np.frombuffer(content, dtype).max() >= vocab_size:
                return False
            digest.update(content)
    said = summary.pop("checksum", None)
    digest.update(json.dumps(summary).encode())
    return said == digest.hexdigest()


def _content(sources: list[DataSource]) -> str:
    """Return a digest of all that is read of some sources; that of the file, where they are one."""
    found = []
    for source in sources:
        for path in source.files:
            with open_file(path) as stream:
                found.append(hashlib.file_digest(stream, "sha256").hexdigest())
        found.append("" if source.weight == 1 else f"@{source.weight}")
    return " ".join(part for part in found if part)


class _Documents:
    """The documents of some sources, each as texts to encode one after the other; a source is read
    as often as its weight says, so that no document stands beside itself."""

    def __init__(self, sources: list[DataSource], skip_bad_lines: bool, fields: str) -> None:
        self._sources, self._skip_bad_lines, self._fields = sources, skip_bad_lines, fields
        self._passes = [max(1, math.ceil(source.weight)) for source in sources]
        self._reports: list[tuple[DataSource, ReadReport, int]] = []
        self._num_passes = 0  # that are over
        self._reader: _TextFiles | RecordReader[list[str]] | None = None

    @property
    def share_read(self) -> float:
        """Which share of all that is to be read has been."""
        share = self._reader.share_read if self._reader is not None else 0.0
        return min(1.0, (self._num_passes + share) / sum(self._passes))

    def __iter__(self) -> Iterator[Iterable[str]]:
        for source, passes in zip(self._sources, self._passes, strict=True):
            num_taken = 0
            for number in range(passes):
                self._reader = _documents_of(source, self._skip_bad_lines, self._fields)
                for document in self._reader:
                    if number < source.num_passes or source.has_once_more("".join(document)):
                        num_taken += 1
                        yield document
                self._num_passes, report = self._num_passes + 1, self._reader.report()
                self._reader = None
            self._reports.append((source, report, num_taken))

    def report(self) -> ReadReport:
        """Return how reading them all went."""
        return joined_report(self._reports)


def _documents_of(
    source: DataSource, skip_bad_lines: bool, fields: str
) -> "_TextFiles | RecordReader[list[str]]":
    are_text = {ending_of(path) in ENDINGS["text"] for path in source.files}
    name = named(source.name, MAX_SHOWN_PATH)
    if are_text == {True, False}:
        raise UserError(f"{name}: text files among others; name them apart, with a comma between")
    if are_text == {False}:
        return RecordReader(
            source, _parse, skip_bad_lines=skip_bad_lines, shaping=lambda: Fields("text", fields)
        )
    if source.weight != source.num_passes:
        raise UserError(
            f"{name}: a file of text is one document, and cannot count {source.weight} times"
        )
    return _TextFiles(source)


def _parse(record: dict[str, Any]) -> list[str]:
    return [check_text(required(record, "text"), "text")]


class _TextFiles:
    """Files of plain text, each of which is one document."""

    def __init__(self, source: DataSource) -> None:
        self._files = [_TextFile(path) for path in source.files]
        self._num_read = 0

    def __iter__(self) -> Iterator[Iterable[str]]:
        for file in self._files:
            yield file.pieces()
            self._num_read += 1

    @property
    def share_read(self) -> float:
        """Which share of the files has been read."""
        return sum(file.share_read for file in self._files) / len(self._files)

    def report(self) -> ReadReport:
        """Return how many there are."""
        return ReadReport(num_read=self._num_read, num_bad=0, first_errors=())


class _TextFile:
    """A plain text file."""

    def __init__(self, path: Path) -> None:
        self._path = path
        self._name = named(path, MAX_SHOWN_PATH)
        self.share_read = 0.0  # of the file's bytes

    def _reached(self, share: float) -> None:
        self.share_read = share

    def pieces(self) -> Iterator[str]:
        """Yield the text in parts that end before whitespace, where tokenizers cut anyway. Where a
        line of over _PART_BYTES has none, it is cut where it has so many bytes."""
        refuse_other_kinds(self._path, beginning_of(self._path, HEAD_BYTES)[1], is_prose=True)
        pending = ""
        is_empty = True
        for text, is_line_end in self._texts():
            pending += text
            is_empty = is_empty and not text.strip()
            if len(pending) > _PIECE_CHARACTERS:
                end = _end_of_piece(pending, is_line_end)
                yield pending[:end]
                pending = pending[end:]
        if is_empty:
            raise UserError(f"{self._name}: the file is empty; it needs text")
        yield pending

    def _texts(self) -> Iterator[tuple[str, bool]]:
        """Yield (text, whether a line ends there): lines, the long ones in parts; UserError for
        what is no text in UTF-8."""
        decoder = codecs.getincrementaldecoder("utf-8")()
        number, num_bytes = 1, 0
        try:
            for number, part in read_lines(self._path, self._reached, part_bytes=_PART_BYTES):
                is_line_end = part.endswith(b"\n")
                is_first = number == 1 and not num_bytes
                content = part.removeprefix(UTF8_BOM) if is_first else part
                text = decoder.decode(content, final=is_line_end)
                if "\0" in text:  # such as a file that was lost in a power cut
                    raise UserError(f"{self._name}:{number}: not text: it holds a NUL")
                yield text, is_line_end or len(part) < _PART_BYTES
                num_bytes = 0 if is_line_end else num_bytes + len(part)
            decoder.decode(b"", final=True)
        except UnicodeDecodeError as error:
            # The decoder held back the first bytes of a character that a part had cut.
            number_of_byte = num_bytes - len(decoder.getstate()[0]) + error.start + 1
            raise UserError(f"{self._name}:{number}: {not_utf8(number_of_byte)}") from None


def _end_of_piece(text: str, is_line_end: bool) -> int:
    """Return where a piece of text ends: before the whitespace at its end, or within a line before
    its last word, of which more may come."""
    if is_line_end:
        return len(text.rstrip()) or len(text)
    words = text.rsplit(None, 1)
    return len(words[0]) if len(words) == 2 else len(text)
