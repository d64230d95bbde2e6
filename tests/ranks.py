"""Several ranks over gloo in one test: each a process of its own, as torchrun would start them."""

import datetime
import multiprocessing
import os
import pickle
import tempfile
from collections.abc import Callable
from pathlib import Path
from typing import Any

import torch
import torch.distributed as dist
import torch.multiprocessing as mp

# A rank is forked from a process that has imported all this already: seconds less a rank. With a
# GPU it is a fresh process, as some of it may talk to the driver, which does not survive a fork.
PRELOADED = ["torch", "engine.sft", "engine.rm", "engine.ppo", "tests.tiny"]
PRELOADED += ["torch.utils.tensorboard", "engine.recipe"]
START_METHOD = "spawn" if torch.cuda.is_available() else "forkserver"
multiprocessing.set_forkserver_preload(PRELOADED)

TIMEOUT = datetime.timedelta(seconds=120)  # of one collective: a rank that failed ends the others


def run_ranks(function: Callable[..., Any], world_size: int, *args: Any) -> list[Any]:
    """Call `function(*args)` on every rank; return what each returned, in rank order.

    The function is found again by its name, so it stands at the top level of a test file; arguments
    and results go through pickle. The ranks are joined already: start_parallel takes them over.
    An exception on a rank ends all of them and is raised here with its traceback.
    """
    with tempfile.TemporaryDirectory() as name:
        folder = Path(name)
        mp.start_processes(
            _run_rank,
            args=(function, world_size, folder, dict(os.environ), args),
            nprocs=world_size,
            start_method=START_METHOD,
        )
        return [
            pickle.loads((folder / f"result_{rank}").read_bytes()) for rank in range(world_size)
        ]


def _run_rank(
    rank: int,
    function: Callable[..., Any],
    world_size: int,
    folder: Path,
    environment: dict[str, str],
    args: tuple,
) -> None:
    torch.set_num_threads(1)
    os.environ.clear()  # of when the first ranks were started, in a forked process
    os.environ.update(environment)
    os.environ.update(RANK=str(rank), LOCAL_RANK=str(rank), WORLD_SIZE=str(world_size))
    store = dist.FileStore(str(folder / "store"), world_size)
    dist.init_process_group("gloo", store=store, rank=rank, world_size=world_size, timeout=TIMEOUT)
    result = function(*args)
    (folder / f"result_{rank}").write_bytes(pickle.dumps(result))
    dist.barrier()  # no rank leaves while another still talks to it
    dist.destroy_process_group()
