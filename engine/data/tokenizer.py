"""Text to token ids and back: sentencepiece, GPT-2's two files, Hugging Face's tokenizer.json.

What holds for all of them: encode adds no token of its own, and the text of a control token
("<|endoftext|>") is ordinary text. What begins a text is put by whoever makes a sequence of it.
There is no pad token, because batches are packed.
"""

import hashlib
import io
import json
from collections.abc import Iterable, Iterator, Mapping, Sequence
from pathlib import Path
from typing import Any, TypeVar

import sentencepiece

from engine.data.codecs import Codec, Control, open_codec
from engine.data.end_of_text import END_OF_TEXT
from engine.data.tokenizer_files import TokenizerFiles, read_tokenizer_files
from engine.data.tokenizer_likeness import read_alike
from engine.data.tokenizer_trial import try_tokenizer
from engine.errors import UserError
from engine.files import replacing

_SPACE_MARK = "\u2581"  # sentencepiece writes a space as this character
BATCH_CHARACTERS = 1 << 22  # work for a hundred cores, and a few hundred MB of ids
Piece = TypeVar("Piece", str, str | tuple[int, ...])


class Tokenizer:
    """A fixed vocabulary; made by load_tokenizer or train_sentencepiece."""

    vocab_size: int
    """One more than the largest id."""
    eos_id: int
    """The end of text, which closes responses and documents: a control token."""
    bos_ids: tuple[int, ...]
    """What its files put before every text, mostly nothing or one token: control tokens that
    begin each sequence and document; see beginning_of_text."""
    also_stops: tuple[int, ...]
    """Other tokens at which a model of this tokenizer stops; see end_of_text."""

    eos_text: str
    """What its files call the end of text."""
    bos_text: str
    """What its files call the tokens that begin a text, with a space between two."""
    notes: tuple[str, ...]
    """What a user should know of its files."""
    path: Path
    """The file or folder that it was loaded from, for errors."""

    def __init__(self, codec: Codec, path: Path, beside: Mapping[str, Mapping[str, Any]]) -> None:
        """beside: what is kept of the JSON files beside it and not used here, by their names."""
        self.vocab_size = codec.vocab_size
        self.eos_id = codec.eos_id
        self.also_stops = tuple(codec.also_stops)
        self.eos_text = codec.eos_text
        self.bos_ids = tuple(codec.bos_ids)
        self.bos_text = codec.bos_text
        self.notes = tuple(codec.notes)
        self.path = path
        self._codec = codec
        self._beside = beside
        self._num_drawn = codec.vocab_size

    def encode(self, text: str) -> list[int]:
        """Return the ids of `text`, none of them a control token."""
        return self._codec.encode([text])[0]

    def encode_all(self, texts: Iterable[str]) -> Iterator[list[int]]:
        """Yield the ids of each text as encode returns them, many texts at once on all cores of the
        machine."""
        for batch in in_batches(texts):
            yield from self._codec.encode(batch)

    def read_control(self, text: str) -> tuple[list[int], list[Control]]:
        """Return the ids of a text, in which the texts of control tokens become these, and where
        they are: of a text that nobody else has written. Raises UserError for a sentencepiece
        model, which cannot."""
        if self._codec.read_control is None:
            raise UserError(
                f"{self.path}: a sentencepiece model makes no control token of a text; a chat "
                "template wants a tokenizer.json beside it"
            )
        return self._codec.read_control(text)

    def decode(self, ids: Sequence[int]) -> str:
        """Return the text of `ids` without control tokens, and without ids that are no token's;
        broken UTF-8 becomes U+FFFD."""
        known = (int(token) for token in ids)
        return self._codec.decode([token for token in known if 0 <= token < self.vocab_size])

    def absent_ids(self, num_ids: int) -> tuple[int, ...]:
        """Return which of a model's ids are no token, or not to be drawn: a response is never to
        have them."""
        inside = (token for token in self._codec.missing_ids if token < num_ids)
        return (*inside, *range(min(self.vocab_size, self._num_drawn), num_ids))

    def draw_below(self, num_ids: int) -> None:
        """From now on count ids from num_ids on as absent: a network that reads responses has no
        row for them. check_fits says whether that leaves what texts become."""
        self._num_drawn = min(self._num_drawn, num_ids)

    def check_fits(self, num_ids: int) -> None:
        """Raise UserError where a model of so many ids lacks one that a text may become, or that
        ends one. Added control tokens, as for padding, may be beyond it: no text has them here."""
        if self._codec.num_text_ids > num_ids:
            raise UserError(
                f"{self.path}: the tokenizer has {self.vocab_size} ids, the model {num_ids}: give "
                "the tokenizer of this model, or a model whose embedding was resized to it"
            )

    def kept(self, name: str) -> dict[str, Any]:
        """Return what is kept of a JSON file that was beside the tokenizer."""
        return dict(self._beside.get(name, {}))

    def sentencepiece_model(self) -> bytes | None:
        """Return the sentencepiece model that this tokenizer is; None for another."""
        return self._codec.files.get("tokenizer.model")

    def added_tokens(self) -> dict[str, int]:
        """Return the ids of control tokens that were added to a sentencepiece model, by text."""
        return dict(json.loads(self._codec.files.get("added_tokens.json", b"{}")))

    def fingerprint(self) -> str:
        """Return a sha256 of the tokenizer's files and of what begins a text, which is equal only
        where all ids mean the same; is_same_as() looks past how a file is laid out."""
        digest = hashlib.sha256(f"bos {self.bos_ids} ".encode() if self.bos_ids else b"")
        for name, content in sorted(self._codec.files.items()):
            digest.update(f"{name} {len(content)} ".encode() + content)
        return digest.hexdigest()

    def is_same_as(self, other: "Tokenizer") -> bool:
        """Return whether two tokenizers mean the same: also where a JSON file of one has other
        spaces, another order of keys, or an older way to write merges."""
        if self.fingerprint() == other.fingerprint():
            return True
        if (self.eos_id, self.bos_ids) != (other.eos_id, other.bos_ids):
            return False
        return self._codec.meaning() == other._codec.meaning()

    def reads_as(self, other: "Tokenizer") -> bool:
        """Return whether two tokenizers make the same ids of every text and end it alike: also
        where one has control tokens, as for padding, that the other lacks."""
        if self.is_same_as(other):
            return True
        if (self.eos_id, self.bos_ids) != (other.eos_id, other.bos_ids):
            return False
        return read_alike(self._codec.meaning(), other._codec.meaning())

    def save(self, directory: Path | str) -> None:
        """Write the files from which load_tokenizer(directory) makes the same tokenizer, with what
        is kept beside it."""
        contents = dict(self._codec.files)
        for name, kept in self._beside.items():
            own = json.loads(contents.get(name, b"{}"))
            if kept.keys() - own.keys():
                contents[name] = (json.dumps({**kept, **own}, indent=2) + "\n").encode()
        for name, content in contents.items():
            with replacing(Path(directory) / name) as stream:
                stream.write(content)


def in_batches(pieces: Iterable[Piece]) -> Iterator[list[Piece]]:
    """Yield the pieces, texts and ids among them, in lists that are worth encoding at once."""
    batch: list[Piece] = []
    num_characters = 0
    for piece in pieces:
        batch.append(piece)
        num_characters += len(piece) if isinstance(piece, str) else 0
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
    settings = files.settings
    generation = dict(settings.generation)
    # As it was found, which may be by config.json: a run has none to say so, or which ids to pass.
    if codec.also_stops:
        generation["eos_token_id"] = [codec.eos_id, *codec.also_stops]
    elif "eos_token_id" in generation:
        generation["eos_token_id"] = codec.eos_id
    beside = {"tokenizer_config.json": settings.tokenizer, "generation_config.json": generation}
    return Tokenizer(codec, files.path, beside)


def train_sentencepiece(
    texts: Iterable[str], path: Path | str, *, vocab_size: int, with_space: bool = False
) -> Tokenizer:
    """Train byte pairs with byte fallback on `texts`, write the model to `path` and return it.

    decode(encode(text)) == text for every text: nothing is normalised and no whitespace is dropped.
    That wants a space among the texts' characters; with_space: whether they have one or not. The
    same texts give the same file. Raises UserError when `vocab_size` does not fit the texts.
    """
    model = io.BytesIO()
    # Unless it is wanted it is not named: the option stands in the file, which others may have.
    required: dict[str, Any] = {"required_chars": _SPACE_MARK} if with_space else {}
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
            **required,
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
