"""Which files a tokenizer is: found, read whole and within bounds, not yet understood."""

import dataclasses
import hashlib
import json
import os
from collections.abc import Mapping
from dataclasses import dataclass, field
from pathlib import Path
from typing import Literal

from engine.data.tokenizer_settings import TokenizerSettings, read_settings
from engine.errors import UserError
from engine.files import open_file, refuse_lfs_pointer

# Our choice: the largest vocabularies in use, of 262,144 pieces, are a tokenizer.json of 33 MB.
_MAX_BYTES = 64 << 20
# GPT-2's two files by our names, which are OpenAI's, and by Hugging Face's.
_GPT2_NAMES = (("encoder.json", "vocab.bpe"), ("vocab.json", "merges.txt"))


@dataclass(frozen=True, kw_only=True)
class TokenizerFiles:
    """What a tokenizer is made of."""

    path: Path
    """What an error names: the file, or the folder of two."""
    kind: Literal["huggingface", "gpt2", "sentencepiece"]
    """Which library makes a tokenizer of it."""
    contents: Mapping[str, bytes]
    """By the names under which a run keeps them: tokenizer.json; encoder.json and vocab.bpe;
    tokenizer.model."""
    names: tuple[str, ...] = ()
    """What the user calls the files, in the order of contents."""
    settings: TokenizerSettings = field(default_factory=TokenizerSettings)
    """What the JSON files beside them say."""

    def digest(self) -> str:
        """Return a sha256 of all that a tokenizer is made of."""
        told = json.dumps(dataclasses.asdict(self.settings) | {"end_path": "", "model_path": ""})
        digest = hashlib.sha256(f"{self.kind} {told}".encode())
        for name, content in sorted(self.contents.items()):
            digest.update(f"{name} {len(content)} ".encode() + content)
        return digest.hexdigest()


def read_tokenizer_files(path: Path) -> TokenizerFiles:
    """Read a sentencepiece model, tokenizer.json, GPT-2's two files or a folder with one of these.

    In a folder, tokenizer.json goes before GPT-2's two, and these before a .model. Raises
    UserError, for a file of more than 64 MiB too.
    """
    if path.is_dir():
        return _read_folder(path)
    for names in _GPT2_NAMES:
        if path.name in names:
            return _read_gpt2(path.parent, names)
    if path.suffix == ".json":
        return _read_huggingface(path)
    if path.suffix in (".safetensors", ".bin") and path.exists():
        raise UserError(f"{path} is a file of weights: give the tokenizer's folder, {path.parent}")
    return _read_sentencepiece(path)


def _read_folder(folder: Path) -> TokenizerFiles:
    if os.path.lexists(folder / "tokenizer.json"):
        return _read_huggingface(folder / "tokenizer.json")
    for names in _GPT2_NAMES:
        if os.path.lexists(folder / names[0]):
            return _read_gpt2(folder, names)
    models = sorted(folder.glob("*.model"))
    if len(models) != 1:
        found = f"{len(models)} .model files" if models else "none of them"
        if (folder / "snapshots").is_dir():
            found += "; it is a cache of the hub: give a folder in its snapshots/"
        raise UserError(
            f"{folder} should hold a tokenizer.json, encoder.json + vocab.bpe, vocab.json + "
            f"merges.txt, or one sentencepiece .model file, and holds {found}"
        )
    return _read_sentencepiece(models[0])


def _read_sentencepiece(path: Path) -> TokenizerFiles:
    contents = {"tokenizer.model": _read(path)}
    return TokenizerFiles(
        path=path,
        kind="sentencepiece",
        contents=contents,
        names=(path.name,),
        settings=read_settings(path.parent),
    )


def _read_gpt2(folder: Path, names: tuple[str, str]) -> TokenizerFiles:
    contents = {
        ours: _read(folder / name) for ours, name in zip(_GPT2_NAMES[0], names, strict=True)
    }
    settings = read_settings(folder)
    return TokenizerFiles(
        path=folder, kind="gpt2", contents=contents, names=names, settings=settings
    )


def _read_huggingface(path: Path) -> TokenizerFiles:
    settings = read_settings(path.parent)
    contents = {"tokenizer.json": _read(path)}
    return TokenizerFiles(
        path=path,
        kind="huggingface",
        contents=contents,
        names=("tokenizer.json",),
        settings=settings,
    )


def _read(path: Path) -> bytes:
    with open_file(path) as stream:
        num_bytes = os.fstat(stream.fileno()).st_size
        if num_bytes > _MAX_BYTES:
            raise UserError(f"{path} has {num_bytes} bytes; {_MAX_BYTES} are the most that is read")
        content = stream.read(_MAX_BYTES)
        refuse_lfs_pointer(path, content)
        return content
