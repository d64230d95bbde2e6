"""From a Hugging Face GPT-2 folder to one of our checkpoints and back, on the ranks of any layout.

    FOLDER/  config.json  model.safetensors (or parts and an index)  tokenizer.json
    RUN/     config.json  checkpoints/step_00000000/policy/          tokenizer/

Every rank reads or writes what it holds, tensor by tensor: a model too large for one machine goes
through tp x pp ranks.
"""

import contextlib
import dataclasses
import json
import math
import os
import shutil
from collections.abc import Iterator
from pathlib import Path

import torch
import torch.distributed as dist
from safetensors import SafetensorError
from safetensors.torch import save_file
from torch import Tensor

from engine.checkpoints.checkpointer import Checkpointer
from engine.checkpoints.found import network_at, run_of
from engine.checkpoints.weights import load_weights
from engine.claim import claim, holding_claims
from engine.data.tokenizer import Tokenizer
from engine.errors import UserError
from engine.files import read_object, replacing, sync, sync_folder, writing
from engine.huggingface.export_tokenizer import export_tokenizer
from engine.huggingface.weight_files import StoredTensor, open_weights
from engine.printable import say
from engine.ranks.first_rank import said_by_first_rank
from engine.ranks.parallel import Parallel
from engine.ranks.same_folder import check_same_folder
from engine.ranks.start import start_parallel
from engine.run import load_shared_tokenizer, require_path
from engine.settings.convert import ConvertConfig
from engine.settings.numerics import Numerics
from engine.settings.saved import save_config
from engine.training.network import Network, build_network
from models.huggingface import (
    TIED_HEAD,
    WORD_EMBEDDING,
    canonical_name,
    config_of_size,
    from_shards,
    huggingface_name,
    size_of_config,
    tensor_shapes,
    to_shard,
)
from models.sizes import GPTSize

_FLOATS = (torch.float16, torch.bfloat16, torch.float32, torch.float64)
_MAX_CONFIG_BYTES = 1 << 20  # of config.json, which has a few hundred; our choice
_MOST_SHOWN = 80  # characters of a text from a file in an error; our choice


def convert(config: ConvertConfig) -> None:
    """Import or export, as config.direction says; raises UserError."""
    if config.out is not None and config.out.exists():
        raise UserError(f"--out {config.out} exists already; name a new folder")
    if config.direction == "import":
        import_huggingface(config)
    else:
        export_huggingface(config)


@holding_claims()
def import_huggingface(config: ConvertConfig) -> Path:
    """Write a run whose one checkpoint holds the weights of a Hugging Face folder; return the run.

    A stage starts from it with `--init-from`. Raises UserError, naming the field or the tensor, for
    a model that is not ours.
    """
    parallel = start_parallel(config.layout, 0, config.waiting, config)
    source, out = require_path(config.source, "source"), _require_out(config)
    size = read_size(source)
    _find_tensors(source, size)
    tokenizer = _load_tokenizer(config.tokenizer or source, size)
    network = build_network("language", size, parallel, numerics=Numerics(dtype=config.dtype))
    load_huggingface(network, source)
    with _becoming(out, parallel) as partial:
        if parallel.is_writer:
            tokenizer.save(partial / "tokenizer")
            save_config(config, partial / "config.json")
        checkpointer = Checkpointer(
            directory=partial / "checkpoints",
            parallel=parallel,
            networks={config.role: network},
            optimizers={},
            tokenizer_fingerprint=tokenizer.fingerprint(),
        )
        with checkpointer:
            checkpointer.save(0, {})
    return out


def export_huggingface(config: ConvertConfig) -> Path:
    """Write a checkpoint's language model as a Hugging Face folder; return it. Raises UserError."""
    parallel = start_parallel(config.layout, 0, config.waiting, config)
    source, out = require_path(config.source, "source"), _require_out(config)
    found = network_at(source, config.role, strict=config.strict)
    size, beside = found.size, run_of(found.folder) / "tokenizer"
    tokenizer = _load_tokenizer(config.tokenizer or beside, size)
    network = build_network("language", size, parallel, numerics=Numerics(dtype=config.dtype))
    fingerprint = tokenizer.fingerprint()
    load_weights(network, found.folder, role=config.role, tokenizer_fingerprint=fingerprint)
    save_huggingface(network, out, tokenizer, file_bytes=int(config.file_gigabytes * 1e9))
    return out


def read_size(folder: Path) -> GPTSize:
    """Return the size of the GPT-2 in a Hugging Face folder; raises UserError if it is not ours."""
    path = folder / "config.json"
    try:
        return size_of_config(read_object(path, max_bytes=_MAX_CONFIG_BYTES))
    except ValueError as error:
        raise UserError(f"{path}: {error}") from None


def load_huggingface(network: Network, folder: Path) -> None:
    """Fill a language model from a Hugging Face folder, with this rank's share of each tensor.

    An optimizer that already holds fp32 masters has to adopt_weights() afterwards. Raises UserError
    for another size, and for a tensor that is missing, of another shape, or not finite.
    """
    if network.kind != "language":
        raise ValueError("a Hugging Face GPT-2 is a language model; load it into one")
    size = read_size(folder)
    for name, value in dataclasses.asdict(size).items():
        if value != (mine := getattr(network.size, name)):
            raise UserError(f"{folder}: {name} is {value}, this run's model has {mine}")
    found = _find_tensors(folder, size)
    layout, tp_rank = network.parallel.layout, network.parallel.tp_rank
    for name, parameter in _parameters(network):
        theirs = huggingface_name(name)
        stored = found[theirs]
        shard = to_shard(name, stored.read(), size, tp=layout.tp, tp_rank=tp_rank)
        parameter.data.copy_(shard)
        if not parameter.data.isfinite().all():  # sync
            raise UserError(f"{stored.path}: {theirs} is not finite in {parameter.dtype}")
        if theirs == WORD_EMBEDDING and TIED_HEAD in found:
            head = to_shard(name, found[TIED_HEAD].read(), size, tp=layout.tp, tp_rank=tp_rank)
            if not (head == shard).all():
                raise UserError(
                    f"{found[TIED_HEAD].path}: {TIED_HEAD} differs from {WORD_EMBEDDING}; "
                    "here the head is always the embedding"
                )
    network.mark_changed()


@holding_claims()
def save_huggingface(
    network: Network, folder: Path, tokenizer: Tokenizer, *, file_bytes: int = 5 * 10**9
) -> None:
    """Write a language model as a new Hugging Face folder, whole or not at all; all ranks call it.

    The first data-parallel replica writes. Each pipeline stage has its own files, of at most
    `file_bytes` bytes or one tensor; a tensor's shards meet on the first tensor-parallel rank.
    """
    if network.kind != "language":
        raise ValueError("only a language model is a Hugging Face GPT-2")
    parallel, size = network.parallel, network.size
    parameters = {
        huggingface_name(name): (name, parameter)
        for name, parameter in _parameters(network)
        if name != "output_layer.weight"  # the first stage holds it as the embedding
    }
    files = _plan_files(network, list(parameters), file_bytes)
    with _becoming(folder, parallel) as partial:
        note = said_by_first_rank(lambda: export_tokenizer(tokenizer, partial, size.context_length))
        if note and parallel.is_writer:
            say(note)
        for file_name, (stage, names) in files.items():
            if stage != parallel.pp_rank or parallel.dp_rank > 0:
                continue
            tensors = {}
            for theirs in names:
                name, parameter = parameters[theirs]
                shards = _gather(parameter.data, parallel)
                if shards:
                    tensors[theirs] = from_shards(name, shards, size)
            if tensors:
                _write_tensors(partial / file_name, tensors)
        dist.barrier()
        if parallel.is_writer:
            if len(files) > 1:
                _write_json(partial / "model.safetensors.index.json", _index(files, network))
            config = config_of_size(size, dtype=network.dtype, eos_id=tokenizer.eos_id)
            _write_json(partial / "config.json", config)


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


def _require_out(config: ConvertConfig) -> Path:
    if config.out is None:
        raise UserError("--out is required: the folder to make")
    return config.out


def _find_tensors(folder: Path, size: GPTSize) -> dict[str, StoredTensor]:
    """Return the tensors of that model by GPT2LMHeadModel's names, after checking all of them."""
    stored_tensors = open_weights(folder)
    paths = {stored.path for stored in stored_tensors.values()}
    where = next(iter(paths)) if len(paths) == 1 else folder
    found: dict[str, StoredTensor] = {}
    for stored_name, stored in stored_tensors.items():
        name = canonical_name(stored_name)
        if name in found:
            raise UserError(f"{stored.path}: {name!r:.{_MOST_SHOWN}} is there twice")
        if name is not None:
            found[name] = stored
    expected, num_bytes = {TIED_HEAD}, 0
    for name, shape in tensor_shapes(size):  # however many layers: it ends with the first missing
        if name not in found:
            raise UserError(f"{where}: tensor {name} is missing")
        _check_tensor(name, found[name], shape)
        expected.add(name)
        num_bytes += math.prod(shape) * found[name].dtype.itemsize
    if TIED_HEAD in found:
        _check_tensor(TIED_HEAD, found[TIED_HEAD], (size.vocab_size, size.hidden_size))
    for name in found.keys() - expected:
        shown = f"{name!r:.{_MOST_SHOWN}}"
        raise UserError(f"{found[name].path}: {shown} is no tensor of a GPT-2 of {size}")
    # Tensors of a torch file may share their numbers: a small file, and a model of any size.
    if num_bytes > sum(path.stat().st_size for path in paths):
        raise UserError(f"{where}: tensors of {num_bytes} bytes in fewer bytes: some are the same")
    return found


def _check_tensor(name: str, stored: StoredTensor, shape: tuple[int, ...]) -> None:
    if stored.shape != shape:
        raise UserError(
            f"{stored.path}: {name} has shape {list(stored.shape)!s:.{_MOST_SHOWN}}, "
            f"config.json asks for {list(shape)}"
        )
    if stored.dtype not in _FLOATS:
        raise UserError(f"{stored.path}: {name} is {stored.dtype}, not a float of 16 bits or more")


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


def _plan_files(
    network: Network, names: list[str], file_bytes: int
) -> dict[str, tuple[int, list[str]]]:
    """Return {file: (pipeline stage, tensors)}, alike on all ranks; `names` are this stage's."""
    parallel = network.parallel
    by_stage: list[list[str]] = [[]] * parallel.layout.pp
    dist.all_gather_object(by_stage, names, group=parallel.pp_group)
    num_bytes = _tensor_bytes(network)
    groups: list[tuple[int, list[str]]] = []
    for stage, stage_names in enumerate(by_stage):
        room = -1
        for name in stage_names:
            if num_bytes[name] > room:
                groups.append((stage, []))
                room = file_bytes
            groups[-1][1].append(name)
            room -= num_bytes[name]
    if len(groups) == 1:
        return {"model.safetensors": groups[0]}
    total = len(groups)
    return {f"model-{i:05d}-of-{total:05d}.safetensors": g for i, g in enumerate(groups, start=1)}


def _index(files: dict[str, tuple[int, list[str]]], network: Network) -> dict:
    total = sum(_tensor_bytes(network).values())
    file_of = {name: file for file, (_, names) in files.items() for name in names}
    return {"metadata": {"total_size": total}, "weight_map": file_of}


def _tensor_bytes(network: Network) -> dict[str, int]:
    """Return the bytes of every tensor in the network's dtype."""
    shapes = tensor_shapes(network.size)
    return {name: torch.Size(shape).numel() * network.dtype.itemsize for name, shape in shapes}


def _load_tokenizer(path: Path, size: GPTSize) -> Tokenizer:
    """Return the tokenizer, which must fit the model."""
    require_path(path, "tokenizer")
    tokenizer = load_shared_tokenizer(lambda: path)
    tokenizer.check_fits(size.vocab_size)
    return tokenizer


def _write_json(path: Path, value: dict) -> None:
    with replacing(path) as stream:
        stream.write((json.dumps(value, indent=2) + "\n").encode())
