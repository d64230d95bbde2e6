"""Text to token ids and back: sentencepiece, GPT-2's two files, Hugging Face's tokenizer.json.

What holds for all of them: encode adds no token of its own, and the text of a control token
("<|endoftext|>") is ordinary text. There is no pad token, because batches are packed.
"""

import hashlib
import io
import itertools
import json
import os
from collections.abc import Callable, Iterable, Iterator, Sequence
from pathlib import Path
from typing import TypeVar

import sentencepiece
import tokenizers

from engine.errors import UserError
from engine.files import open_file, replacing

END_OF_TEXT = "<|endoftext|>"
_HF_END_OF_TEXT = (END_OF_TEXT, "<|end_of_text|>", "</s>", "<eos>")  # where no config names it
BATCH_CHARACTERS = 1 << 22  # work for a hundred cores, and a few hundred MB of ids
Piece = TypeVar("Piece", str, str | None)
_SPACE_MARK = "\u2581"  # sentencepiece writes a space as this character


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
    ) -> None:
        self.vocab_size = vocab_size
        self.eos_id = eos_id
        self._encode = encode
        self._decode = decode
        self._files = files

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
        """Return a sha256 of the tokenizer's files: equal exactly where all ids mean the same."""
        digest = hashlib.sha256()
        for name, content in sorted(self._files.items()):
            digest.update(f"{name} {len(content)} ".encode() + content)
        return digest.hexdigest()

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

    In a folder, tokenizer.json goes before encoder.json + vocab.bpe, and these before a .model.
    Raises UserError.
    """
    path = Path(path)
    if path.is_dir():
        return _load_folder(path)
    if path.name == "encoder.json" or path.suffix == ".bpe":
        return _load_gpt2(path.parent)
    if path.suffix == ".json":
        return _load_huggingface(path)
    return _load_sentencepiece(_read(path), path)


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
    return _load_sentencepiece(model.getvalue(), Path(path))


def _read(path: Path) -> bytes:
    with open_file(path) as stream:
        return stream.read()


def _load_folder(folder: Path) -> Tokenizer:
    if (folder / "tokenizer.json").exists():
        return _load_huggingface(folder / "tokenizer.json")
    if (folder / "encoder.json").exists():
        return _load_gpt2(folder)
    models = sorted(folder.glob("*.model"))
    if len(models) != 1:
        found = f"{len(models)} .model files" if models else "none of them"
        raise UserError(
            f"{folder} should hold a tokenizer.json, encoder.json + vocab.bpe, or one "
            f"sentencepiece .model file, and holds {found}"
        )
    return _load_sentencepiece(_read(models[0]), models[0])


def _load_sentencepiece(model: bytes, path: Path) -> Tokenizer:
    processor = sentencepiece.SentencePieceProcessor()
    try:
        processor.load_from_serialized_proto(model)
    except RuntimeError:
        raise UserError(f"{path} is not a sentencepiece model") from None
    if processor.eos_id() < 0:
        raise UserError(f"{path} has no end-of-text piece (eos); train it with one")
    mark_ids = [processor.piece_to_id(f"<0x{byte:02X}>") for byte in _SPACE_MARK.encode()]
    has_bytes = all(processor.is_byte(token) for token in mark_ids)

    def encode(texts: list[str]) -> list[list[int]]:
        # A space mark in the text itself would come back as a space; spelled in bytes it does not.
        parts_of_texts = [text.split(_SPACE_MARK) if has_bytes else [text] for text in texts]
        parts = list(itertools.chain.from_iterable(parts_of_texts))
        num_threads = os.cpu_count() if len(parts) > 1 else 1
        ids_of_parts = iter(processor.encode(parts, num_threads=num_threads))
        found = []
        for parts_of_text in parts_of_texts:
            ids = next(ids_of_parts)
            for _ in parts_of_text[1:]:
                ids += mark_ids + next(ids_of_parts)
            found.append(ids)
        return found

    return Tokenizer(
        vocab_size=processor.vocab_size(),
        eos_id=processor.eos_id(),
        encode=encode,
        decode=processor.decode,
        files={"tokenizer.model": model},
    )


def _load_gpt2(folder: Path) -> Tokenizer:
    paths = [folder / "encoder.json", folder / "vocab.bpe"]
    files = {path.name: _read(path) for path in paths}
    try:
        bpe = tokenizers.Tokenizer(tokenizers.models.BPE.from_file(*map(str, paths)))
    except Exception as error:  # the library raises no narrower type
        raise UserError(f"{folder}: encoder.json and vocab.bpe do not load: {error}") from None
    bpe.pre_tokenizer = tokenizers.pre_tokenizers.ByteLevel(add_prefix_space=False)
    bpe.decoder = tokenizers.decoders.ByteLevel()
    if bpe.token_to_id(END_OF_TEXT) is None:
        raise UserError(f"{paths[0]} has no {END_OF_TEXT}")
    return _wrap(bpe, END_OF_TEXT, files)


def _load_huggingface(path: Path) -> Tokenizer:
    content = _read(path)
    try:
        model = tokenizers.Tokenizer.from_str(content.decode())
    except Exception as error:  # the library raises no narrower type
        raise UserError(f"{path} is not a tokenizer.json that can be read: {error}") from None
    model.no_truncation()
    model.no_padding()
    eos = _huggingface_end_of_text(path, model)
    config = json.dumps({"eos_token": eos}).encode()
    return _wrap(model, eos, {"tokenizer.json": content, "tokenizer_config.json": config})


def _huggingface_end_of_text(path: Path, tokenizer: tokenizers.Tokenizer) -> str:
    """Return the text of the end-of-text token, which tokenizer.json itself does not name."""
    candidates: Sequence[str] = _HF_END_OF_TEXT
    config_path = path.with_name("tokenizer_config.json")
    if config_path.exists():
        named = json.loads(_read(config_path)).get("eos_token")
        named = named.get("content") if isinstance(named, dict) else named
        candidates = [named] if isinstance(named, str) else candidates
    for candidate in candidates:
        if tokenizer.token_to_id(candidate) is not None:
            return candidate
    raise UserError(
        f"{path} has no end-of-text token ({', '.join(candidates)}); "
        f'name it in {config_path.name} as {{"eos_token": ...}}'
    )


def _wrap(model: tokenizers.Tokenizer, eos: str, files: dict[str, bytes]) -> Tokenizer:
    model.add_special_tokens([eos])  # already in the vocabulary; now also known as a control token
    model.encode_special_tokens = True  # their text is ordinary text

    def encode(texts: list[str]) -> list[list[int]]:
        if len(texts) == 1:  # starts no threads
            return [model.encode(texts[0], add_special_tokens=False).ids]
        return [found.ids for found in model.encode_batch(texts, add_special_tokens=False)]

    def decode(ids: list[int]) -> str:
        return model.decode(ids, skip_special_tokens=True)

    vocabulary = model.get_vocab(with_added_tokens=True)
    return Tokenizer(
        vocab_size=max(vocabulary.values()) + 1,
        eos_id=vocabulary[eos],
        encode=encode,
        decode=decode,
        files=files,
    )
