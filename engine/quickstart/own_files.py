"""The four files of README's "Your data" in one folder, and the split that the quickstart makes.

DIR/demonstrations.jsonl  comparisons.jsonl  prompts.jsonl  pretraining.jsonl or .txt
HOME/data/NAME.jsonl  NAME_valid.jsonl    their records, each prompt on one side
HOME/data/split.json                      digests of the files that were split

Those of DIR may be any other container, packed or not (engine/containers/kinds.py), or a folder of
that name, as an option for data takes it.
"""

import hashlib
import json
from collections.abc import Iterable, Iterator, Mapping
from pathlib import Path
from typing import Any

from engine.checkpoints.manifest import digest_of_file
from engine.containers.json_lines import ENCODING_ADVICE
from engine.containers.kinds import ENDINGS, PACKED_ENDINGS, ending_of
from engine.containers.lines import MAX_LINE_BYTES, read_lines
from engine.containers.row import BadRecord, check_text
from engine.containers.sources import one_source
from engine.data.pairs import asked_in
from engine.data.records import RecordReader
from engine.errors import UserError
from engine.files import read_object, replacing, write_object
from engine.shapes.canonical import Purpose
from engine.shapes.fields import Fields

NAMES = ("demonstrations", "comparisons", "prompts", "pretraining")
"""What the stages read, and the beginnings of the files' names."""
_FRACTION = 0.1  # of the distinct prompts that are held out; our choice
_PURPOSES: Mapping[str, Purpose] = {
    "demonstrations": "demonstrations",
    "comparisons": "comparisons",
    "prompts": "prompts",
    "pretraining": "text",
}


def endings(name: str) -> tuple[str, ...]:
    """Return the endings that a file of that name may have."""
    texts = {"pretraining": ENDINGS["text"], "prompts": (".txt",)}
    of_kinds = {**ENDINGS, "text": texts.get(name, ())}
    plain = [ending for kind in of_kinds for ending in of_kinds[kind]]
    return (*plain, *(f"{ending}{packed}" for ending in plain for packed in PACKED_ENDINGS))


def own_files(folder: Path) -> dict[str, Path | None]:
    """Return {name: file} of a folder, or a folder of that name where there is no file, None for
    what is not there; UserError for two files."""
    found: dict[str, Path | None] = {}
    for name in NAMES:
        paths = [folder / f"{name}{ending}" for ending in endings(name)]
        paths = [path for path in paths if path.exists()]
        if len(paths) > 1:
            raise UserError(f"{paths[0]} and {paths[1]}: one file of {name} is read; take one away")
        inner = folder / name
        found[name] = paths[0] if paths else inner if inner.is_dir() else None
    return found


def _files_of(path: Path) -> tuple[Path, ...]:
    """Return the files of one of the four; UserError for a folder of several splits."""
    try:
        return one_source(path).files
    except UserError as error:
        if not path.is_dir():
            raise
        raise UserError(f"{error}; to take it, let {path} be that one, or a link to it") from None


def split_files(sources: Mapping[str, Path], targets: Mapping[str, tuple[Path, Path]]) -> None:
    """Write of each source the lines to train on and the held-out ones, where they are not there.

    targets: (to train on, held out) by name. UserError where they are of other sources by now.
    """
    record = next(iter(targets.values()))[0].parent / "split.json"
    digests = {name: _digest(path) for name, path in sources.items()}
    if record.exists():
        before = read_object(record)
        for name, path in sources.items():
            if before.get(name) != digests[name]:
                raise UserError(
                    f"{path}: other content than that which {record.parent.parent} was begun with; "
                    "put it back, or give another --directory"
                )
    for name, path in sources.items():
        if not all(target.exists() for target in targets[name]):
            _split(path, name, *targets[name])
    write_object(record, digests)


def _digest(source: Path) -> str:
    digests = [digest_of_file(file).xxh3_128 for file in _files_of(source)]
    return digests[0] if len(digests) == 1 else " ".join(digests)


def _split(source: Path, name: str, train: Path, valid: Path) -> None:
    """Hold out the records of about a tenth of a file's prompts, at least one prompt: those of the
    lowest hashes, so that a prompt of two files is on one side in both. Of a .txt of pretraining
    text the last tenth of the lines, for it is one text."""
    if name == "pretraining" and is_text(source):
        _split_text(_files_of(source)[0], train, valid)
        return
    hashes = sorted({number for _, number in _hashed(source, name)})
    if len(hashes) < 2:
        raise UserError(f"{source}: one prompt or text; two or more can be split")
    limit = max(int(_FRACTION * 2**64), hashes[0] + 1)
    if limit > hashes[-1]:  # a few prompts, all of low hashes
        limit = hashes[-1]
    with replacing(train) as kept, replacing(valid) as held_out:
        for line, number in _hashed(source, name):
            (held_out if number < limit else kept).write(line + b"\n")


def _split_text(source: Path, train: Path, valid: Path) -> None:
    num_lines = sum(1 for _ in read_lines(source))
    if num_lines < 2:
        raise UserError(f"{source}: one line of text; two or more can be split")
    last_kept = num_lines - max(1, int(_FRACTION * num_lines))
    with replacing(train) as kept, replacing(valid) as held_out:
        for number, line in read_lines(source):
            (held_out if number > last_kept else kept).write(line)


def is_text(source: Path) -> bool:
    """Return whether one of the four is a file of plain text by its name, and has no rows."""
    files = _files_of(source)
    return len(files) == 1 and _is_text_file(files[0])


def _is_text_file(path: Path) -> bool:
    return ending_of(path) in ENDINGS["text"]


def _hashed(source: Path, name: str) -> Iterator[tuple[bytes, int]]:
    """Yield each record and the hash of what it asks, or of the text that it is."""
    files = _files_of(source)
    records: Iterable[tuple[dict[str, Any], str]]
    if name == "pretraining" and all(map(_is_text_file, files)):
        records = (({"text": text}, text) for text in map(_whole_text, files))
    else:
        records = RecordReader(
            source,
            lambda record: (record, _asked(record)),
            skip_bad_lines=False,
            skip_option="",
            shaping=lambda: Fields(_PURPOSES[name], option=""),
        )
    for record, asked in records:
        yield json.dumps(record, ensure_ascii=False).encode(), _hash(asked)


def _whole_text(path: Path) -> str:
    """Return a file of plain text, which becomes a record."""
    content = bytearray()
    for number, line in read_lines(path):
        content += line
        if len(content) > MAX_LINE_BYTES:
            raise UserError(
                f"{path}:{number}: over {MAX_LINE_BYTES} bytes, in a folder of texts; part it, or "
                "join all of them into one file"
            )
    try:
        return check_text(content.decode("utf-8-sig"), "text")
    except UnicodeDecodeError as error:
        line_number = content.count(b"\n", 0, error.start) + 1
        raise UserError(f"{path}:{line_number}: not UTF-8 ({ENCODING_ADVICE})") from None
    except BadRecord as error:
        raise UserError(f"{path}: {error}") from None


def _hash(text: str) -> int:
    return int.from_bytes(hashlib.sha256(text.encode()).digest()[:8], "big")


def _asked(record: dict[str, Any]) -> str:
    """Return what a record asks, in any of its forms, or the text that it is."""
    if "text" in record:
        return check_text(record["text"], "text")
    asked = asked_in(record)
    return "\n".join([asked.text, *(each["content"] for each in asked.messages)]).strip()
