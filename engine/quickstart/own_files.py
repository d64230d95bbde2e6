"""The four files of README's "Your data" in one folder, and the split that the quickstart makes.

DIR/demonstrations.jsonl  comparisons.jsonl  prompts.jsonl  pretraining.jsonl or .txt
HOME/data/NAME.jsonl  NAME_valid.jsonl    their lines, each prompt on one side
HOME/data/split.json                      digests of the files that were split

Those of DIR may be any other container, packed or not (engine/containers/kinds.py).
"""

import hashlib
import json
from collections.abc import Iterator, Mapping
from pathlib import Path
from typing import Any

from engine.checkpoints.manifest import digest_of_file
from engine.containers.kinds import ENDINGS, PACKED_ENDINGS, ending_of
from engine.containers.lines import read_lines
from engine.data.records import RecordReader
from engine.errors import UserError
from engine.files import read_object, replacing, write_object
from engine.shapes.shapes import PLAIN, SHAPES, recognised

NAMES = ("demonstrations", "comparisons", "prompts", "pretraining")
"""What the stages read, and the beginnings of the files' names."""
_FRACTION = 0.1  # of the distinct prompts that are held out; our choice
_TURN = "Assistant:"  # what a dialogue as one text has before its last reply


def endings(name: str) -> tuple[str, ...]:
    """Return the endings that a file of that name may have, the first one there is taken."""
    kinds = [kind for kind in ENDINGS if kind != "text" or name == "pretraining"]
    plain = [ending for kind in kinds for ending in ENDINGS[kind]]
    return (*plain, *(f"{ending}{packed}" for ending in plain for packed in PACKED_ENDINGS))


def own_files(folder: Path) -> dict[str, Path | None]:
    """Return {name: file} of a folder, None for one that is not there."""
    found: dict[str, Path | None] = {}
    for name in NAMES:
        paths = (folder / f"{name}{ending}" for ending in endings(name))
        found[name] = next((path for path in paths if path.exists()), None)
    return found


def split_files(sources: Mapping[str, Path], targets: Mapping[str, tuple[Path, Path]]) -> None:
    """Write of each source the lines to train on and the held-out ones, where they are not there.

    targets: (to train on, held out) by name. UserError where they are of other sources by now.
    """
    record = next(iter(targets.values()))[0].parent / "split.json"
    digests = {name: digest_of_file(path).xxh3_128 for name, path in sources.items()}
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
            _split(path, *targets[name])
    write_object(record, digests)


def _split(source: Path, train: Path, valid: Path) -> None:
    """Hold out the lines of about a tenth of a file's prompts, at least one prompt: those of the
    lowest hashes, so that a prompt of two files is on one side in both. Of a .txt the last tenth of
    the lines, for it is one text."""
    if is_text(source):
        _split_text(source, train, valid)
        return
    hashes = sorted({number for _, number in _hashed(source)})
    if len(hashes) < 2:
        raise UserError(f"{source}: one prompt or text; two or more can be split")
    limit = max(int(_FRACTION * 2**64), hashes[0] + 1)
    if limit > hashes[-1]:  # a few prompts, all of low hashes
        limit = hashes[-1]
    with replacing(train) as kept, replacing(valid) as held_out:
        for line, number in _hashed(source):
            (held_out if number < limit else kept).write(line + b"\n")


def _split_text(source: Path, train: Path, valid: Path) -> None:
    num_lines = sum(1 for _ in read_lines(source))
    if num_lines < 2:
        raise UserError(f"{source}: one line of text; two or more can be split")
    last_kept = num_lines - max(1, int(_FRACTION * num_lines))
    with replacing(train) as kept, replacing(valid) as held_out:
        for number, line in read_lines(source):
            (held_out if number > last_kept else kept).write(line)


def is_text(path: Path) -> bool:
    """Return whether a file is plain text by its name, and has no rows."""
    return ending_of(path) in ENDINGS["text"]


def _hashed(source: Path) -> Iterator[tuple[bytes, int]]:
    """Yield each line and the hash of its prompt, or of the text that it is."""
    reader = RecordReader(source, lambda record: record, skip_bad_lines=False, skip_option="")
    for record in reader:
        yield json.dumps(record, ensure_ascii=False).encode(), _hash(_prompt_of(record))


def _hash(text: str) -> int:
    return int.from_bytes(hashlib.sha256(text.encode()).digest()[:8], "big")


def _prompt_of(record: dict[str, Any]) -> str:
    """Return what tells a record's prompt from others: it, or of dialogues and texts with the
    prompt inside what comes before the last reply; of rows of a public shape what that asks."""
    shapes = [SHAPES[name] for name in recognised(record) if name != PLAIN]
    if len(shapes) == 1 and shapes[0].gather is None and "prompts" in shapes[0].has:
        return json.dumps(
            [each for each in shapes[0].read(record, "prompts") if isinstance(each, dict)]
        )
    for key in ("prompt", "messages", "chosen"):
        value = record.get(key)
        if isinstance(value, str):
            return value.rpartition(_TURN)[0] or value if key == "chosen" else value
        if isinstance(value, list):
            replied = bool(value) and isinstance(value[-1], dict)
            is_reply = replied and value[-1].get("role") == "assistant"
            return json.dumps(value[:-1] if is_reply else value)
    return json.dumps(record.get("text"))
