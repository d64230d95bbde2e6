"""What a model on disk says of itself, its weights unread: the config.json of a Hugging Face
folder, or a network.json of ours. Imports neither torch nor megatron.
"""

from pathlib import Path
from typing import Any

from engine.checkpoints.candidates import candidates_at, read_description
from engine.errors import UserError
from engine.files import read_object
from engine.huggingface.foreign import is_foreign, require_model_folder
from models.huggingface.config import family_of_config, size_of_config
from models.huggingface.families import Family
from models.sizes import GPTSize

SCORER = "ForSequenceClassification"
"""How the names of transformers' classes end that score a text."""
IN_WORDS_OF_SCORER = "a reward model or classifier: it scores texts and writes none"
_WRITERS = ("ForCausalLM", "LMHeadModel")  # of those that write one
_MAX_CONFIG_BYTES = 1 << 20  # of config.json, which has a few hundred; our choice


def describe_folder(folder: Path) -> tuple[Family, GPTSize, dict[str, Any]]:
    """Return the family and the size that a folder's config.json names, and what else it says.

    A head that is stored beside a config.json which ties it makes the model untied; that is seen in
    the weights alone. Raises UserError for what is no such folder, or no model of ours.
    """
    require_model_folder(folder)
    path = folder / "config.json"
    try:
        config = read_object(path, max_bytes=_MAX_CONFIG_BYTES)
        return family_of_config(config), size_of_config(config), config
    except ValueError as error:
        raise UserError(f"{path}: {error}") from None


def classes_of(config: dict[str, Any]) -> list[str]:
    """Return the names of transformers' classes that a config.json is of."""
    architectures = config.get("architectures")
    return list(map(str, architectures)) if isinstance(architectures, list) else []


def in_words_of_language_model(folder: Path) -> str:
    """Return what to say of a folder with a language model that a reward model is wanted of."""
    return (
        f"{folder} holds a language model, where a reward model is needed: train one from it "
        f"(recipes/rm_*.py --init-from), or give a class ...{SCORER}"
    )


def stored_size(path: Path, role: str) -> tuple[GPTSize, Path]:
    """Return the size of the network `role` that a path means, and where it says so: a run, a
    checkpoint, a network's folder in one, or a Hugging Face folder.

    Nothing of weights is read, nor need they be there in a Hugging Face folder. Raises UserError
    for what is no such network.
    """
    if is_foreign(path):
        _, size, config = describe_folder(path)
        classes = classes_of(config)
        if role == "reward_model" and any(each.endswith(_WRITERS) for each in classes):
            raise UserError(in_words_of_language_model(path))
        if role != "reward_model" and any(each.endswith(SCORER) for each in classes):
            raise UserError(f"{path} holds {IN_WORDS_OF_SCORER}; a language model is needed here")
        return size, path
    found = candidates_at(path, role)
    folder = Path(found["folders"][0]) / found["role"]
    return read_description(folder)[1], folder
