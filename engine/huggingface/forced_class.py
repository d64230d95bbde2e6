"""Where transformers' AutoTokenizer does not read an exported tokenizer as it stands.

Of a Qwen2's folder it takes Qwen2Tokenizer, whatever tokenizer_config.json names. That keeps the
byte pairs and has steps of its own. (transformers 5.24, tokenization_auto.py:
MODELS_WITH_INCORRECT_HUB_TOKENIZER_CLASS; of the families here Qwen2 alone is in it.)
"""

import json
from pathlib import Path

import tokenizers
from tokenizers import normalizers, pre_tokenizers

from engine.data.tokenizer import Tokenizer
from engine.huggingface.hard_texts import hard_texts

_MOST_SHOWN = 60  # characters of a text in a warning; our choice
# Of transformers' tokenization_qwen2.py.
_QWEN2_WORDS = (
    r"(?i:'s|'t|'re|'ve|'m|'ll|'d)|[^\r\n\p{L}\p{N}]?\p{L}+|\p{N}| ?[^\s\p{L}\p{N}]+[\r\n]*"
    r"|\s*[\r\n]+|\s+(?!\S)|\s+"
)


def read_otherwise(tokenizer: Tokenizer, folder: Path, model_type: str) -> str:
    """Return what is to be said of an exported folder of that type whose tokenizer AutoTokenizer
    reads otherwise than it is; "" where it gives the same ids for many hard texts."""
    if model_type != "qwen2":
        return ""
    theirs = _qwen2(folder)
    for text in hard_texts():
        ours = tokenizer.encode(text)
        found = theirs.encode(text, add_special_tokens=False).ids if theirs else None
        if ours != found:
            return (
                "WARNING: transformers' AutoTokenizer reads a Qwen2's tokenizer by a class of its "
                f"own, and this one is another: {text!r:.{_MOST_SHOWN}} would get other ids than "
                "the model was trained with. Load it with transformers.PreTrainedTokenizerFast"
            )
    return ""


def _qwen2(folder: Path) -> tokenizers.Tokenizer | None:
    """Return what Qwen2Tokenizer makes of a folder's files; None where that is nothing."""
    try:
        if (folder / "tokenizer.json").exists():
            model = json.loads((folder / "tokenizer.json").read_bytes())["model"]
            pairs = (pair.split(" ") if isinstance(pair, str) else pair for pair in model["merges"])
            vocabulary, merges = model["vocab"], [(left, right) for left, right in pairs]
        else:
            files = (str(folder / name) for name in ("vocab.json", "merges.txt"))
            vocabulary, merges = tokenizers.models.BPE.read_file(*files)
        theirs = tokenizers.Tokenizer(tokenizers.models.BPE(vocabulary, merges))
    except Exception:  # no byte pairs; the library's errors are of no narrower class
        return None
    theirs.normalizer = normalizers.NFC()
    words = pre_tokenizers.Split(tokenizers.Regex(_QWEN2_WORDS), "isolated")
    byte_level = pre_tokenizers.ByteLevel(add_prefix_space=False, use_regex=False)
    theirs.pre_tokenizer = pre_tokenizers.Sequence([words, byte_level])
    return theirs
