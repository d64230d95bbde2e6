"""The jobs of recipes/slurm, on a real Slurm of one node that the tests start and stop."""

import dataclasses
import os
import re
import shutil
import signal
import socket
import subprocess
import sys
import time
from collections.abc import Callable, Iterator
from pathlib import Path

import pytest
import torch

from engine.settings.ppo import PPOConfig
from engine.settings.rm import RMConfig
from engine.settings.saved import load_config
from engine.settings.sft import SFTConfig
from tests.ranks import run_ranks
from tests.tiny import train, weights_of

ROOT = Path(__file__).parents[1]
PROGRAMS = ("munged", "slurmctld", "slurmd", "sbatch", "srun", "scontrol", "scancel")
CONFIG = """
ClusterName=test
SlurmctldHost={host}(127.0.0.1)
AuthType=auth/munge
# A requeued job waits until the credential of its last start has expired.
AuthInfo=socket={folder}/munge.socket,cred_expire=5
SlurmUser=root
SlurmdUser=root
ProctrackType=proctrack/linuxproc
TaskPlugin=task/none
SelectType=select/cons_tres
SchedulerParameters=sched_interval=1,bf_interval=1
ReturnToService=2
StateSaveLocation={folder}/state
SlurmdSpoolDir={folder}/spool
SlurmctldPidFile={folder}/slurmctld.pid
SlurmdPidFile={folder}/slurmd.pid
SlurmctldLogFile={folder}/slurmctld.log
SlurmdLogFile={folder}/slurmd.log
SlurmctldPort={ports[0]}
SlurmdPort={ports[1]}
MpiDefault=none
NodeName=localhost NodeHostname={host} NodeAddr=127.0.0.1 CPUs=2 State=UNKNOWN
PartitionName=debug Nodes=ALL Default=YES MaxTime=INFINITE State=UP
"""
SITE = """
export OMP_NUM_THREADS=1
PYTHON={python}
SRUN_OPTIONS=()
PREFLIGHT_OPTIONS=(--payload-mib 1 {options})
"""
ON_CPU = ("--numerics.dtype", "fp32", "--layout.tp", 1, "--layout.no-sequence-parallel")

pytestmark = [
    pytest.mark.slurm,
    pytest.mark.skipif(
        any(shutil.which(program) is None for program in PROGRAMS),
        reason="Slurm is not installed (Debian: apt install slurm-wlm munge)",
    ),
    pytest.mark.skipif(os.geteuid() != 0, reason="slurmd runs as root"),
]


@dataclasses.dataclass(frozen=True)
class Cluster:
    """A running Slurm, and a checkout whose root jobs are submitted from."""

    folder: Path
    environment: dict[str, str]

    @property
    def checkout(self) -> Path:
        return self.folder / "checkout"

    def call(self, *command: object) -> str:
        done = subprocess.run(
            [str(word) for word in command],
            env=os.environ | self.environment,
            cwd=self.checkout,
            capture_output=True,
            text=True,
            check=False,
        )
        assert done.returncode == 0, done.stderr
        return done.stdout.strip()

    def submit(self, name: str, *options: object, num_ranks: int = 1) -> str:
        """Submit a job of recipes/slurm as a user would, but for its size; return its number."""
        size = ("--nodes=1", f"--ntasks-per-node={num_ranks}", "--time=60")
        return self.call("sbatch", "--parsable", *size, f"recipes/slurm/{name}.sbatch", *options)

    def job(self, number: str) -> dict[str, str]:
        """Return what Slurm knows of a job."""
        shown = self.call("scontrol", "--oneliner", "show", "job", number)
        return dict(pair.split("=", 1) for pair in shown.split(" ") if "=" in pair)

    def wait_for_end(self, number: str) -> str:
        """Return the state in which a job ends."""
        ended = ("COMPLETED", "FAILED", "CANCELLED", "TIMEOUT", "NODE_FAIL")
        wait_until(lambda: self.job(number)["JobState"] in ended, seconds=300)
        return self.job(number)["JobState"]

    def wait_for_steps(self, number: str, run: Path) -> None:
        """Wait until the run of a job has taken a few steps."""

        def has_steps() -> bool:
            assert self.job(number)["JobState"] in ("PENDING", "RUNNING"), self.output_of(number)
            path = run / "metrics.jsonl"
            return path.exists() and path.read_text().count("\n") > 3

        wait_until(has_steps, seconds=300)

    def output_of(self, number: str) -> str:
        """Return what a job's shell and its ranks have written, the newest last."""
        (log,) = self.checkout.glob(f"*-{number}.log")
        ranks = sorted(self.checkout.glob(f"runs/logs/*-{number}/*.log"))
        return "\n".join(path.read_text() for path in (log, *ranks))


def wait_until(holds: Callable[[], bool], seconds: float) -> None:
    deadline = time.monotonic() + seconds
    while not holds():
        assert time.monotonic() < deadline, f"nothing after {seconds} s"
        time.sleep(0.1)


def free_ports() -> list[int]:
    sockets = [socket.socket() for _ in range(2)]
    for s in sockets:
        s.bind(("127.0.0.1", 0))
    ports = [s.getsockname()[1] for s in sockets]
    for s in sockets:
        s.close()
    return ports


@pytest.fixture(scope="module")
def cluster(tmp_path_factory: pytest.TempPathFactory) -> Iterator[Cluster]:
    folder = tmp_path_factory.mktemp("slurm")
    for name in ("state", "spool", "checkout"):
        (folder / name).mkdir()
    for name in ("engine", "kernels", "models", "recipes"):
        (folder / "checkout" / name).symlink_to(ROOT / name)
    key = folder / "munge.key"
    key.write_bytes(os.urandom(128))
    key.chmod(0o600)
    config = CONFIG.format(folder=folder, host=socket.gethostname(), ports=free_ports())
    (folder / "slurm.conf").write_text(config)
    site = folder / "site.sh"
    site.write_text(SITE.format(python=sys.executable, options=""))
    environment = {"SLURM_CONF": str(folder / "slurm.conf"), "TRIDENT_SITE": str(site)}
    cluster = Cluster(folder, environment)
    munge_files = [
        f"--{name}-file={folder}/munge.{suffix}"
        for name, suffix in (("key", "key"), ("pid", "pid"), ("log", "log"), ("seed", "seed"))
    ]
    commands = (
        ["munged", "--foreground", "--force", f"--socket={folder}/munge.socket", *munge_files],
        ["slurmctld", "-D", "-c"],
        ["slurmd", "-D", "-N", "localhost"],
    )
    daemons = []
    try:
        for command in commands:
            with (folder / f"{command[0]}.out").open("w") as out:
                daemon = subprocess.Popen(
                    command, env=os.environ | environment, stdout=out, stderr=out
                )
            daemons.append(daemon)
            time.sleep(1.0)
            assert daemon.poll() is None, (folder / f"{command[0]}.out").read_text()
        wait_until(lambda: "idle" in cluster.call("sinfo", "-h", "-o", "%T"), seconds=30)
        yield cluster
    finally:
        if len(daemons) == len(commands):
            subprocess.run(
                ["scancel", "--user=root", "--signal=KILL", "--full"],
                env=os.environ | environment,
                check=False,
            )
            time.sleep(1.0)
        for daemon in reversed(daemons):
            daemon.send_signal(signal.SIGTERM)
            try:
                daemon.wait(10)
            except subprocess.TimeoutExpired:
                daemon.kill()


def sft_options(files: Path) -> tuple[object, ...]:
    """Some hundred steps, more than pass before a signal comes."""
    return (
        *("--init-from", files / "policy", "--data.train", files / "demonstrations.jsonl"),
        *("--data.valid-fraction", 0.25, "--epochs", 40, "--batch-size", 8, "--dropout", 0.2),
        *("--micro-batch-tokens", 96, "--adam.lr", 1e-3, "--selection.reward-model", "None"),
        *("--no-save-every-epoch", *ON_CPU),
    )


def assert_same_weights(run: Path, other: Path, role: str) -> None:
    ours, theirs = weights_of(run, role), weights_of(other, role)
    assert all(torch.equal(ours[name], theirs[name]) for name in theirs)


def test_stage_stopped_by_a_signal_is_requeued_and_ends_as_if_undisturbed(
    cluster: Cluster, tiny: Path
):
    number = cluster.submit("sft_1_3b", *sft_options(tiny), num_ranks=2)
    run = cluster.checkout / "runs" / "sft_1_3b"
    cluster.wait_for_steps(number, run)
    cluster.call("scancel", "--signal=USR1", number)
    wait_until(lambda: cluster.job(number)["JobState"] == "PENDING", seconds=60)
    num_done = int((run / "checkpoints" / "latest").read_text().removeprefix("step_"))
    metrics = run / "metrics.jsonl"
    assert metrics.read_text().count("\n") == num_done
    assert cluster.wait_for_end(number) == "COMPLETED", cluster.output_of(number)
    assert cluster.job(number)["Restarts"] == "1"
    config = load_config(SFTConfig, run / "config.json")
    num_steps = metrics.read_text().count("\n")
    assert 3 < num_done < num_steps

    output = cluster.output_of(number)
    assert f"stopped by a signal at step {num_done}" in output
    assert re.search(r"start 1 on 1 nodes: localhost\n.*start 2 on 1 nodes", output, re.DOTALL)
    logs = {p.name for p in cluster.checkout.glob(f"runs/logs/sft_1_3b-{number}/*")}
    assert logs == {"preflight.log", "rank_0000.log", "rank_0001.log"}

    whole = cluster.folder / "whole"
    run_ranks(train, 2, dataclasses.replace(config, directory=whole, init_from=tiny / "policy"))
    assert_same_weights(run, whole, "policy")


def test_reward_model_and_ppo_run_as_jobs(cluster: Cluster, tiny: Path):
    rm = cluster.submit(
        "rm_1_3b",
        *("--init-from", tiny / "policy", "--data.train", tiny / "comparisons.jsonl"),
        *("--data.demonstrations", tiny / "demonstrations.jsonl", "--batch-size", 6),
        *("--micro-batch-tokens", 256, *ON_CPU),
    )
    ppo = cluster.submit(
        "ppo_1_3b",
        *("--policy", tiny / "policy", "--size", "", "--reward-model", tiny / "reward_model"),
        *("--reward-model-size", "", "--data.prompts", tiny / "prompts.jsonl"),
        *("--data.pretraining", tiny / "pretraining.jsonl", "--data.pretraining-tokens", 32),
        *("--sampling.max-new-tokens", 8, "--sampling.num-slots", 4, "--sampling.cache-gib", 0.01),
        *("--iterations", 2, "--rollout-batch-size", 8, "--minibatch-size", 4),
        *("--micro-batch-tokens", 128, "--ptx-examples-per-episode", 1, *ON_CPU),
        *("--critic-layout.tp", 1, "--critic-layout.no-sequence-parallel"),
    )
    for number, config_class, role in ((rm, RMConfig, "reward_model"), (ppo, PPOConfig, "policy")):
        assert cluster.wait_for_end(number) == "COMPLETED", cluster.output_of(number)
        run = cluster.checkout / "runs" / ("rm_1_3b" if number == rm else "ppo_1_3b")
        whole = cluster.folder / f"whole_{role}"
        train(dataclasses.replace(load_config(config_class, run / "config.json"), directory=whole))
        assert_same_weights(run, whole, role)


def test_signals_before_the_first_step_requeue_a_job(cluster: Cluster, tiny: Path):
    number = cluster.submit("sft_1_3b", *sft_options(tiny), "--directory", "runs/early")
    logs = cluster.checkout / "runs" / "logs" / f"sft_1_3b-{number}"
    for restarts, log in enumerate(("preflight.log", "rank_0000.log"), start=1):
        wait_until((logs / log).exists, seconds=300)
        cluster.call("scancel", "--signal=USR1", number)
        wait_until(lambda n=restarts: cluster.job(number)["Restarts"] == str(n), seconds=300)
    assert not (cluster.checkout / "runs" / "early").exists()
    assert cluster.wait_for_end(number) == "COMPLETED", cluster.output_of(number)


def test_job_that_is_cancelled_saves_and_stays_away(cluster: Cluster, tiny: Path):
    options = (*sft_options(tiny), "--directory", "runs/cancelled")
    number = cluster.submit("sft_1_3b", *options)
    run = cluster.checkout / "runs" / "cancelled"
    cluster.wait_for_steps(number, run)
    cluster.call("scancel", number)
    assert cluster.wait_for_end(number) == "CANCELLED"
    wait_until(lambda: (run / "checkpoints" / "latest").exists(), seconds=20)
    time.sleep(2.0)
    assert cluster.job(number)["JobState"] == "CANCELLED"


def test_stage_does_not_start_where_the_preflight_fails(cluster: Cluster, tiny: Path):
    site = Path(cluster.environment["TRIDENT_SITE"])
    demanding = site.with_name("demanding.sh")
    demanding.write_text(SITE.format(python=sys.executable, options="--min-disk-gib 1e9"))
    picky = Cluster(cluster.folder, cluster.environment | {"TRIDENT_SITE": str(demanding)})
    number = picky.submit("sft_1_3b", *sft_options(tiny), "--directory", "runs/never")
    assert picky.wait_for_end(number) == "FAILED"
    assert picky.job(number)["ExitCode"] == "1:0"
    assert "preflight: localhost: runs has less than 1e+09 GiB free" in picky.output_of(number)
    assert not (picky.checkout / "runs" / "never").exists()
