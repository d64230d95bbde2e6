"""The whole preflight over gloo, with faults planted on its ranks."""

import datetime
import json
import os
import socket
import subprocess
import sys
import threading
import time
from pathlib import Path

import pytest
import torch
import torch.distributed as dist

from engine.preflight import links
from engine.preflight.check import Meeting, check_nodes, exchange
from engine.preflight.facts import ROOT, code_version
from engine.preflight.faults import Fault
from engine.settings.preflight import PreflightConfig

SECOND = datetime.timedelta(seconds=1)


def check_planted(rank: int, world_size: int, folder: Path) -> None:
    """Take part as a node of one rank: node1 has another code and slow links, node2 no memory."""
    os.environ.update(RANK=str(rank), WORLD_SIZE=str(world_size))
    all_reduce = links._all_reduce

    def slow(tensor: torch.Tensor, group: dist.Backend) -> None:
        time.sleep(0.5)
        all_reduce(tensor, group)

    with pytest.MonkeyPatch.context() as patch:
        patch.setattr("socket.gethostname", lambda: f"node{rank}")
        if rank == 1:
            patch.setattr("engine.preflight.facts.code_version", lambda: "other")
            patch.setattr(links, "_all_reduce", slow)
        if rank == 2:
            patch.setattr("engine.preflight.check.free_memory", lambda device: 2**30)
        config = PreflightConfig(
            directory=folder / "runs",
            timeout_s=60.0,
            payload_mib=1,
            min_free_gib=1.5,
            min_link_gb_s=0.004,  # 1 MiB in 0.5 s is 0.002
            slow_share=0.0,  # two cores are no measure of each other
        )
        store = dist.FileStore(str(folder / "store"), world_size)
        facts, faults = check_nodes(config, store)
    assert [f.rank for f in facts] == [0, 1, 2]
    (folder / f"faults_{rank}").write_text(json.dumps(faults))


@pytest.mark.slow
def test_every_rank_names_the_nodes_that_are_not_fit(tmp_path: Path):
    torch.multiprocessing.spawn(check_planted, args=(3, tmp_path), nprocs=3)
    found = [json.loads((tmp_path / f"faults_{rank}").read_text()) for rank in range(3)]
    assert found[0] == found[1] == found[2]
    code, memory, link = found[0]
    assert code == ["node1", f"code is other, elsewhere {code_version()} (rank 1)"]
    assert memory == ["node2", "1.0 GiB of memory free, under 1.5 (rank 2)"]
    assert link[0] == "node1"
    assert link[1].startswith("links to both neighbours: 0.00")
    assert list((tmp_path / "runs").iterdir()) == []  # what was written is gone


def test_exchange_hears_who_answers_in_time():
    store, heard = dist.HashStore(), {}

    def answer(rank: int) -> None:
        meeting = Meeting(store=store, rank=rank, world_size=4)
        heard[rank] = exchange(meeting, "nodes", f"node{rank // 2}", SECOND)

    ranks = [threading.Thread(target=answer, args=(rank,)) for rank in (0, 1, 3)]
    for thread in ranks:
        thread.start()
    for thread in ranks:
        thread.join()
    assert heard[0] == heard[1] == heard[3] == {0: "node0", 1: "node0", 3: "node1"}


def free_port() -> int:
    with socket.socket() as s:
        s.bind(("127.0.0.1", 0))
        return s.getsockname()[1]


def run_rank(rank: int, port: int, folder: Path) -> subprocess.Popen[str]:
    """Start one of two ranks, whose fellow never comes."""
    command = [sys.executable, "recipes/slurm/preflight.py", "--timeout-s", "3"]
    environment = {"RANK": str(rank), "WORLD_SIZE": "2", "PYTHONPATH": str(ROOT)}
    return subprocess.Popen(
        [*command, "--nodes", "left", "right", "--directory", str(folder)],
        env=os.environ | environment | {"MASTER_ADDR": "127.0.0.1", "MASTER_PORT": str(port)},
        cwd=ROOT,
        stderr=subprocess.PIPE,
        text=True,
    )


def test_node_of_a_missing_rank_is_named_and_the_status_is_not_0(tmp_path: Path):
    ranks = [run_rank(rank, free_port(), tmp_path) for rank in (0, 1)]  # at two ports: both alone
    for process, line in zip(
        ranks,
        ("right: rank 1 did not answer in 3 s", "left: rank 0 did not answer in 3 s"),
        strict=True,
    ):
        _, errors = process.communicate(timeout=120)
        assert process.returncode == 1
        assert f"preflight: {line}" in errors.splitlines()


def test_disk_that_cannot_be_written_is_a_fault(tmp_path: Path):
    (tmp_path / "file").touch()
    facts, faults = check_nodes(PreflightConfig(directory=tmp_path / "file"), dist.HashStore())
    message = f"{tmp_path / 'file'}: cannot be written: File exists (rank 0)"
    assert faults == [Fault(facts[0].node, message)]


def test_kernels_kept_on_a_shared_file_system_or_nowhere_are_a_fault(tmp_path: Path, monkeypatch):
    config = PreflightConfig(directory=tmp_path)
    monkeypatch.setenv("TRITON_CACHE_DIR", str(tmp_path / "triton"))
    assert check_nodes(config, dist.HashStore())[1] == []
    (tmp_path / "file").touch()
    monkeypatch.setenv("TRITON_CACHE_DIR", str(tmp_path / "file"))
    (fault,) = check_nodes(config, dist.HashStore())[1]
    assert f"TRITON_CACHE_DIR {tmp_path / 'file'}: cannot be written" in fault.message
    monkeypatch.setattr("engine.preflight.facts.shared_file_system", lambda path: "nfs4")
    (fault,) = check_nodes(config, dist.HashStore())[1]
    assert f"TRITON_CACHE_DIR {tmp_path / 'file'}: lies on nfs4, which nodes share" in fault.message
