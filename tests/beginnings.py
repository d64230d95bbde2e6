"""Folders of tokenizers whose files put a token before every text, each in its own words.

Bytes and a few merges; "<s>" begins a text and "</s>" ends it, but for OPT's, which begins with
"</s>". The sentencepiece model has "<s>" by itself.
"""

import json
from pathlib import Path
from typing import Any

import tokenizers
from tokenizers import processors

from tests.engine.huggingface.sentencepiece_models import KINDS, write_model

BOS, EOS = "<s>", "</s>"
_PIECES = ["<pad>", BOS, EOS, *sorted(tokenizers.pre_tokenizers.ByteLevel.alphabet()), "th", "the"]
IDS = {piece: number for number, piece in enumerate(_PIECES)}
"""Of all kinds but sentencepiece's: "the" is 260."""
_MERGES = [("t", "h"), ("th", "e")]
_BEFORE = processors.TemplateProcessing(
    single=f"{BOS} $A", pair=f"{BOS} $A {BOS} $B", special_tokens=[(BOS, 1)]
)
_AROUND = processors.TemplateProcessing(
    single=f"{BOS} $A {EOS}", pair="$A $B", special_tokens=[(BOS, 1), (EOS, 2)]
)
POST_PROCESSORS = {
    "nothing": None,
    "byte level": processors.ByteLevel(trim_offsets=True),
    "template": _BEFORE,
    "llama 3": processors.Sequence([processors.ByteLevel(), _BEFORE]),
    "around": _AROUND,
    "roberta": processors.RobertaProcessing((EOS, 2), (BOS, 1)),
}
FOLDERS = ("template", "llama 3", "around", "roberta", "opt", "opt grown", "sentencepiece")
"""What write_folder writes that puts a token before texts."""


def write_json(path: Path, value: Any) -> None:
    path.write_text(json.dumps(value))


def write_tokenizer_json(folder: Path, post_processor: Any, **config: Any) -> Path:
    """Write a tokenizer.json with that post_processor, and what is beside it; return the folder."""
    model = tokenizers.Tokenizer(tokenizers.models.BPE(IDS, _MERGES))
    model.pre_tokenizer = tokenizers.pre_tokenizers.ByteLevel(add_prefix_space=False)
    model.decoder = tokenizers.decoders.ByteLevel()
    model.add_special_tokens(["<pad>", BOS, EOS])
    if post_processor is not None:
        model.post_processor = post_processor
    folder.mkdir(exist_ok=True)
    model.save(str(folder / "tokenizer.json"))
    write_json(folder / "tokenizer_config.json", {"bos_token": BOS, "eos_token": EOS} | config)
    return folder


def write_two_files(folder: Path, **config: Any) -> Path:
    """Write vocab.json and merges.txt, and what is beside them; return the folder."""
    folder.mkdir(exist_ok=True)
    write_json(folder / "vocab.json", IDS)
    (folder / "merges.txt").write_text("#version: 0.2\nt h\nth e\n", encoding="utf-8")
    write_json(folder / "tokenizer_config.json", {"eos_token": EOS} | config)
    return folder


def write_sentencepiece(folder: Path, **config: Any) -> Path:
    """Write a tokenizer.model as Llama 2's, and what is beside it; return the folder."""
    folder.mkdir(exist_ok=True)
    write_model(folder / "tokenizer.model", **KINDS["llama"])
    write_json(folder / "tokenizer_config.json", {"tokenizer_class": "LlamaTokenizer"} | config)
    return folder


def write_folder(kind: str, folder: Path) -> Path:
    """Write one of FOLDERS; return the folder."""
    if kind in POST_PROCESSORS:
        return write_tokenizer_json(folder, POST_PROCESSORS[kind], pad_token="<pad>")
    if kind == "sentencepiece":
        return write_sentencepiece(folder, add_bos_token=True)
    write_two_files(folder, bos_token=EOS, add_bos_token=True, pad_token="<pad>")
    if kind == "opt grown":
        write_json(folder / "added_tokens.json", {"<x>": len(IDS)})
    return folder


def beginning(kind: str) -> list[int]:
    """Return the ids that such a folder puts before a text, by hand."""
    return [IDS[EOS]] if kind.startswith("opt") else [1]
