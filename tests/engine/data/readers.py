"""The readers of data files, and what holds of each whatever a file has in it."""

import gzip
import json
from collections.abc import Callable
from dataclasses import dataclass
from pathlib import Path
from typing import Any

from engine.data.comparisons import comparison_examples, read_comparisons
from engine.data.demonstrations import demonstration_examples, read_demonstrations
from engine.data.pretraining import open_token_file
from engine.data.prompts import prompt_examples, read_prompts
from engine.errors import UserError
from tests.engine.data.made_tokenizer import made_tokenizer

_END = 256
TOKENIZER = made_tokenizer(  # a token is a byte; a text that cannot be encoded is an exception
    lambda texts: [list(text.encode()) for text in texts],
    vocab_size=_END + 1,
    eos_id=_END,
    decode=lambda ids: bytes(ids).decode(),
)
CHAT = [
    {"role": "system", "content": "Be brief."},
    {"role": "user", "content": "Qu\u00e9?"},
    {"role": "assistant", "content": "So."},
]
OTHER_CHAT = [*CHAT[:2], {"role": "assistant", "content": "No."}]
_MOST = 1 << 30


@dataclass(frozen=True)
class Reader:
    """One kind of data file."""

    records: list[Any]
    """Good records, one of every form that the reader takes; of .txt its lines."""
    read: Callable[[Path, bool], list[Any]]
    """From (path, skip_bad_lines) to what was read, tokenised; raises UserError."""
    suffix: str = ".jsonl"

    def content(self) -> bytes:
        """Return a good file."""
        if self.suffix == ".txt":
            return "\n".join(self.records).encode()
        return b"".join(json.dumps(each).encode() + b"\n" for each in self.records)


def _demonstrations(path: Path, skip: bool) -> list[Any]:
    records, _ = read_demonstrations(path, skip_bad_lines=skip)
    examples, _ = demonstration_examples(records, TOKENIZER, max_length=_MOST)
    return [example.tokens.tolist() for example in examples]


def _comparisons(path: Path, skip: bool) -> list[Any]:
    records, _ = read_comparisons(path, skip_bad_lines=skip)
    units, _ = comparison_examples(records, TOKENIZER, max_length=_MOST)
    return [[(each.tokens.tolist(), each.fields["ranks"]) for each in unit] for unit in units]


def _prompts(path: Path, skip: bool) -> list[Any]:
    texts, _ = read_prompts(path, skip_bad_lines=skip)
    examples, _ = prompt_examples(texts, TOKENIZER, max_prompt_length=_MOST)
    return [example.tokens.tolist() for example in examples]


def _documents(path: Path, skip: bool) -> list[Any]:
    tokens = open_token_file(path, TOKENIZER, path.parent / "cache", skip_bad_lines=skip).tokens
    documents: list[list[int]] = [[]]
    for token in tokens.tolist():
        documents[-1].append(token)
        if token == _END:
            documents.append([])
    return documents[:-1]


READERS = {
    "demonstrations": Reader(
        [
            {"prompt": "the mill", "response": "is cheap"},
            {"messages": CHAT},
            {"prompt": CHAT[:2], "response": CHAT[2:]},
        ],
        _demonstrations,
    ),
    "comparisons": Reader(
        [
            {"prompt": "the mill", "completions": ["is cheap", "a pub", "x"], "ranks": [2, 1, 2]},
            {"messages": CHAT[:2], "chosen": "So.", "rejected": [OTHER_CHAT[2]]},
            {"chosen": CHAT, "rejected": OTHER_CHAT},
            {"chosen": "The sky is blue.", "rejected": "The sky is black."},
        ],
        _comparisons,
    ),
    "prompts": Reader([{"prompt": "the mill"}, {"messages": CHAT[:2]}], _prompts),
    "documents": Reader([{"text": "the mill"}, {"text": "is \u00e9t\u00e9\n\nhere"}], _documents),
    "text": Reader(["The Mill.", "", "Une \u00e9t\u00e9 \U0001f600  "], _documents, ".txt"),
}


def outcome(name: str, path: Path, content: bytes, *, skip_bad_lines: bool = False) -> Any:
    """Return what a reader makes of a file of that content, or its error, which is short."""
    path.write_bytes(content)
    try:
        return READERS[name].read(path, skip_bad_lines)
    except UserError as error:
        text = str(error)
        assert len(text.split("\n")) <= 2
        assert len(text) < 2000
        assert path.name in text
        assert not list(path.parent.glob("cache/.*"))  # nothing half written
        return text


def check(name: str, folder: Path, content: bytes) -> Any:
    """Have a reader read a file and return its outcome: all that was there, or an error.

    With bad lines skipped it gives no other records, and of gzip the same.
    """
    path = folder / f"data{READERS[name].suffix}"
    found = outcome(name, path, content)
    unpacked = content
    if content.startswith(b"\x1f\x8b"):
        if isinstance(found, str):
            return found
        unpacked = gzip.decompress(content)  # raises where it is not whole
    else:
        packed = outcome(name, path.with_name(path.name + ".gz"), gzip.compress(content, 1))
        same = packed.replace(".gz", "") if isinstance(packed, str) else packed
        assert same == found
    skipped = outcome(name, path, content, skip_bad_lines=True)
    if not isinstance(found, str):
        assert skipped == found
        _check_complete(name, found, unpacked)
    return found


def _check_complete(name: str, found: list[Any], content: bytes) -> None:
    content = content.removeprefix(b"\xef\xbb\xbf")
    if READERS[name].suffix == ".txt":
        assert found == [[*content, _END]]
    else:
        assert len(found) == _num_objects(content.decode())


def _num_objects(text: str) -> int:
    """Return how many objects JSON has, on a line each, one after the other, or in a list."""
    values, text = [], text.strip()
    while text:
        value, end = json.JSONDecoder().raw_decode(text)
        values.append(value)
        text = text[end:].strip()
    return len(values[0] if isinstance(values[0], list) else values)
