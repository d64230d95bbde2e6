"""From a Hugging Face folder to one of our checkpoints and back, on the ranks of any layout.

    FOLDER/  config.json  model.safetensors (or parts and an index)  tokenizer.json
    RUN/     config.json  checkpoints/step_00000000/ROLE/            tokenizer/

A language model is a policy; a sequence classifier of one label is a reward model or critic.

Every rank reads or writes what it holds, tensor by tensor: a model too large for one machine goes
through tp x pp ranks.
"""

import contextlib
import dataclasses
import os
import shutil
from collections.abc import Iterator
from pathlib import Path
from typing import Any

import torch
import torch.distributed as dist
from safetensors import SafetensorError
from safetensors.torch import save_file
from torch import Tensor

from engine.checkpoints.candidates import candidates_at
from engine.checkpoints.checkpointer import Checkpointer
from engine.checkpoints.found import network_at, run_of
from engine.checkpoints.weights import load_weights
from engine.claim import claim, holding_claims
from engine.data.prompt_format import read_prompt_format, write_prompt_format
from engine.data.tokenizer import Tokenizer
from engine.environment import rank_of_environment
from engine.errors import UserError
from engine.files import sync, sync_folder, write_object, writing
from engine.huggingface.export_chat import export_chat
from engine.huggingface.export_files import Exported, index_of, plan_files
from engine.huggingface.export_tokenizer import export_tokenizer
from engine.huggingface.folder_tokenizer import warn_of_own_tokenizer
from engine.huggingface.forced_class import read_otherwise
from engine.huggingface.foreign import refuse_foreign
from engine.huggingface.model_folder import ModelFolder, find_critic, find_model, read_kind
from engine.huggingface.pad_token import ensure_pad_token
from engine.huggingface.scores import fold_bias, say_left_bias, say_where_scores_are_read
from engine.huggingface.weight_files import StoredTensor
from engine.printable import say
from engine.ranks.first_rank import said_by_first_rank
from engine.ranks.parallel import Parallel
from engine.ranks.same_folder import check_same_folder
from engine.ranks.start import start_parallel
from engine.run import load_shared_tokenizer, require_path, tokenizer_beside
from engine.settings.convert import ConvertConfig
from engine.settings.numerics import Numerics
from engine.settings.saved import save_config
from engine.training.network import Network, build_network
from models.form import Form
from models.huggingface.config import config_of_scorer, config_of_size, family_of_size
from models.huggingface.families import Family
from models.huggingface.tensors import (
    HEAD,
    SCORE,
    SCORE_BIAS,
    from_shards,
    stored_tensors,
    to_shard,
)
from models.sizes import GPTSize, Kind

# In the order in which an export looks for them; an average is of either kind.
_KIND_OF: dict[str | None, Kind] = {
    "policy": "language",
    "reward_model": "scalar",
    "critic": "scalar",
}
_USUAL_ROLE: dict[Kind, str] = {"language": "policy", "scalar": "reward_model"}


def convert(config: ConvertConfig) -> None:
    """Import or export, as config.direction says; raises UserError."""
    if config.out is not None and config.out.exists():
        raise UserError(f"--out {config.out} exists already; name a new folder")
    if config.direction == "import":
        made = import_huggingface(config)
        use = f"a stage starts from it by --init-from {made}, PPO by --policy or --reward-model"
    else:
        made = export_huggingface(config)
        use = "transformers reads it by the class that its config.json names"
    if rank_of_environment() == 0:
        say(f"{made}: made; {use}")


@holding_claims()
def import_huggingface(config: ConvertConfig) -> Path:
    """Write a run whose one checkpoint holds the weights of a Hugging Face folder; return the run.

    A stage starts from it with `--init-from`. Raises UserError, naming the field or the tensor, for
    a model that is not ours.
    """
    parallel = start_parallel(config.layout, 0, config.waiting, config)
    source, out = require_path(config.source, "source"), _require_out(config)
    kind = _KIND_OF.get(config.role) or read_kind(source)
    model = find_critic(source) if config.role == "critic" else find_model(source, kind)
    tokenizer = _load_tokenizer(config.tokenizer or source, model.size)
    if config.tokenizer is not None:
        warn_of_own_tokenizer(source, tokenizer)
    if parallel.is_writer:
        say_where_scores_are_read(model, tokenizer.eos_id)
    keeps_format = said_by_first_rank(lambda: "kept" if read_prompt_format(source) else "")
    network = build_network(kind, model.size, parallel, numerics=Numerics(dtype=config.dtype))
    load_huggingface(network, source, model)
    with _becoming(out, parallel) as partial:
        if parallel.is_writer:
            tokenizer.save(partial / "tokenizer")
            save_config(config, partial / "config.json")
            if keeps_format and (form := read_prompt_format(source)) is not None:
                write_prompt_format(form, partial)
        checkpointer = Checkpointer(
            directory=partial / "checkpoints",
            parallel=parallel,
            networks={config.role or _USUAL_ROLE[kind]: network},
            optimizers={},
            tokenizer_fingerprint=tokenizer.fingerprint(),
        )
        with checkpointer:
            checkpointer.save(0, {})
    return out


def export_huggingface(config: ConvertConfig) -> Path:
    """Write a checkpoint's network as a Hugging Face folder; return it. Raises UserError."""
    parallel = start_parallel(config.layout, 0, config.waiting, config)
    source, out = require_path(config.source, "source"), _require_out(config)
    role = _role_at(source, config.role)
    found = network_at(source, role, strict=config.strict)
    size, beside = found.size, run_of(found.folder) / "tokenizer"
    tokenizer = _load_tokenizer(config.tokenizer or beside, size)
    network = build_network(found.kind, size, parallel, numerics=Numerics(dtype=config.dtype))
    fingerprint = tokenizer.fingerprint()
    load_weights(network, found.folder, role=role, tokenizer_fingerprint=fingerprint)
    save_huggingface(
        network,
        out,
        tokenizer,
        file_bytes=int(config.file_gigabytes * 1e9),
        run=run_of(found.folder),
    )
    return out


def load_huggingface(network: Network, folder: Path, model: ModelFolder | None = None) -> None:
    """Fill a network from a Hugging Face folder, with this rank's share of each tensor. model: what
    find_model has found there, where that was asked before.

    A language model fills the trunk of a scalar network, whose head stays as it was drawn. An
    optimizer that already holds fp32 masters has to adopt_weights() afterwards. Raises UserError
    for another size or kind, and for a tensor that is missing, of another shape, or not finite.
    """
    if model is None:
        model = find_model(folder, "language" if network.kind == "language" else read_kind(folder))
    for name, value, mine in _differences(model.size, network.size):
        raise UserError(f"{folder}: {name} is {value}, this run's model has {mine}")
    layout, tp_rank = network.parallel.layout, network.parallel.tp_rank
    for name, parameter in _parameters(network):
        if name in (SCORE, SCORE_BIAS) and model.kind == "language":
            continue
        if name == SCORE_BIAS:
            parameter.data.fill_(model.score_bias)
            continue
        stored = [model.tensors[t.name] for t in stored_tensors(name, model.family, model.size)]
        parts = [tensor.read() for tensor in stored]
        shard = to_shard(name, parts, model.family, model.size, tp=layout.tp, tp_rank=tp_rank)
        parameter.data.copy_(shard)
        if not parameter.data.isfinite().all():  # sync
            raise _not_finite(name, stored, parts, model, parameter.dtype)
    network.mark_changed()
    if model.left_out and network.parallel.is_writer:
        say(f"{folder}: {', '.join(model.left_out)} left out: a value head is no language model's")


def _differences(theirs: Any, mine: Any) -> Iterator[tuple[str, Any, Any]]:
    """Yield (field, theirs, mine) of two sizes where they differ, their forms' fields by name."""
    for field in dataclasses.fields(theirs):
        values = getattr(theirs, field.name), getattr(mine, field.name)
        if values[0] == values[1]:
            continue
        if isinstance(values[0], Form):
            yield from _differences(*values)
        else:
            yield field.name, *values


def _not_finite(
    name: str,
    stored: list[StoredTensor],
    parts: list[Tensor],
    model: ModelFolder,
    dtype: torch.dtype,
) -> UserError:
    """Return the error that names the first of a parameter's tensors that is not finite."""
    theirs = stored_tensors(name, model.family, model.size)
    for tensor, found, part in zip(theirs, stored, parts, strict=True):
        if not part.to(dtype).isfinite().all():
            return UserError(f"{found.path}: {tensor.name} is not finite in {dtype}")
    raise AssertionError("a shard has what no part has")


@holding_claims()
def save_huggingface(
    network: Network,
    folder: Path,
    tokenizer: Tokenizer,
    *,
    file_bytes: int = 5 * 10**9,
    run: Path | None = None,
) -> None:
    """Write a network as a new Hugging Face folder, whole or not at all; all ranks call it.

    A scalar one becomes a sequence classifier of one label, whose scores are equal but for the bias
    that fold_bias leaves, which is said. The first data-parallel replica writes. Each pipeline
    stage has its own files, of at most `file_bytes` bytes or one of our parameters, whose shards
    meet on the first tensor-parallel rank. run: whose form of prompts goes along. Raises UserError
    for a size that no family of Hugging Face's has.
    """
    parallel, size = network.parallel, network.size
    family = _export_family(size)
    parameters = {
        name: parameter.data
        for name, parameter in _parameters(network)
        if name != HEAD or not size.form.is_tied  # the first stage holds it as the embedding
    }
    scores = network.kind == "scalar"
    bias = fold_bias(parameters, size, network.dtype, parallel) if scores else 0.0
    with _becoming(folder, parallel) as partial:
        pad = said_by_first_rank(
            lambda: _write_tokenizer(tokenizer, partial, size, family, scores=scores, run=run)
        )
        vocab_size = max(size.vocab_size, int(pad) + 1) if scores else size.vocab_size
        exported = Exported(
            family=family,
            size=dataclasses.replace(size, vocab_size=vocab_size),
            dtype=network.dtype,
        )
        files = plan_files(list(parameters), exported, file_bytes, parallel)
        for file_name, (stage, names) in files.items():
            if stage != parallel.pp_rank or parallel.dp_rank > 0:
                continue
            tensors: dict[str, Tensor] = {}
            for name in names:
                shards = _gather(parameters[name].to(network.dtype), parallel)
                if shards:
                    tensors |= from_shards(name, shards, family, exported.size)
            if tensors:
                _write_tensors(partial / file_name, tensors)
        dist.barrier()
        if parallel.is_writer:
            if len(files) > 1:
                write_object(partial / "model.safetensors.index.json", index_of(files, exported))
            config = _config_of(exported, tokenizer)
            if scores:
                config = config_of_scorer(config, size, pad_id=int(pad), score_bias=bias)
            write_object(partial / "config.json", config)
            if bias:
                say_left_bias(bias, family.name)


def _config_of(exported: Exported, tokenizer: Tokenizer) -> dict[str, Any]:
    dtype, bos_id = str(exported.dtype).removeprefix("torch."), next(iter(tokenizer.bos_ids), None)
    return config_of_size(exported.size, dtype=dtype, eos_id=tokenizer.eos_id, bos_id=bos_id)


def _write_tokenizer(
    tokenizer: Tokenizer,
    folder: Path,
    size: GPTSize,
    family: Family,
    *,
    scores: bool,
    run: Path | None,
) -> str:
    """Write the tokenizer, and say what is to be said of it; return the id that a scorer's texts
    are padded with, "" where the model scores none."""
    notes = (
        export_tokenizer(tokenizer, folder, size.context_length),
        read_otherwise(tokenizer, folder, family.model_type),
        export_chat(run, tokenizer, folder) if run is not None else "",
    )
    for note in notes:
        if note:
            say(note)
    return str(ensure_pad_token(folder, tokenizer.eos_id)) if scores else ""


@contextlib.contextmanager
def _becoming(folder: Path, parallel: Parallel) -> Iterator[Path]:
    """Yield a new folder that all ranks write into, and that becomes `folder` when they are
    through, or goes. UserError, on all, where `folder` is there or another process makes it."""
    partial = folder.with_name(f"{folder.name}.partial")
    lock = folder.with_name(f".{folder.name}.lock")

    def begin() -> str:
        claim(folder, lock)
        if os.path.lexists(folder):
            raise UserError(f"--out {folder} exists already; name a new folder")
        with writing(partial):
            if os.path.lexists(partial):
                shutil.rmtree(partial)
            partial.mkdir(parents=True)
        return ""

    def end() -> str:
        with writing(folder):
            partial.rename(folder)
            sync_folder(folder.parent)
        return ""

    said_by_first_rank(begin)
    try:
        check_same_folder(folder, lock, "out")
        yield partial
        dist.barrier()
        said_by_first_rank(end)
    except BaseException:
        if parallel.is_writer:
            shutil.rmtree(partial, ignore_errors=True)
        raise


def _write_tensors(path: Path, tensors: dict[str, Tensor]) -> None:
    with writing(path):
        try:
            save_file(tensors, path, metadata={"format": "pt"})
        except SafetensorError as error:  # whatever the system has against it
            raise UserError(f"{path}: cannot be written: {error}") from None
        with path.open("rb+") as stream:
            sync(stream)


def _role_at(source: Path, named: str | None) -> str:
    """Return the role of the network to export: the one that is named, or a policy, or what is
    there instead of one. Raises UserError where no network of ours is."""

    def find() -> str:
        refuse_foreign(source)
        if named:
            return named
        errors = []
        for role in _KIND_OF:
            try:
                return str(candidates_at(source, str(role))["role"])
            except UserError as error:
                errors.append(error)
        raise errors[0]

    return said_by_first_rank(find)


def _require_out(config: ConvertConfig) -> Path:
    if config.out is None:
        raise UserError("--out is required: the folder to make")
    return config.out


def _parameters(network: Network) -> Iterator[tuple[str, torch.nn.Parameter]]:
    """Yield this rank's parameters, by names whose layer numbers count in the whole model."""
    for module in network.modules:
        for name, parameter in module.named_parameters():
            match name.split(".", 3):
                case ["decoder", "layers", local, rest]:
                    layer = module.decoder.layers[int(local)].layer_number - 1  # type: ignore[union-attr, index]
                    yield f"decoder.layers.{layer}.{rest}", parameter
                case _:
                    yield name, parameter


def _gather(shard: Tensor, parallel: Parallel) -> list[Tensor]:
    """Return all tensor-parallel ranks' shards, on the CPU of the first; nothing on the others."""
    if parallel.layout.tp == 1:
        return [shard.cpu()]
    is_target = parallel.tp_rank == 0
    shards = [torch.empty_like(shard) for _ in range(parallel.layout.tp)] if is_target else None
    dist.gather(shard.contiguous(), shards, group_dst=0, group=parallel.tp_group)
    return [shard.cpu() for shard in shards or []]


def _export_family(size: GPTSize) -> Family:
    try:
        return family_of_size(size)
    except ValueError as error:
        raise UserError(f"this model cannot be exported: {error}") from None


def _load_tokenizer(path: Path, size: GPTSize) -> Tokenizer:
    """Return the tokenizer, which must fit the model."""
    require_path(path, "tokenizer")
    tokenizer = load_shared_tokenizer(lambda: tokenizer_beside(path))
    tokenizer.check_fits(size.vocab_size)
    return tokenizer
