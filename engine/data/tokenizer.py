"""Text to token ids and back: sentencepiece, GPT-2's two files, Hugging Face's tokenizer.json.

What holds for all of them: encode adds no token of its own, and the text of a control token
("<|endoftext|>") is ordinary text. There is no pad token, because batches are packed.
"""

import hashlib
import io
from collections.abc import Callable, Iterable, Iterator, Sequence
from pathlib import Path
from typing import TypeVar

import sentencepiece

from engine.data.codecs import END_OF_TEXT, open_codec
from engine.data.tokenizer_files import TokenizerFiles, read_tokenizer_files
from engine.data.tokenizer_trial import try_tokenizer
from engine.errors import UserError
from engine.files import replacing

BATCH_CHARACTERS = 1 << 22  # work for a hundred cores, and a few hundred MB of ids
Piece = TypeVar("Piece", str, str | None)


class Tokenizer:
    """A fixed vocabulary; made by load_tokenizer or train_sentencepiece."""

    vocab_size: int
    """Number of ids; every id is below it."""
    eos_id: int
    """The end of text, which closes responses and documents: a control token."""

    def __init__(
        self,
        *,
        vocab_size: int,
        eos_id: int,
        encode: Callable[[list[str]], list[list[int]]],
        decode: Callable[[list[int]], str],
        files: dict[str, bytes],
        meaning: Callable[[], bytes] | None = None,
    ) -> None:
        self.vocab_size = vocab_size
        self.eos_id = eos_id
        self._encode = encode
        self._decode = decode
        self._files = files
        self._meaning = meaning

    def encode(self, text: str) -> list[int]:
        """Return the ids of `text`, none of them a control token."""
        return self._encode([text])[0]

    def encode_all(self, texts: Iterable[str]) -> Iterator[list[int]]:
        """Yield the ids of each text as encode returns them, many texts at once on all cores of the
        machine."""
        for batch in in_batches(texts):
            yield from self._encode(batch)

    def decode(self, ids: Sequence[int]) -> str:
        """Return the text of `ids` without control tokens; broken UTF-8 becomes U+FFFD."""
        return self._decode([int(token) for token in ids])

    def fingerprint(self) -> str:
        """Return a sha256 of the tokenizer's files, which is equal only where all ids mean the
        same; is_same_as() looks past how a file is laid out."""
        digest = hashlib.sha256()
        for name, content in sorted(self._files.items()):
            digest.update(f"{name} {len(content)} ".encode() + content)
        return digest.hexdigest()

    def is_same_as(self, other: "Tokenizer") -> bool:
        """Return whether two tokenizers mean the same: also where a JSON file of one has other
        spaces, another order of keys, or an older way to write merges."""
        if self.fingerprint() == other.fingerprint():
            return True
        if self._meaning is None or other._meaning is None or self.eos_id != other.eos_id:
            return False
        return self._meaning() == other._meaning()

    def save(self, directory: Path | str) -> None:
        """Write the files from which load_tokenizer(directory) makes the same tokenizer."""
        for name, content in self._files.items():
            with replacing(Path(directory) / name) as stream:
                stream.write(content)


def in_batches(pieces: Iterable[Piece]) -> Iterator[list[Piece]]:
    """Yield the pieces in lists that are worth encoding at once; None has no characters."""
    batch: list[Piece] = []
    num_characters = 0
    for piece in pieces:
        batch.append(piece)
        num_characters += len(piece or "")
        if num_characters >= BATCH_CHARACTERS:
            yield batch
            batch, num_characters = [], 0
    yield batch


def load_tokenizer(path: Path | str) -> Tokenizer:
    """Load a sentencepiece model, tokenizer.json, GPT-2's two files or a folder with one of these.

    In a folder, tokenizer.json goes before GPT-2's two, and these before a .model. It is tried in a
    process of its own before it is used. Raises UserError.
    """
    files = read_tokenizer_files(Path(path))
    try_tokenizer(files)
    return make_tokenizer(files)


def make_tokenizer(files: TokenizerFiles) -> Tokenizer:
    """Make a tokenizer of files that have been tried, or that are our own; raises UserError."""
    codec = open_codec(files)
    return Tokenizer(
        vocab_size=codec.vocab_size,
        eos_id=codec.eos_id,
        encode=codec.encode,
        decode=codec.decode,
        files=codec.files,
        meaning=codec.meaning,
    )


def train_sentencepiece(texts: Iterable[str], path: Path | str, *, vocab_size: int) -> Tokenizer:
    """Train byte pairs with byte fallback on `texts`, write the model to `path` and return it.

    decode(encode(text)) == text for every text: nothing is normalised and no whitespace is dropped.
    The same texts give the same file. Raises UserError when `vocab_size` does not fit the texts.
    """
    model = io.BytesIO()
    try:
        sentencepiece.SentencePieceTrainer.train(
            sentence_iterator=iter(texts),
            model_writer=model,
            model_type="bpe",
            vocab_size=vocab_size,
            byte_fallback=True,
            character_coverage=0.9995,  # the rarest characters are spelled in bytes
            normalization_rule_name="identity",
            remove_extra_whitespaces=False,
            add_dummy_prefix=False,
            max_sentence_length=1 << 30,  # a longer text would be left out without a word
            unk_id=0,
            eos_id=1,
            bos_id=-1,
            pad_id=-1,
            eos_piece=END_OF_TEXT,
            num_threads=1,
            minloglevel=2,
        )
    except RuntimeError as error:
        reason = str(error).rsplit("] ", 1)[-1].split(" --", 1)[0] or "there is no text"
        raise UserError(
            f"vocab_size {vocab_size} does not fit the training text: {reason}"
        ) from None
    with replacing(Path(path)) as stream:
        stream.write(model.getvalue())
    contents = {"tokenizer.model": model.getvalue()}
    return make_tokenizer(TokenizerFiles(path=Path(path), kind="sentencepiece", contents=contents))
