"""A Hugging Face folder as a network that a run is made from: written once into the run's own
folder, as a checkpoint of ours, and read from there by every start.

    RUN/sources/init_from/       as engine/checkpoints/sources.py has it of a run's checkpoint

The ranks write it as they hold it in the stage's layout, tensor by tensor: none holds the whole.
"""

import json
from collections.abc import Mapping
from pathlib import Path
from typing import Any

import torch.distributed as dist
import xxhash

from engine.checkpoints.checkpointer import Checkpointer
from engine.checkpoints.manifest import digest_of_file, read_manifest
from engine.checkpoints.sources import Source, digest_of_network
from engine.errors import UserError
from engine.huggingface.convert import load_huggingface
from engine.huggingface.folder_tokenizer import check_own_tokenizer, warn_of_own_tokenizer
from engine.huggingface.foreign import is_foreign, require_model_folder
from engine.huggingface.model_folder import ModelFolder, find_model, read_kind
from engine.huggingface.scores import say_where_scores_are_read
from engine.ranks.first_rank import said_by_first_rank
from engine.run import Run, tokenizer_path
from engine.settings.numerics import Numerics
from engine.training.network import build_network


def take_model(path: Path, role: str, folder: Path, run: Run, config: Any) -> Source:
    """Write the model of a Hugging Face folder into `folder`, which must not be there, as
    a checkpoint of weights alone with network `role`; all ranks call together.

    config: of the stage. The weights have the dtype of the run, which rounds them once, as a run
    that is read would be. Raises UserError for a model that is not ours, or is no `role`, or has
    fewer ids than the run's tokenizer. So it does for another tokenizer that nobody chose, and
    where a rank sees another folder than the first.
    """
    if getattr(config, "tokenizer", None) is None:
        check_own_tokenizer(path, run.tokenizer)
    else:
        warn_of_own_tokenizer(path, run.tokenizer)
    model = find_model(path, "language" if role == "policy" else "scalar")
    if model.kind == "scalar" and run.parallel.is_writer:
        say_where_scores_are_read(model, run.tokenizer.eos_id)
    run.tokenizer.check_fits(model.size.vocab_size)
    digest = _shared_digest(path, model)
    network = build_network(
        model.kind, model.size, run.parallel, numerics=Numerics(dtype=config.numerics.dtype)
    )
    load_huggingface(network, path, model)
    checkpointer = Checkpointer(
        directory=folder.parent,
        parallel=run.parallel,
        networks={role: network},
        optimizers={},
        tokenizer_fingerprint=run.tokenizer.fingerprint(),
    )
    with checkpointer:
        checkpointer.save_weights(folder.name)
    return Source(
        checkpoint=str(path),
        network="",
        step=None,
        roles=(role,),
        xxh3_128=said_by_first_rank(lambda: digest_of_network(read_manifest(folder), role)),
        is_linked=False,
        model_xxh3_128=digest,
    )


def tokenizer_of(
    tokenizer: Path | None, start: Path | None, directory: Path, option: str = "init-from"
) -> Path:
    """Return where a stage's tokenizer is, as engine.run.tokenizer_path, for all ranks, who call
    together. UserError where what it starts from is another program's and no Hugging Face folder:
    of such a one its tokenizer says little."""

    def look(path: Path) -> str:
        if is_foreign(path):
            require_model_folder(path)
        return ""

    path = tokenizer_path(tokenizer, start, directory, option)
    if tokenizer is None and path == start:
        said_by_first_rank(lambda: look(path))
    return path


def digest_of_model(folder: Path) -> str:
    """Return a digest of the model in a Hugging Face folder, wherever that lies, on the rank that
    asks: of config.json and of all files of weights, which are read. Raises UserError."""
    files = _files(folder, find_model(folder, read_kind(folder)))
    return _joined({path.name: digest_of_file(path).xxh3_128 for path in files})


def _shared_digest(folder: Path, model: ModelFolder) -> str:
    """Return digest_of_model, for which each rank reads its share of the files; UserError where
    it sees others than the first rank."""
    files = _files(folder, model)
    seen = json.dumps([(path.name, path.stat().st_size) for path in files])
    if said_by_first_rank(lambda: seen) != seen:
        raise UserError(
            f"{folder}: rank {dist.get_rank()} sees other files there than the first rank; have "
            "all nodes see the same folder"
        )
    mine = {p.name: digest_of_file(p).xxh3_128 for p in files[dist.get_rank() :: _num_ranks()]}
    shares: list[dict[str, str]] = [{}] * _num_ranks()
    dist.all_gather_object(shares, mine)
    return _joined({name: digest for share in shares for name, digest in share.items()})


def _num_ranks() -> int:
    return dist.get_world_size()


def _files(folder: Path, model: ModelFolder) -> list[Path]:
    paths = {tensor.path for tensor in model.tensors.values()}
    return sorted({folder / "config.json", *paths}, key=lambda path: path.name)


def _joined(digests: Mapping[str, str]) -> str:
    return xxhash.xxh3_128_hexdigest(json.dumps(sorted(digests.items())).encode())
