"""Encoding and decoding by the bytes of a tokenizer's files: what the libraries make of them.

Their faults, whatever the form, become a UserError of one line: an exception of no class of its
own, a RuntimeError, a panic in Rust. What they do without end is tokenizer_trial's to find.
"""

import contextlib
import itertools
import json
import os
from collections.abc import Callable, Collection, Iterator, Mapping, Sequence
from dataclasses import dataclass, field
from pathlib import Path

import sentencepiece
import tokenizers

from engine.data.tokenizer_files import TokenizerFiles
from engine.errors import UserError

END_OF_TEXT = "<|endoftext|>"
LONGEST_PIECE = 4096  # characters; our choice: the longest in use are some hundreds of spaces
_HF_END_OF_TEXT = (END_OF_TEXT, "<|end_of_text|>", "</s>", "<eos>")  # where no config names it
_SPACE_MARK = "\u2581"  # sentencepiece writes a space as this character
_MOST_SHOWN = 60  # characters of a text from a file in an error; our choice
_MAX_REASON = 200  # characters of a library's own message; our choice


@dataclass(frozen=True, kw_only=True)
class Codec:
    """A tokenizer that a library has made."""

    vocab_size: int
    eos_id: int
    encode: Callable[[list[str]], list[list[int]]]
    """Texts to ids, no control token among them; raises UserError."""
    decode: Callable[[list[int]], str]
    """Ids to text, control tokens left out; raises UserError."""
    normalize: Callable[[str], str]
    """What encode makes of a text before it looks for pieces."""
    steps: Sequence[str] = field(default=())
    """What its file says to do beside looking for pieces, as JSON."""
    meaning: Callable[[], bytes]
    """What the library has understood: the same however its file is laid out."""
    files: dict[str, bytes]
    """From which the same can be made again, by their names."""


def open_codec(files: TokenizerFiles, *, num_threads: int | None = None) -> Codec:
    """Return the codec of these files; raises UserError, naming the file.

    num_threads: for several texts of sentencepiece; all cores by default.
    """
    if files.kind == "sentencepiece":
        return _open_sentencepiece(files, num_threads or os.cpu_count() or 1)
    return _open_gpt2(files) if files.kind == "gpt2" else _open_huggingface(files)


def _open_sentencepiece(files: TokenizerFiles, num_threads: int) -> Codec:
    (model,) = files.contents.values()
    processor = sentencepiece.SentencePieceProcessor()
    with _one_line(files.path, "is not a sentencepiece model"):
        processor.load_from_serialized_proto(model)
        pieces = [processor.id_to_piece(token) for token in range(processor.vocab_size())]
    if processor.eos_id() < 0:
        raise UserError(f"{files.path} has no end-of-text piece (eos); train it with one")
    _check_vocabulary(files.path, pieces, range(len(pieces)))
    mark_ids = [processor.piece_to_id(f"<0x{byte:02X}>") for byte in _SPACE_MARK.encode()]
    has_bytes = all(processor.is_byte(token) for token in mark_ids)

    def encode(texts: list[str]) -> list[list[int]]:
        # A space mark in the text itself would come back as a space; spelled in bytes it does not.
        parts_of_texts = [text.split(_SPACE_MARK) if has_bytes else [text] for text in texts]
        parts = list(itertools.chain.from_iterable(parts_of_texts))
        with _one_line(files.path, "does not encode a text"):
            found_parts = processor.encode(parts, num_threads=num_threads if len(parts) > 1 else 1)
        ids_of_parts = iter(found_parts)
        found = []
        for parts_of_text in parts_of_texts:
            ids = next(ids_of_parts)
            for _ in parts_of_text[1:]:
                ids += mark_ids + next(ids_of_parts)
            found.append(ids)
        return found

    def decode(ids: list[int]) -> str:
        with _one_line(files.path, "does not decode"):
            return processor.decode(ids)

    def normalize(text: str) -> str:
        with _one_line(files.path, "does not normalize a text"):
            return processor.normalize(text)

    return Codec(
        vocab_size=processor.vocab_size(),
        eos_id=processor.eos_id(),
        encode=encode,
        decode=decode,
        normalize=normalize,
        meaning=lambda: model,
        files={"tokenizer.model": model},
    )


def _open_gpt2(files: TokenizerFiles) -> Codec:
    encoder, merges = files.contents["encoder.json"], files.contents["vocab.bpe"]
    with _one_line(files.path, "encoder.json and vocab.bpe do not load"):
        vocabulary = json.loads(encoder)
        lines = merges.decode().replace("\r\n", "\n").split("\n")
        if not isinstance(vocabulary, dict):
            raise ValueError(f"a {type(vocabulary).__name__} where an object should be")
        pairs = [line.split(" ") for line in lines if line and not line.startswith("#version")]
        bpe = tokenizers.Tokenizer(tokenizers.models.BPE(vocabulary, [(a, b) for a, b in pairs]))
    bpe.pre_tokenizer = tokenizers.pre_tokenizers.ByteLevel(add_prefix_space=False)
    bpe.decoder = tokenizers.decoders.ByteLevel()
    if bpe.token_to_id(END_OF_TEXT) is None:
        raise UserError(f"{files.path}: encoder.json has no {END_OF_TEXT}")
    return _wrap(bpe, END_OF_TEXT, files.path, dict(files.contents))


def _open_huggingface(files: TokenizerFiles) -> Codec:
    content = files.contents["tokenizer.json"]
    with _one_line(files.path, "is not a tokenizer.json that can be read"):
        model = tokenizers.Tokenizer.from_str(content.decode())
        model.no_truncation()
        model.no_padding()
    eos = _end_of_text(files, model)
    config = json.dumps({"eos_token": eos}).encode()
    kept = {"tokenizer.json": content, "tokenizer_config.json": config}
    return _wrap(model, eos, files.path, kept)


def _end_of_text(files: TokenizerFiles, model: tokenizers.Tokenizer) -> str:
    """Return the text of the end-of-text token, which tokenizer.json itself does not name."""
    candidates = _HF_END_OF_TEXT if files.end_of_text is None else (files.end_of_text,)
    for candidate in candidates:
        if model.token_to_id(candidate) is not None:
            return candidate
    shown = ", ".join(f"{candidate:.{_MOST_SHOWN}}" for candidate in candidates)
    raise UserError(
        f"{files.path} has no end-of-text token ({shown}); "
        'name it in tokenizer_config.json as {"eos_token": ...}'
    )


def _wrap(model: tokenizers.Tokenizer, eos: str, path: Path, files: dict[str, bytes]) -> Codec:
    with _one_line(path, "does not take its end-of-text token"):
        model.add_special_tokens([eos])  # in the vocabulary; now also known as a control token
        model.encode_special_tokens = True  # their text is ordinary text
        vocabulary: Mapping[str, int] = model.get_vocab(with_added_tokens=True)
    _check_vocabulary(path, vocabulary.keys(), vocabulary.values())

    def encode(texts: list[str]) -> list[list[int]]:
        with _one_line(path, "does not encode a text"):
            if len(texts) == 1:  # starts no threads
                return [model.encode(texts[0], add_special_tokens=False).ids]
            return [found.ids for found in model.encode_batch(texts, add_special_tokens=False)]

    def decode(ids: list[int]) -> str:
        with _one_line(path, "does not decode"):
            return model.decode(ids, skip_special_tokens=True)

    def normalize(text: str) -> str:
        with _one_line(path, "does not normalize a text"):
            return text if model.normalizer is None else model.normalizer.normalize_str(text)

    def meaning() -> bytes:
        with _one_line(path, "cannot be written"):
            return model.to_str().encode()

    parts = (model.normalizer, model.pre_tokenizer, model.post_processor, model.decoder)
    return Codec(
        vocab_size=max(vocabulary.values()) + 1,
        eos_id=vocabulary[eos],
        encode=encode,
        decode=decode,
        normalize=normalize,
        steps=[part.__getstate__().decode() for part in parts if part is not None],
        meaning=meaning,
        files=files,
    )


def _check_vocabulary(path: Path, pieces: Collection[str], ids: Collection[int]) -> None:
    """Raise UserError for a vocabulary that would make a network of any size, or that two pieces
    share an id of."""
    for piece in pieces:
        if len(piece) > LONGEST_PIECE:
            shown = f"{piece!r:.{_MOST_SHOWN}}"
            raise UserError(
                f"{path}: {shown} is a piece of {len(piece)} characters; "
                f"{LONGEST_PIECE} are the most"
            )
    if len(set(ids)) < len(ids):
        raise UserError(f"{path}: {len(ids)} pieces have {len(set(ids))} ids; each needs its own")
    if max(ids) >= 2 * len(ids):
        raise UserError(f"{path}: an id of {max(ids)} among {len(ids)} pieces leaves most unused")


@contextlib.contextmanager
def _one_line(path: Path, problem: str) -> Iterator[None]:
    """Raise a library's exception or panic as a UserError."""
    try:
        yield
    except BaseException as error:
        # The libraries raise no narrower type, and pyo3's panic is in no module.
        if not isinstance(error, Exception) and type(error).__name__ != "PanicException":
            raise
        reason = str(error).split("\n", 1)[0].strip()[:_MAX_REASON] or type(error).__name__
        raise UserError(f"{path} {problem}: {reason}") from None
