"""What a run leaves in the environment for CUDA, Triton and Inductor."""

import json
import os
import subprocess
import sys
import time
from pathlib import Path

import pytest
from torch.distributed.elastic.multiprocessing.errors import ChildFailedError, ProcessFailure

from engine.environment import (
    cache_folders,
    check_launch,
    is_launched,
    library_settings,
    prepare_libraries,
    rank_of_environment,
    shared_file_system,
    tell_torchrun,
)
from engine.errors import UserError
from tests.hostile import EVERYTHING, dangers

CACHES = ("TRITON_CACHE_DIR", "TORCHINDUCTOR_CACHE_DIR", "CUDA_CACHE_PATH")
MOUNTS = """\
22 1 8:1 / / rw,relatime shared:1 - ext4 /dev/sda1 rw
23 22 0:21 / /home rw,relatime shared:2 - nfs4 server:/home rw,vers=4.2
24 23 8:2 / /home/local rw - xfs /dev/sdb1 rw
25 22 0:22 / /lustre/my\\040data rw - lustre 10.0.0.1@o2ib:/fs rw
26 22 0:23 / /juice rw - fuse.juicefs juice rw
27 22 0:24 / /container rw - fuse.fuse-overlayfs overlay rw
28 22 0:25 / /over rw - ext4 /dev/sdc1 rw
29 22 0:26 / /over rw - beegfs beegfs_nodev rw
"""


def settings(environment: dict[str, str], *, tp: int = 1, world_size: int = 1, shared: str = "-"):
    return library_settings(
        environment,
        tp=tp,
        world_size=world_size,
        node_folder=Path("/tmp/trident"),
        is_shared=lambda path: str(path).startswith(shared),
    )


def test_rank_comes_from_torchrun_or_srun(monkeypatch: pytest.MonkeyPatch):
    monkeypatch.delenv("RANK", raising=False)
    assert rank_of_environment() == 0
    monkeypatch.setenv("SLURM_PROCID", "3")
    assert rank_of_environment() == 3
    monkeypatch.setenv("RANK", "2")
    assert rank_of_environment() == 2


LAUNCH = (
    *("RANK", "WORLD_SIZE", "LOCAL_RANK", "MASTER_PORT", "TORCHELASTIC_RUN_ID"),
    *("SLURM_PROCID", "SLURM_STEP_NUM_TASKS", "SLURM_LOCALID"),
)


def launch(monkeypatch: pytest.MonkeyPatch, words: str) -> None:
    """Have the environment of one launch, "NAME=VALUE NAME=VALUE"."""
    for name in LAUNCH:
        monkeypatch.delenv(name, raising=False)
    for word in words.split():
        monkeypatch.setenv(*word.split("=", 1))


@pytest.mark.parametrize(
    ("words", "said"),
    [
        ("RANK=1", "RANK is 1, and must be from 0 to 0: WORLD_SIZE is not set"),
        ("RANK=-1", "RANK is -1, and must be from 0 to 0: WORLD_SIZE is not set"),
        ("RANK=0", "RANK is set, and WORLD_SIZE is not"),
        ("SLURM_PROCID=1", "SLURM_PROCID is 1, and must be from 0 to 0: WORLD_SIZE is not set"),
        ("RANK=1 WORLD_SIZE=1", "RANK is 1, and must be from 0 to 0: WORLD_SIZE - 1"),
        ("WORLD_SIZE=2", "WORLD_SIZE is 2, and RANK is not set"),
        ("SLURM_STEP_NUM_TASKS=2", "SLURM_STEP_NUM_TASKS is 2, and RANK is not set"),
        ("RANK=2 WORLD_SIZE=2", "RANK is 2, and must be from 0 to 1: WORLD_SIZE - 1"),
        ("RANK=-1 WORLD_SIZE=2", "RANK is -1, and must be from 0 to 1: WORLD_SIZE - 1"),
        (
            "SLURM_PROCID=3 SLURM_STEP_NUM_TASKS=2",
            "SLURM_PROCID is 3, and must be from 0 to 1: SLURM_STEP_NUM_TASKS - 1",
        ),
        ("WORLD_SIZE=0", "WORLD_SIZE is 0, and must be at least 1"),
        ("WORLD_SIZE=two", "WORLD_SIZE must be a whole number, got 'two'"),
        ("RANK=1.0 WORLD_SIZE=2", "RANK must be a whole number, got '1.0'"),
        (f"WORLD_SIZE={'9' * 12}", "WORLD_SIZE must be a whole number, got '999"),
        ("LOCAL_RANK=-1", "LOCAL_RANK is -1, and must be at least 0"),
        ("LOCAL_RANK=", "LOCAL_RANK must be a whole number, got ''"),
        ("MASTER_PORT=0", "MASTER_PORT is 0, and must be from 1 to 65535"),
        ("MASTER_PORT=65536", "MASTER_PORT is 65536, and must be from 1 to 65535"),
        ("MASTER_PORT=http", "MASTER_PORT must be a whole number, got 'http'"),
    ],
)
def test_a_launch_in_which_no_ranks_can_meet_is_an_error(words: str, said: str, monkeypatch):
    launch(monkeypatch, words)
    with pytest.raises(UserError) as error:
        check_launch()
    assert str(error.value).startswith(said)


@pytest.mark.parametrize(
    ("words", "has_launcher"),
    [
        ("", False),
        ("SLURM_PROCID=0", False),  # the shell of a job
        ("RANK=0 WORLD_SIZE=1 MASTER_PORT=65535", False),
        ("WORLD_SIZE=1", False),
        ("SLURM_PROCID=1 WORLD_SIZE=2", False),  # a script that exports the latter alone
        ("RANK=0 WORLD_SIZE=1 SLURM_LOCALID=5", False),  # a task of srun that is a run of its own
        ("RANK=1 WORLD_SIZE=2 LOCAL_RANK=1 TORCHELASTIC_RUN_ID=x", True),
        ("SLURM_PROCID=1 SLURM_STEP_NUM_TASKS=2 SLURM_LOCALID=0", True),
        # torchrun's ranks, each node's started by srun
        ("RANK=9 WORLD_SIZE=16 SLURM_PROCID=1 SLURM_STEP_NUM_TASKS=2", True),
    ],
)
def test_a_launch_that_is_whole_is_accepted(words: str, has_launcher: bool, monkeypatch):
    launch(monkeypatch, words)
    check_launch()
    assert is_launched() == has_launcher


@pytest.mark.parametrize(("tp", "wanted"), [(1, None), (2, "1"), (8, "1")])
def test_kernels_start_in_order_where_there_is_tensor_parallelism(tp: int, wanted: str | None):
    name = "CUDA_DEVICE_MAX_CONNECTIONS"
    assert settings({}, tp=tp).get(name) == wanted
    assert name not in settings({name: "8"}, tp=tp)


def test_several_ranks_compile_with_a_process_each():
    name = "TORCHINDUCTOR_COMPILE_THREADS"
    assert name not in settings({})
    assert settings({}, world_size=8)[name] == "1"
    assert name not in settings({name: "4"}, world_size=8)


RECORDER = {
    "TORCH_FR_BUFFER_SIZE": "2000",
    "TORCH_NCCL_DUMP_ON_TIMEOUT": "1",
    "TORCH_FR_DUMP_TEMP_FILE": "runs/x/nccl_trace_rank_",
}


@pytest.mark.parametrize("site", [{}, {"TORCH_FR_BUFFER_SIZE": "7"}])
@pytest.mark.parametrize("world_size", [1, 2])
def test_collectives_of_several_ranks_are_recorded_in_the_runs_folder(
    world_size: int, site: dict[str, str], monkeypatch: pytest.MonkeyPatch
):
    environment = {"WORLD_SIZE": str(world_size)} | site
    monkeypatch.setattr("os.environ", environment)
    prepare_libraries(1, Path("runs/x"))
    found = {name: environment[name] for name in RECORDER if name in environment}
    assert found == (RECORDER if world_size > 1 else {}) | site
    # Or torch shows its own stack at each look at a store that is gone.
    assert environment.get("TORCH_CPP_LOG_LEVEL") == ("ERROR" if world_size > 1 else None)


def test_caches_leave_a_shared_file_system_unless_the_site_put_them_there():
    home = str(Path.home())
    moved = settings({}, shared=home)
    assert moved == {
        "TRITON_CACHE_DIR": "/tmp/trident/triton",
        "CUDA_CACHE_PATH": "/tmp/trident/cuda_cache_path",
    }
    assert set(settings({}, shared="/")) == set(CACHES)
    assert settings({"TRITON_HOME": "/net"}, shared="/net") == {
        "TRITON_CACHE_DIR": "/tmp/trident/triton"
    }
    assert settings(dict.fromkeys(CACHES, "/net/cache"), shared="/net") == {}
    assert settings({}) == {}


def test_caches_lie_where_the_libraries_put_them():
    """In a process of its own: Triton and Inductor read the environment when they are imported."""
    program = """
import triton.knobs
from torch._inductor.runtime.cache_dir_utils import cache_dir
print(triton.knobs.cache.dir, cache_dir())
"""
    for environment in ({}, {name: f"/tmp/{name}" for name in CACHES}):
        rest = {name: value for name, value in os.environ.items() if name not in CACHES}
        done = subprocess.run(
            [sys.executable, "-c", program],
            env=rest | environment,
            capture_output=True,
            text=True,
            check=True,
        )
        folders = cache_folders(rest | environment)
        assert done.stdout.split() == [str(folders[name]) for name in CACHES[:2]]


@pytest.mark.parametrize(
    ("path", "kind"),
    [
        ("/home/user/.triton/cache", "nfs4"),
        ("/home/local/cache", None),
        ("/home2/cache", None),
        ("/lustre/my data/cache", "lustre"),
        ("/juice/cache", "fuse.juicefs"),
        ("/container/cache", None),
        ("/over/cache", "beegfs"),
        ("/tmp/cache", None),
    ],
)
def test_shared_file_system_is_known_by_its_mount(path: str, kind: str | None, tmp_path: Path):
    mounts = tmp_path / "mountinfo"
    mounts.write_text(MOUNTS)
    assert shared_file_system(Path(path), mounts) == kind


def test_where_nobody_knows_the_mounts_nothing_is_shared(tmp_path: Path):
    assert shared_file_system(Path("/home"), tmp_path / "none") is None


def test_recipe_finds_the_environment_set_before_it_imports_torch():
    program = """
import os, sys
from engine.recipe import run_stage
from engine.settings.layout import ParallelLayout
from engine.settings.sft import SFTConfig

def train(config):
    assert "torch" not in sys.modules
    print(os.environ["CUDA_DEVICE_MAX_CONNECTIONS"], os.environ["TORCHINDUCTOR_COMPILE_THREADS"])

run_stage(train, SFTConfig(layout=ParallelLayout(tp=2)), [])
"""
    unset = ("CUDA_DEVICE_MAX_CONNECTIONS", "TORCHINDUCTOR_COMPILE_THREADS")
    rest = {name: value for name, value in os.environ.items() if name not in unset}
    done = subprocess.run(
        [sys.executable, "-c", program],
        env=rest | {"RANK": "0", "WORLD_SIZE": "2"},
        capture_output=True,
        text=True,
        check=False,
    )
    assert done.stdout.splitlines()[0].split() == ["1", "1"], done.stderr


def test_torchruns_report_ends_with_the_ranks_own_line(monkeypatch, tmp_path):
    path = tmp_path / "error.json"
    monkeypatch.setenv("TORCHELASTIC_ERROR_FILE", str(path))
    tell_torchrun("error: nowhere.jsonl does not exist")
    failure = ProcessFailure(local_rank=0, pid=1, exitcode=2, error_file=str(path))
    report = str(ChildFailedError("recipes/sft_tiny.py", {0: failure}))
    assert report.splitlines()[-2] == "  traceback : error: nowhere.jsonl does not exist"
    assert abs(failure.timestamp - time.time()) < 60


def test_a_rank_without_torchrun_writes_nothing(monkeypatch, tmp_path):
    monkeypatch.delenv("TORCHELASTIC_ERROR_FILE", raising=False)
    monkeypatch.chdir(tmp_path)
    tell_torchrun("error: nowhere.jsonl does not exist")
    assert not list(tmp_path.iterdir())


def test_torchrun_is_told_no_command_to_a_terminal(tmp_path, monkeypatch):
    path = tmp_path / "told.json"
    monkeypatch.setenv("TORCHELASTIC_ERROR_FILE", str(path))
    tell_torchrun(f"{EVERYTHING} {'x' * 100_000}")
    said = json.loads(path.read_text())["message"]["message"]
    assert dangers(said) == []
    assert len(said) <= 4000
