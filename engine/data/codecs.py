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

from engine.data.beginning_of_text import (
    Around,
    check_reader,
    named_beginning,
    notes,
    put_around,
    put_before,
)
from engine.data.end_of_text import END_OF_TEXT, EndOfText, find_end
from engine.data.tokenizer_files import TokenizerFiles
from engine.errors import UserError

LONGEST_PIECE = 4096  # characters; our choice: the longest in use are some hundreds of spaces
_SPACE_MARK = "\u2581"  # sentencepiece writes a space as this character
_MOST_SHOWN = 60  # characters of a text from a file in an error; our choice
_MAX_REASON = 200  # characters of a library's own message; our choice

Control = tuple[int, int, int]
"""A control token in a text: its first character, the one behind its last, and its id."""


@dataclass(frozen=True, kw_only=True)
class Codec:
    """A tokenizer that a library has made."""

    vocab_size: int
    """One more than the largest id."""
    missing_ids: Sequence[int] = ()
    """Ids below that no token has."""
    num_text_ids: int
    """One more than the largest id that a text may become, or that ends one."""
    eos_id: int
    eos_text: str
    also_stops: Sequence[int] = ()
    """Other tokens that stop a response; see end_of_text."""
    bos_ids: Sequence[int] = ()
    """Control tokens that begin a text; see beginning_of_text. encode does not put them."""
    bos_text: str = ""
    """The texts of these, with a space between two."""
    notes: Sequence[str] = ()
    """What a user should know of the files."""
    encode: Callable[[list[str]], list[list[int]]]
    """Texts to ids, no control token among them; raises UserError."""
    read_control: Callable[[str], tuple[list[int], list[Control]]] | None = None
    """A text to ids, those of control tokens for their texts, and where these are; None where the
    library cannot."""
    decode: Callable[[list[int]], str]
    """Ids to text, control tokens left out; raises UserError."""
    normalize: Callable[[str], str]
    """What encode makes of a text before it looks for pieces."""
    steps: Sequence[str] = field(default=())
    """What its file says to do beside looking for pieces, as JSON."""
    meaning: Callable[[], bytes]
    """What the library has understood: the same however its file is laid out."""
    files: dict[str, bytes]
    """From which the same can be made again, by their names: nothing else is in them."""


def open_codec(files: TokenizerFiles, *, num_threads: int | None = None) -> Codec:
    """Return the codec of these files; raises UserError, naming the file.

    num_threads: for several texts of sentencepiece; all cores by default.
    """
    if files.kind == "sentencepiece":
        return _open_sentencepiece(files, num_threads or os.cpu_count() or 1)
    return _open_gpt2(files) if files.kind == "gpt2" else _open_huggingface(files)


def _open_sentencepiece(files: TokenizerFiles, num_threads: int) -> Codec:
    (model,) = files.contents.values()
    path, processor = files.path, sentencepiece.SentencePieceProcessor()
    with _one_line(path, "is not a sentencepiece model"):
        processor.load_from_serialized_proto(model)
        pieces = [processor.id_to_piece(token) for token in range(processor.vocab_size())]
    _check_vocabulary(path, pieces, range(len(pieces)))
    ids = {piece: number for number, piece in enumerate(pieces)}
    added = _added_to(ids, files)
    for text in sorted(added.keys() - set(files.settings.special)):
        raise UserError(
            f"{path}: the added token {text!r:.{_MOST_SHOWN}} is not special, and texts with it "
            "are not read so without a tokenizer.json; save one beside it"
        )
    _check_vocabulary(path, ids.keys(), ids.values())
    own = pieces[processor.eos_id()] if processor.eos_id() >= 0 else None
    if own is None and files.settings.end_of_text is None and not files.settings.model_ends:
        raise UserError(f"{path} has no end-of-text piece (eos); train it with one")
    end = find_end(files.settings, ids, path, own)
    own_bos = pieces[processor.bos_id()] if processor.bos_id() >= 0 else None
    bos = named_beginning(files.settings, ids, path, path.parent, own_bos)
    bos_ids = () if bos is None else (ids[bos],)

    def decode(ids: list[int]) -> str:
        with _one_line(path, "does not decode"):
            return processor.decode([token for token in ids if token < len(pieces)])

    def normalize(text: str) -> str:
        with _one_line(path, "does not normalize a text"):
            return processor.normalize(text)

    kept = {"tokenizer.model": model}
    if added:
        special = {"additional_special_tokens": sorted(added)}
        kept["added_tokens.json"] = json.dumps(added).encode()
        kept["special_tokens_map.json"] = json.dumps(special).encode()
    vocab_size = max(ids.values()) + 1
    return Codec(
        vocab_size=vocab_size,
        missing_ids=sorted(set(range(vocab_size)) - set(ids.values())),
        num_text_ids=max(len(pieces), *(number + 1 for number in (end.id, *bos_ids))),
        eos_id=end.id,
        eos_text=end.text,
        also_stops=end.also_stops,
        bos_ids=bos_ids,
        bos_text=bos or "",
        encode=_sentencepiece_encoder(processor, path, num_threads),
        decode=decode,
        normalize=normalize,
        meaning=lambda: json.dumps([model.hex(), added]).encode(),
        files=kept if end.text == own else kept | _naming(end),
    )


def _sentencepiece_encoder(
    processor: sentencepiece.SentencePieceProcessor, path: Path, num_threads: int
) -> Callable[[list[str]], list[list[int]]]:
    """Return what encodes texts. Where nothing else of a text is lost, its space marks are not
    either: they would come back as spaces, and are spelled in bytes."""
    mark_ids = [processor.piece_to_id(f"<0x{byte:02X}>") for byte in _SPACE_MARK.encode()]
    is_lossless = processor.normalize("  a ") == "  a ".replace(" ", _SPACE_MARK)
    spells_marks = is_lossless and all(processor.is_byte(token) for token in mark_ids)

    def encode(texts: list[str]) -> list[list[int]]:
        parts_of_texts = [text.split(_SPACE_MARK) if spells_marks else [text] for text in texts]
        parts = list(itertools.chain.from_iterable(parts_of_texts))
        with _one_line(path, "does not encode a text"):
            found_parts = processor.encode(parts, num_threads=num_threads if len(parts) > 1 else 1)
        ids_of_parts = iter(found_parts)
        found = []
        for parts_of_text in parts_of_texts:
            ids = next(ids_of_parts)
            for _ in parts_of_text[1:]:
                ids += mark_ids + next(ids_of_parts)
            found.append(ids)
        return found

    return encode


def _open_gpt2(files: TokenizerFiles) -> Codec:
    encoder, merges = files.contents["encoder.json"], files.contents["vocab.bpe"]
    names = files.names or ("encoder.json", "vocab.bpe")
    with _one_line(files.path, f"{names[0]} and {names[1]} do not load"):
        vocabulary = json.loads(encoder)
        lines = merges.decode().replace("\r\n", "\n").split("\n")
        if not isinstance(vocabulary, dict):
            raise ValueError(f"a {type(vocabulary).__name__} where an object should be")
        pairs = [line.split(" ") for line in lines if line and not line.startswith("#version")]
        bpe = tokenizers.Tokenizer(tokenizers.models.BPE(vocabulary, [(a, b) for a, b in pairs]))
    bpe.pre_tokenizer = tokenizers.pre_tokenizers.ByteLevel(add_prefix_space=False)
    bpe.decoder = tokenizers.decoders.ByteLevel()
    return _wrap(bpe, files, dict(files.contents))


def _open_huggingface(files: TokenizerFiles) -> Codec:
    content = files.contents["tokenizer.json"]
    with _one_line(files.path, "is not a tokenizer.json that can be read"):
        model = tokenizers.Tokenizer.from_str(content.decode())
        model.no_truncation()
        model.no_padding()
    return _wrap(model, files, {"tokenizer.json": content})


def _added_to(ids: dict[str, int], files: TokenizerFiles) -> dict[str, int]:
    """Put the added tokens that the folder lists into a vocabulary, and return those that it
    lacked; raises UserError where another file has another id for one, or the id for another."""
    texts = {number: text for text, number in ids.items()}
    added = {}
    for text, number in sorted(files.settings.added.items(), key=lambda item: item[1]):
        if ids.get(text, number) != number or texts.get(number, text) != text:
            there = f"{texts.get(number)!r:.{_MOST_SHOWN}} there"
            has = f"the id {ids[text]}" if text in ids else there
            raise UserError(
                f"{files.path.parent if files.path.suffix else files.path}: "
                f"{text!r:.{_MOST_SHOWN}} is an added token with the id {number}, and "
                f"{files.path.name} has {has}: correct one of them"
            )
        if text not in ids:
            added[text] = ids[text] = number
            texts[number] = text
    return added


def _add_tokens(model: tokenizers.Tokenizer, files: TokenizerFiles) -> bool:
    """Add the tokens that the folder lists and the tokenizer lacks; return whether there are any.
    Raises UserError where they do not get the ids that are listed."""
    added = _added_to(dict(model.get_vocab(with_added_tokens=True)), files)
    for text, number in added.items():
        is_special = text in files.settings.special
        token = tokenizers.AddedToken(text, special=is_special, normalized=not is_special)
        model.add_special_tokens([token]) if is_special else model.add_tokens([token])
        if model.token_to_id(text) != number:
            raise UserError(
                f"{files.path}: the added token {text!r:.{_MOST_SHOWN}} should have the id "
                f"{number} and gets {model.token_to_id(text)}: there is a gap before it"
            )
    return bool(added)


def _know_control(
    model: tokenizers.Tokenizer, files: TokenizerFiles, end: EndOfText
) -> tuple[Around, set[int]]:
    """Have the library know what begins and ends a text as control tokens, and the texts of these
    as ordinary text; return what it puts around a text, and the ids of all control tokens."""
    around = put_around(model, files.path)
    if files.kind == "huggingface":
        check_reader(files.settings, files.path, around)
    model.add_special_tokens([end.text, *(text for _, text in around.before)])
    model.encode_special_tokens = True
    return around, {i for i, t in model.get_added_tokens_decoder().items() if t.special}


def _naming(end: EndOfText) -> dict[str, bytes]:
    return {"tokenizer_config.json": json.dumps({"eos_token": end.text}).encode()}


def _wrap(model: tokenizers.Tokenizer, files: TokenizerFiles, kept: dict[str, bytes]) -> Codec:
    path = files.path
    with _one_line(path, "does not take its added tokens"):
        has_grown = _add_tokens(model, files)
        vocabulary: Mapping[str, int] = model.get_vocab(with_added_tokens=True)
        if files.kind == "gpt2" and (
            bos := named_beginning(files.settings, vocabulary, path, folder=path)
        ):
            put_before(model, bos, vocabulary[bos])
    if has_grown:
        kept = {"tokenizer.json": model.to_str().encode()}
    _check_vocabulary(path, vocabulary.keys(), vocabulary.values())
    end = find_end(files.settings, vocabulary, path)
    if "tokenizer.json" in kept or end.text != END_OF_TEXT:
        kept |= _naming(end)
    with _one_line(path, "does not take the tokens that begin and end a text"):
        around, control = _know_control(model, files, end)
    unknown = vocabulary.get(getattr(model.model, "unk_token", None) or "", 0)
    text_ids = {each for each in vocabulary.values() if each not in control}
    text_ids |= {end.id, unknown, *around.bos_ids}

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
    vocab_size = max(vocabulary.values()) + 1
    return Codec(
        vocab_size=vocab_size,
        missing_ids=sorted(set(range(vocab_size)) - set(vocabulary.values())),
        num_text_ids=max(text_ids) + 1,
        eos_id=end.id,
        eos_text=end.text,
        also_stops=end.also_stops,
        bos_ids=around.bos_ids,
        bos_text=around.bos_text,
        notes=notes(files.settings, around, end.id),
        encode=encode,
        read_control=_control_reader(model, path, control),
        decode=decode,
        normalize=normalize,
        steps=[part.__getstate__().decode() for part in parts if part is not None],
        meaning=meaning,
        files=kept,
    )


def _control_reader(
    model: tokenizers.Tokenizer, path: Path, control: Collection[int]
) -> Callable[[str], tuple[list[int], list[Control]]]:
    def read(text: str) -> tuple[list[int], list[Control]]:
        with _one_line(path, "does not encode a text"):
            model.encode_special_tokens = False
            try:
                found = model.encode(text, add_special_tokens=False)
            finally:
                model.encode_special_tokens = True
            bounds = zip(found.offsets, found.ids, strict=True)
            return found.ids, [(*ends, token) for ends, token in bounds if token in control]

    return read


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
    if not ids:
        raise UserError(f"{path}: a vocabulary without a piece")
    if max(ids) >= 2 * len(ids):
        raise UserError(f"{path}: an id of {max(ids)} among {len(ids)} pieces leaves most unused")


@contextlib.contextmanager
def _one_line(path: Path, problem: str) -> Iterator[None]:
    """Raise a library's exception or panic as a UserError; one of ours passes."""
    try:
        yield
    except UserError:
        raise
    except BaseException as error:
        # The libraries raise no narrower type, and pyo3's panic is in no module.
        if not isinstance(error, Exception) and type(error).__name__ != "PanicException":
            raise
        reason = str(error).split("\n", 1)[0].strip()[:_MAX_REASON] or type(error).__name__
        raise UserError(f"{path} {problem}: {reason}") from None
