"""The model in a Hugging Face folder: its family, its size and its tensors, all checked before a
number is read."""

import dataclasses
import math
import re
from collections.abc import Iterator, Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import torch

from engine.errors import UserError, named
from engine.huggingface.described import (
    IN_WORDS_OF_SCORER,
    SCORER,
    classes_of,
    describe_folder,
    in_words_of_language_model,
)
from engine.huggingface.weight_files import StoredTensor, open_weights
from models.huggingface.config import score_bias_of_config
from models.huggingface.families import Family
from models.huggingface.tensors import (
    EMBEDDING,
    HEAD,
    SCORE,
    canonical_name,
    parameter_names,
    stored_tensors,
)
from models.sizes import GPTSize, Kind

_FLOATS = (torch.float16, torch.bfloat16, torch.float32, torch.float64)
_MOST_SHOWN = 80  # characters of a text from a file in an error; our choice
_ROWS = 1024  # of two matrices that are compared at a time; our choice
# What TRL's models with a value head have beside the language model, and what others have.
_VALUE_HEAD = re.compile(r"(.+\.)?v_head\..+")
_VALUES = re.compile(r"(.+\.)?v_head\.summary\.(weight|bias)")
_LORA = re.compile(r"(.+\.)?lora_(A|B|embedding_A|embedding_B)\..+")
_QUANTISED = re.compile(
    r".+\.(SCB|qweight|qzeros|g_idx|weight_scale|weight_format|absmax|quant_map|weight\.(absmax|"
    r"quant_map|nested_absmax|quant_state\..+))"
)
# Networks on a trunk that say something else than the next token: {ending of the class: what}.
_OTHER_TASKS = {
    SCORER: IN_WORDS_OF_SCORER,
    "ForTokenClassification": "a classifier of tokens, and writes none",
    "ForQuestionAnswering": "a reader of answers, and writes none",
}
_OTHER_HEADS = re.compile(r"(\w+\.)?(score|classifier)\.(weight|bias)")
_SCORES = re.compile(r"(\w+\.)*score\.weight")
_NEEDED: dict[Kind, str] = {
    "language": "a language model is needed here",
    "scalar": f"a reward model is needed here, a class ...{SCORER} of one label",
}


@dataclass(frozen=True)
class ModelFolder:
    """A model in a folder of Hugging Face's."""

    kind: Kind
    family: Family
    size: GPTSize
    tensors: dict[str, StoredTensor]
    """By the family's names; a tied head that is stored is not among them."""
    left_out: tuple[str, ...]
    """Names of the value head, where the file has one: it is no part of a language model."""
    score_bias: float = 0.0
    """Of a scalar model: what its scores have beside what the tensors say."""
    pad_id: int | None = None
    """Of a scalar model: the token that its scores are never read at."""


def read_size(folder: Path) -> GPTSize:
    """Return the size of the model in a Hugging Face folder; raises UserError if it is not ours."""
    size = describe_folder(folder)[1]
    # Only a stored head can say otherwise, for which the files have to be opened.
    if not size.form.is_tied or read_kind(folder) == "scalar":
        return size
    return find_model(folder).size


def read_kind(folder: Path) -> Kind:
    """Return what the model in a Hugging Face folder is: "scalar" where its class or its head is
    one that scores texts. Raises UserError."""
    _, _, config = describe_folder(folder)
    scores = any(name.endswith(SCORER) for name in classes_of(config))
    if not scores:
        scores = any(_SCORES.fullmatch(name) for name in open_weights(folder))
    return "scalar" if scores else "language"


def find_model(folder: Path, kind: Kind = "language") -> ModelFolder:
    """Return the model in a Hugging Face folder, its tensors found and not yet read.

    A head that is stored and differs from the embedding, where config.json says that they are one,
    makes the model untied, as in transformers. Raises UserError, naming the file and the tensor; so
    it does where the folder's model is of another kind than is asked for.
    """
    family, size, config = describe_folder(folder)
    stored = open_weights(folder)
    _refuse_other_models(folder, config, stored, kind)
    left_out = tuple(sorted(name for name in stored if _VALUE_HEAD.fullmatch(name)))
    found: dict[str, StoredTensor] = {}
    names: dict[str, str] = {}
    for stored_name, tensor in stored.items():
        name = None if stored_name in left_out else canonical_name(stored_name, family)
        if name in found:
            raise UserError(f"{tensor.path}: {name!r:.{_MOST_SHOWN}} is there twice")
        if name is not None:
            found[name], names[name] = tensor, stored_name
    paths = {tensor.path for tensor in stored.values()}
    where = next(iter(paths)) if len(paths) == 1 else folder
    (head,) = stored_tensors(SCORE if kind == "scalar" else HEAD, family, _untied(size))
    if kind == "scalar":
        _check_scores(folder, found.get(head.name), head.name, left_out)
    expected, num_bytes = {head.name}, 0
    for name, shape in _wanted(family, size, kind):  # ends with the first missing
        if name not in found:
            raise UserError(f"{where}: tensor {name} is missing")
        _check_tensor(name, found[name], shape)
        expected.add(name)
        num_bytes += math.prod(shape) * found[name].dtype.itemsize
    for name in found.keys() - expected:
        shown = f"{names[name]!r:.{_MOST_SHOWN}}"
        raise UserError(
            f"{found[name].path}: {shown} is no tensor of the {family.name} in config.json"
        )
    # Tensors of a torch file may share their numbers: a small file, and a model of any size.
    if num_bytes > sum(path.stat().st_size for path in paths):
        raise UserError(f"{where}: tensors of {num_bytes} bytes in fewer bytes: some are the same")
    if kind == "scalar":
        bias, pad_id = _scoring(folder, config)
        return ModelFolder(kind, family, size, found, left_out, bias, pad_id)
    if size.form.is_tied and head.name in found:
        _check_tensor(head.name, found[head.name], head.shape)
        (embedding,) = stored_tensors(EMBEDDING, family, size)
        if _differ(found[head.name], found[embedding.name]):
            size = _untied(size)
        else:
            del found[head.name]
    return ModelFolder(kind, family, size, found, left_out)


def find_critic(folder: Path) -> ModelFolder:
    """Return the critic in a Hugging Face folder: a model that scores texts, or a policy that TRL
    gave a value head. It gives w.h + b of the last hidden state h; its dropout is of training.

    Raises UserError as find_model.
    """
    stored = open_weights(folder)
    found = {match[2]: name for name in stored if (match := _VALUES.fullmatch(name))}
    if len(found) < 2 or read_kind(folder) == "scalar":
        return find_model(folder, "scalar")
    model, size = find_model(folder), describe_folder(folder)[1]
    for part, shape in (("weight", (1, size.embedding_dim)), ("bias", (1,))):
        _check_tensor(found[part], stored[found[part]], shape)
    (words,) = stored_tensors(HEAD, model.family, _untied(size))
    (score,) = stored_tensors(SCORE, model.family, size)
    tensors = {name: tensor for name, tensor in model.tensors.items() if name != words.name}
    tensors[score.name] = stored[found["weight"]]
    bias = float(stored[found["bias"]].read())
    if not math.isfinite(bias):
        raise UserError(f"{stored[found['bias']].path}: {found['bias']} is not finite")
    return ModelFolder("scalar", model.family, size, tensors, (), bias)


def _check_scores(
    folder: Path, score: StoredTensor | None, name: str, value_head: Sequence[str]
) -> None:
    """Raise UserError where the head of a scorer is missing or gives another number than one.
    value_head: the names of what TRL put there instead."""
    if score is None and value_head:
        raise UserError(
            f"{folder} holds a policy with a value head ({value_head[0]}): it says what that "
            "policy's return will be, and is a critic; a reward model is needed here "
            "(recipes/convert_hf.py import --role critic takes it as a critic)"
        )
    if score is None:
        raise UserError(f"{in_words_of_language_model(folder)}, which has a {name}")
    if len(score.shape) == 2 and score.shape[0] != 1:
        raise UserError(
            f"{folder} holds a classifier: its {name} gives {score.shape[0]} numbers a text, and a "
            "reward model gives one (num_labels 1)"
        )


def _scoring(folder: Path, config: dict[str, Any]) -> tuple[float, int | None]:
    """Return the bias and the padding token of a scorer's config.json."""
    pad_id = config.get("pad_token_id")
    try:
        return score_bias_of_config(config), pad_id if type(pad_id) is int else None
    except ValueError as error:
        raise UserError(f"{folder / 'config.json'}: {error}") from None


def _refuse_other_models(
    folder: Path, config: dict[str, Any], stored: dict[str, StoredTensor], kind: Kind
) -> None:
    """Raise UserError for an adapter, for quantised weights, and for a trunk of ours under another
    head than is asked for."""
    for name in stored:
        if _LORA.fullmatch(name):
            raise UserError(
                f"{stored[name].path}: {named(name)} is of a LoRA adapter; merge it into its base "
                "model (peft: merge_and_unload, then save_pretrained) and give that folder"
            )
        if _QUANTISED.fullmatch(name):
            raise UserError(
                f"{stored[name].path}: {named(name)} is of quantised weights; weights convert as "
                "floats of 16 bits or more: save the model without quantization"
            )
    heads = [name for name in stored if _OTHER_HEADS.fullmatch(name)]
    for said in (*classes_of(config), *heads):
        task = SCORER if said in heads else said
        for ending, what in _OTHER_TASKS.items():
            if task.endswith(ending) and not (kind == "scalar" and ending == SCORER):
                raise UserError(f"{folder} holds {what} ({named(said)}); {_NEEDED[kind]}")


def _wanted(family: Family, size: GPTSize, kind: Kind) -> Iterator[tuple[str, tuple[int, ...]]]:
    """Yield (name, shape) of every tensor that a model of that size is made of."""
    for ours in parameter_names(size, kind):
        for stored in stored_tensors(ours, family, size):
            yield stored.name, stored.shape


def _check_tensor(name: str, stored: StoredTensor, shape: tuple[int, ...]) -> None:
    if stored.shape != shape:
        raise UserError(
            f"{stored.path}: {name} has shape {list(stored.shape)!s:.{_MOST_SHOWN}}, "
            f"config.json asks for {list(shape)}"
        )
    if stored.dtype not in _FLOATS:
        raise UserError(f"{stored.path}: {name} is {stored.dtype}, not a float of 16 bits or more")


def _differ(head: StoredTensor, embedding: StoredTensor) -> bool:
    """Return whether two matrices of one shape differ, a few rows in memory at a time."""
    first, second = head.read(), embedding.read()
    return any(
        bool((first[row : row + _ROWS] != second[row : row + _ROWS]).any())
        for row in range(0, len(first), _ROWS)
    )


def _untied(size: GPTSize) -> GPTSize:
    return dataclasses.replace(size, form=dataclasses.replace(size.form, is_tied=False))
