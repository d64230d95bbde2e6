"""Settings of a tokenizer's training. Imports neither torch nor megatron."""

from dataclasses import dataclass
from pathlib import Path
from typing import Literal

from engine.settings.checks import check_numbers


@dataclass(frozen=True, kw_only=True)
class TokenizerConfig:
    """One training of a tokenizer."""

    files: tuple[Path, ...] = ()
    """The files that the stages will read: demonstrations, comparisons, prompts, pretraining text,
    .txt or any container of rows, or folders (recipes/DATA.md). All that the stages read of them is
    used."""
    fields: str = "auto"
    """Which fields are read, and as what: auto, by each record's fields; a shape's name
    (recipes/DATA.md); or OURS=THEIRS,..., as prompt=question,text=body. It is for the records that
    have such fields; the others are read as by auto."""
    out: Path = Path("runs/tokenizer")
    """The folder to make; --tokenizer of a stage takes it."""
    vocab_size: int | None = None
    """Entries of the vocabulary, at least the 256 bytes, the end of text and, of sentencepiece, the
    characters of the text. None: one to a kilobyte of text, from 512 to 32,000, or as many as the
    text gives or its characters want. Our choice; GPT-3 has 50,257."""
    kind: Literal["sentencepiece", "byte_level"] = "sentencepiece"
    """sentencepiece: byte pairs over characters, rare ones spelled in bytes; byte_level: over
    bytes, as GPT-2's, in a tokenizer.json."""
    max_megabytes: float = 500.0
    """Of text, in equal parts of the files: training holds it in memory several times. Our
    choice."""
    skip_bad_lines: bool = False
    """Count and report bad lines instead of stopping at the first."""

    def __post_init__(self) -> None:
        check_numbers(self, counts="vocab_size", positive="max_megabytes")
