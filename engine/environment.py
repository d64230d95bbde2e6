"""What this process finds in its environment, and what it leaves there for the libraries beneath.

CUDA, Triton and Inductor read theirs when they are imported or first used, so a recipe sets them
before (engine/recipe.py). Imports neither torch nor megatron.
"""

import contextlib
import getpass
import json
import os
import tempfile
import time
import warnings
from collections.abc import Callable, Mapping
from pathlib import Path

from engine.errors import UserError, quoted
from engine.printable import ERROR_CHARACTERS, printable

# Linux's names of the file systems that several nodes share; those of FUSE, but that of containers,
# are taken for shared too.
_SHARED = (
    *("nfs", "nfs4", "lustre", "gpfs", "beegfs", "ceph", "cifs", "smb3", "afs", "wekafs", "panfs"),
    *("glusterfs", "orangefs", "pvfs2", "9p", "virtiofs"),
)
_MOUNTS = Path("/proc/self/mountinfo")
_MAX_DIGITS = 9  # of a rank, or a number of them
# By torchrun and by srun. SLURM_NTASKS would not do: the shell of a job has it too, and is alone.
_RANK = ("RANK", "SLURM_PROCID")
_WORLD_SIZE = ("WORLD_SIZE", "SLURM_STEP_NUM_TASKS")
_LOCAL_RANK = ("LOCAL_RANK", "SLURM_LOCALID")


def rank_of_environment() -> int:
    """Return this process's global rank from torchrun's or srun's environment; 0 when launched
    alone. UserError where that is no number."""
    return _number(_RANK, 0)


def world_size_of_environment() -> int:
    """Return the number of ranks of this launch; 1 when launched alone. UserError where that is no
    number."""
    return _number(_WORLD_SIZE, 1)


def check_launch() -> None:
    """Raise UserError for an environment in which no ranks can meet."""
    rank, world_size = rank_of_environment(), world_size_of_environment()
    rank_name, size_name = _set_one(_RANK), _set_one(_WORLD_SIZE)
    if world_size < 1:
        raise UserError(f"{size_name} is {world_size}, and must be at least 1")
    if not 0 <= rank < world_size:
        why = f"{size_name} - 1" if size_name else f"{_WORLD_SIZE[0]} is not set"
        raise UserError(f"{rank_name} is {rank}, and must be from 0 to {world_size - 1}: {why}")
    if rank_name == "RANK" and size_name is None:  # a job's own shell is SLURM_PROCID 0
        raise UserError("RANK is set, and WORLD_SIZE is not: of how many ranks is this one?")
    if rank_name is None and world_size > 1:
        raise UserError(f"{size_name} is {world_size}, and RANK is not set: which one is this?")
    port = _number(("MASTER_PORT",), 29500)
    if not 0 < port < 1 << 16:
        raise UserError(f"MASTER_PORT is {port}, and must be from 1 to 65535")
    local_rank = _number(_LOCAL_RANK, 0)
    if local_rank < 0:
        raise UserError(f"{_set_one(_LOCAL_RANK)} is {local_rank}, and must be at least 0")


def is_first_on_node() -> bool:
    """Return whether this is the first of its node's ranks."""
    return _number(_LOCAL_RANK, 0) == 0


def has_store_of_launcher() -> bool:
    """Return whether the ranks meet at a store that torchrun keeps, and that ends with it."""
    return os.environ.get("TORCHELASTIC_USE_AGENT_STORE") == "True"


def is_under_torchrun() -> bool:
    """Return whether torchrun has started this process, and ends all others when it fails."""
    return "TORCHELASTIC_RUN_ID" in os.environ


def is_launched() -> bool:
    """Return whether torchrun or srun has started this process, and would see it end."""
    return is_under_torchrun() or "SLURM_STEP_NUM_TASKS" in os.environ


def _set_one(names: tuple[str, ...]) -> str | None:
    """Return the first of these variables that is there."""
    return next((name for name in names if name in os.environ), None)


def _number(names: tuple[str, ...], default: int) -> int:
    """Return the number in the first of these variables that is there."""
    name = _set_one(names)
    if name is None:
        return default
    text = os.environ[name]
    try:
        return int(text) if len(text) <= _MAX_DIGITS else int("")
    except ValueError:
        raise UserError(f"{name} must be a whole number, got {quoted(text)}") from None


def attempt_of_environment() -> int:
    """Return how often torchrun has started this launch's ranks anew; 0 at first and elsewhere.

    Its store outlives them, and has what the ranks of before have said.
    """
    return int(os.environ.get("TORCHELASTIC_RESTART_COUNT", "0"))


def tell_torchrun(message: str) -> None:
    """Have torchrun end its report with why this rank failed; elsewhere do nothing.

    It prints a traceback of its own, and below it what the first rank to fail has written into the
    file TORCHELASTIC_ERROR_FILE: in torch.distributed.elastic's form, which has no field for less.
    What the file has it prints as it is.
    """
    path = os.environ.get("TORCHELASTIC_ERROR_FILE")
    if path:
        shown = printable(message, limit=ERROR_CHARACTERS)
        said = {"message": shown, "extraInfo": {"timestamp": str(int(time.time()))}}
        with contextlib.suppress(OSError):  # the run's own words have been printed
            Path(path).write_text(json.dumps({"message": said}))


def prepare_libraries(tp: int, directory: Path | None = None) -> None:
    """Set what CUDA, Triton and Inductor read for a run that trains with that much tensor
    parallelism, where the site has not. Silence what megatron and torch say of themselves."""
    quiet_libraries()
    os.environ.update(
        library_settings(
            os.environ,
            tp=tp,
            world_size=world_size_of_environment(),
            node_folder=_node_folder(),
            directory=directory if world_size_of_environment() > 1 else None,
            is_shared=lambda path: shared_file_system(path) is not None,
        )
    )


def quiet_libraries() -> None:
    """Silence megatron's and torch's warnings of their own; called before megatron is imported.

    megatron-core tells every process that Transformer Engine and Apex are absent, and torch of
    names that megatron still uses.
    """
    warnings.filterwarnings("ignore", module=r"megatron\.|torch\.distributed")


def library_settings(
    environment: Mapping[str, str],
    *,
    tp: int,
    world_size: int,
    node_folder: Path | None,
    directory: Path | None = None,
    is_shared: Callable[[Path], bool],
) -> dict[str, str]:
    """Return the variables that a run wants and the environment does not have.

    node_folder: this node's own place for caches; none: there is none. directory: the run's folder,
    where several ranks may get stuck in it.
    """
    wanted: dict[str, str] = {}
    if tp > 1:
        # Kernels then start in the order they are queued in: megatron counts on it to overlap
        # tensor-parallel communication with matrix products (tensor_parallel/layers.py). Elsewhere
        # the driver's own number lets copies run beside them: residency's both ways.
        wanted["CUDA_DEVICE_MAX_CONNECTIONS"] = "1"
    if world_size > 1:
        # By default 32 processes a rank, to compile a handful of small kernels.
        wanted["TORCHINDUCTOR_COMPILE_THREADS"] = "1"
        # torch prints its own stack at each look at a store that is gone; we say it in words.
        wanted["TORCH_CPP_LOG_LEVEL"] = "ERROR"
    if directory is not None:
        # The last collectives of each rank, written when one times out (NCCL's alone; our choice of
        # how many is torch's own).
        wanted["TORCH_FR_BUFFER_SIZE"] = "2000"
        wanted["TORCH_NCCL_DUMP_ON_TIMEOUT"] = "1"
        wanted["TORCH_FR_DUMP_TEMP_FILE"] = str(directory / "nccl_trace_rank_")
    if node_folder is not None:
        for name, path in cache_folders(environment).items():
            if is_shared(path):
                wanted[name] = str(node_folder / name.lower().removesuffix("_cache_dir"))
    return {name: value for name, value in wanted.items() if name not in environment}


def cache_folders(environment: Mapping[str, str] = os.environ) -> dict[str, Path]:
    """Return where compiled kernels are kept, by the variable that moves them: a rank that reads a
    file there which another replaces over a network ends with a stale file handle."""
    home = Path(environment.get("TRITON_HOME", "~")).expanduser()
    try:
        user = getpass.getuser()
    except (KeyError, OSError):  # a container that knows no name for it
        user = str(os.getuid())
    defaults = {
        "TRITON_CACHE_DIR": home / ".triton" / "cache",
        "TORCHINDUCTOR_CACHE_DIR": Path(tempfile.gettempdir()) / f"torchinductor_{user}",
        "CUDA_CACHE_PATH": Path("~/.nv/ComputeCache").expanduser(),
    }
    return {name: Path(environment.get(name, path)) for name, path in defaults.items()}


def shared_file_system(path: Path, mounts: Path = _MOUNTS) -> str | None:
    """Return the type of the file system that a path, which need not exist, lies on, where it is
    one that nodes share; none: it is the node's own, or nobody knows."""
    try:
        lines = mounts.read_text().splitlines()
    except OSError:  # not Linux
        return None
    where, found = path.absolute().resolve(), (-1, "")
    for line in lines:
        # Of ID PARENT DEVICE ROOT POINT OPTIONS ... - TYPE SOURCE OPTIONS, proc(5).
        fields, _, rest = line.partition(" - ")
        point = fields.split(" ")[4].encode().decode("unicode_escape")  # a space is \040
        if where.is_relative_to(point) and len(point) >= found[0]:  # the last one covers others
            found = (len(point), rest.split(" ")[0])
    kind = found[1]
    is_shared = kind in _SHARED or (kind.startswith("fuse.") and kind != "fuse.fuse-overlayfs")
    return kind if is_shared else None


def _node_folder() -> Path | None:
    """Return this user's folder for caches on the node's own disk, made where it is missing; none
    where there is no such place."""
    for parent in dict.fromkeys((Path(tempfile.gettempdir()), Path("/tmp"))):
        folder = parent / f"trident-{os.getuid()}"
        if shared_file_system(parent) is None:
            try:
                folder.mkdir(mode=0o700, exist_ok=True)
                if folder.stat().st_uid == os.getuid():  # what lies there is run
                    return folder
            except OSError:
                continue
    return None
