"""A trial of a tokenizer from elsewhere, in a process of its own with little time and memory.

Its file is a program: it replaces, splits and joins by patterns, and may double a text sixty times,
search for ever, or crash the process. The trial makes it encode and decode what would show that.
A text that grows by more than a factor, a crash or a limit is one line for the user.
"""

import dataclasses
import json
import math
import os
import resource
import signal
import subprocess
import sys
from collections.abc import Iterator
from pathlib import Path
from typing import Any

from engine.data.codecs import LONGEST_PIECE, Codec, open_codec
from engine.data.tokenizer_files import TokenizerFiles
from engine.data.tokenizer_settings import TokenizerSettings
from engine.errors import UserError

# All our choice. A vocabulary of 262,144 pieces needs some seconds and half a gigabyte.
_MAX_CPU_SECONDS = 20
_MAX_WALL_SECONDS = 120.0  # for what waits without computing, on a machine that is busy
_MAX_BYTES = 4 << 30  # of addresses
_MAX_GROWTH = 64  # ids, or characters, that one character becomes: above the 33 bytes of U+FDFA
_MAX_STEPS = 100  # beside looking for pieces; those in use have up to ten

_CHARACTERS = 16  # of a text in which each is tried
_RUN = 64  # times that one character follows itself: a bad pattern takes 2**_RUN steps
_TEXTS = (
    "The Mill, a pub near the river,\n\tcosts £12.50 -- isn't it cheap?\r\n\r\n  Ünïcödé\ufeff",
    "漢字 かな 한글 العربية עברית हिन्दी ไทย ",
    "🙂👩\u200d👩\u200d👧 \u2581\u2047\0 x = [a_b(1) for i in {}];",
    "<s> [INST] <<SYS>> <|im_start|>user<|im_end|> <unk> <pad> <0x0A> [MASK] <|endoftext|></s>",
    *(character * 4000 for character in "a 0.\n"),
)
# RAYON_NUM_THREADS: a thread a core would be most of the memory on a machine of many.
_PROGRAM = """
import json, os, sys
os.environ["RAYON_NUM_THREADS"] = "1"
sys.path[:] = json.loads(sys.argv[1])
from engine.process.family import die_with
die_with(int(sys.argv[2]))
from engine.data.tokenizer_trial import answer_trial
answer_trial()
"""


def try_tokenizer(files: TokenizerFiles) -> None:
    """Raise UserError for a tokenizer that does not load, or that its trial finds unfit to use."""
    paths = [str(Path(__file__).resolve().parents[2]), *sys.path]
    try:
        done = subprocess.run(
            [sys.executable, "-I", "-c", _PROGRAM, json.dumps(paths), str(os.getpid())],
            input=b"".join([_head_of(files), *files.contents.values()]),
            stdout=subprocess.PIPE,
            stderr=subprocess.DEVNULL,  # Rust's words on a panic
            timeout=_MAX_WALL_SECONDS,
            check=False,
        )
    except subprocess.TimeoutExpired:
        raise _unfit(files, f"did not end in {_MAX_WALL_SECONDS:.0f} seconds") from None
    if done.returncode == -signal.SIGXCPU:
        raise _unfit(files, f"did not end in {_MAX_CPU_SECONDS} seconds of computing")
    if done.returncode != 0:
        raise _unfit(
            files, f"took more than {_MAX_BYTES >> 30} GiB of memory, or broke its process"
        )
    problem = json.loads(done.stdout)["problem"]
    if problem is not None:
        raise UserError(problem)


def answer_trial() -> None:
    """Be the process of a trial: read the files from stdin, write {"problem": ...} to stdout."""
    _limit(resource.RLIMIT_CORE, 0)
    _limit(resource.RLIMIT_CPU, _MAX_CPU_SECONDS)
    _limit(resource.RLIMIT_AS, _MAX_BYTES)
    head = json.loads(sys.stdin.buffer.readline())
    contents = {}
    for name, num_bytes in head.pop("sizes").items():
        contents[name] = sys.stdin.buffer.read(num_bytes)
    files = TokenizerFiles(
        path=Path(head["path"]),
        kind=head["kind"],
        contents=contents,
        names=tuple(head["names"]),
        settings=TokenizerSettings(**head["settings"]),
    )
    problem = None
    try:
        check_codec(open_codec(files, num_threads=1), files)
    except UserError as error:
        problem = str(error)
    print(json.dumps({"problem": problem}))


def check_codec(codec: Codec, files: TokenizerFiles) -> None:
    """Encode and decode what shows growth, panics and searches; raises UserError."""
    for step in map(json.loads, codec.steps):
        num_steps = sum("type" in fields for fields in _objects_in(step))
        if num_steps > _MAX_STEPS:
            raise _unfit(files, f"has {num_steps} steps; {_MAX_STEPS} are the most")
        growth = math.prod(map(_growth_of, _objects_in(step)))
        if growth > _MAX_GROWTH:
            raise _unfit(files, f"replaces texts by others {growth:.3g} times as long")
    for text in _trial_texts(codec):
        (ids,) = codec.encode([text])
        most = _MAX_GROWTH * (len(text) + 1)
        if max(len(ids), len(codec.normalize(text))) > most:
            raise _unfit(files, f"made more than {most} tokens of {len(text)} characters")
        if ids and not 0 <= min(ids) <= max(ids) < codec.vocab_size:
            raise _unfit(files, f"gave an id beyond its {codec.vocab_size}")
        if len(codec.decode(ids)) > LONGEST_PIECE * len(ids):
            raise _unfit(files, f"made a text that is too long of {len(ids)} tokens")
    for first in range(0, codec.vocab_size, _CHARACTERS):
        ids = list(range(first, min(first + _CHARACTERS, codec.vocab_size)))
        if len(codec.decode(ids)) > LONGEST_PIECE * len(ids):
            raise _unfit(files, f"made a text that is too long of {len(ids)} tokens")


def _trial_texts(codec: Codec) -> Iterator[str]:
    """Yield texts of any language, the texts in the tokenizer's own steps, and each character."""
    fields = [each for step in codec.steps for each in _objects_in(json.loads(step))]
    named = [text for each in fields for text in each.values() if isinstance(text, str)]
    for text in named:
        yield text[:LONGEST_PIECE]
        yield (text * _RUN)[:LONGEST_PIECE]
    for character in sorted(set("".join(named)))[:LONGEST_PIECE]:
        yield character * _RUN + "\0\n"
    yield from _TEXTS
    plane = [chr(code) for code in range(1 << 16) if not 0xD800 <= code < 0xE000]
    for first in range(0, len(plane), _CHARACTERS):
        yield "".join(plane[first : first + _CHARACTERS])


def _objects_in(value: Any) -> Iterator[dict[str, Any]]:
    """Yield the objects in a value of JSON: the steps in a step, and what they are told."""
    if isinstance(value, dict):
        yield value
    for each in value.values() if isinstance(value, dict) else value:
        if isinstance(each, dict | list):
            yield from _objects_in(each)


def _growth_of(step: dict[str, Any]) -> float:
    """Return how many times as long a text can be after a step that replaces; 1 for others."""
    match step:
        case {"type": "Replace", "pattern": {"String": str(pattern)}, "content": str(content)}:
            return max(1.0, len(content) / max(1, len(pattern)))
        case {"type": "Replace", "content": str(content)}:
            return max(1.0, len(content))
    return 1.0


def _head_of(files: TokenizerFiles) -> bytes:
    """Return a line of JSON with all of the files but their contents."""
    sizes = {name: len(content) for name, content in files.contents.items()}
    head = {"path": str(files.path), "kind": files.kind, "names": files.names, "sizes": sizes}
    head["settings"] = dataclasses.asdict(files.settings)
    return json.dumps(head).encode() + b"\n"


def _limit(kind: int, most: int) -> None:
    _, hard = resource.getrlimit(kind)
    if hard != resource.RLIM_INFINITY:
        most = min(most, hard)
    resource.setrlimit(kind, (most, hard))


def _unfit(files: TokenizerFiles, problem: str) -> UserError:
    return UserError(f"{files.path}: this tokenizer {problem}; it is not used")
