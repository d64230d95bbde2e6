"""A tokenizer as the files from which transformers.AutoTokenizer makes one that gives the same ids.

tokenizer.json is what AutoTokenizer is told to read as it stands: the class that a model's name
would choose makes steps of its own. Only GPT-2's two files, which say nothing of their steps, are
read by the class of GPT-2. What begins a text is in the post_processor of a tokenizer.json, which
stays with all that it puts; of two files it is add_bos_token and bos_token, which a run keeps.
"""

from pathlib import Path

from engine.data.tokenizer import Tokenizer
from engine.files import replacing, write_object
from engine.huggingface.sentencepiece_json import MAY_DIFFER, sentencepiece_json

_PLAIN_CLASS = "PreTrainedTokenizerFast"  # reads tokenizer.json, whatever is in it
# Hugging Face's names of GPT-2's two tokenizer files, which have the same content.
_BPE_FILES = {"encoder.json": "vocab.json", "vocab.bpe": "merges.txt"}


def export_tokenizer(tokenizer: Tokenizer, folder: Path, context_length: int) -> str:
    """Write a tokenizer into a model's folder; return what is to be said of it, "" for nothing.

    What a run has kept goes along: the chat template, special tokens, generation_config.json.
    Raises UserError where AutoTokenizer would give other ids.
    """
    tokenizer.save(folder)
    settings = {
        "model_max_length": context_length,
        **tokenizer.kept("tokenizer_config.json"),
        "eos_token": tokenizer.eos_text,
        **({"bos_token": tokenizer.bos_text} if len(tokenizer.bos_ids) == 1 else {}),
        "tokenizer_class": _PLAIN_CLASS,
    }
    note = ""
    if tokenizer.sentencepiece_model() is not None:
        content, may_differ = sentencepiece_json(tokenizer)
        with replacing(folder / "tokenizer.json") as stream:
            stream.write(content)
        note = f"{tokenizer.path}: {MAY_DIFFER}" if may_differ else ""
    elif (folder / "encoder.json").exists():
        for ours, theirs in _BPE_FILES.items():
            (folder / ours).rename(folder / theirs)
        settings["tokenizer_class"] = "GPT2Tokenizer"
    write_object(folder / "tokenizer_config.json", settings)
    return note
