"""An iteration's time is shared out once: among kinds of operators and what lies outside them."""

import json
import sys

import pytest

from benchmarks import profile_ppo
from benchmarks.ppo_scene import PHASES
from benchmarks.profile_ppo import ITERATION, profile_iteration
from tests.benchmarks.test_ppo_provider import CPU, JOB


@pytest.fixture(scope="module")
def found():
    return profile_iteration(JOB, CPU)


def test_shares_of_a_phase_add_up(found):
    for part in (ITERATION, *PHASES):
        shares = found.shares(part)
        assert sum(shares.values()) == pytest.approx(1)
        assert all(share >= 0 for share in shares.values())
        assert shares["host"] > 0
    for phase in ("rollout", "score", "update"):
        assert found.shares(phase)["gemm"] > 0.01
        assert found.shares(phase)["attention"] > 0.001
    assert found.shares("update")["optimizer"] > 0
    assert found.shares("rollout")["optimizer"] == 0


def test_phases_make_up_the_iteration(found):
    whole = found.profiles[ITERATION]
    parts = [found.profiles[phase] for phase in PHASES]
    assert sum(part.wall_ms for part in parts) == pytest.approx(whole.wall_ms, rel=0.02)
    gemm = sum(part.by_kind.get("gemm", 0.0) for part in parts)
    assert gemm == pytest.approx(whole.by_kind["gemm"], rel=1e-6)


def test_others_are_neither_products_nor_attention(found):
    others = found.others()
    assert len(others) == 10
    assert others == sorted(others, key=lambda other: -other[1])
    assert not any("mm" in name.split("::")[1] or "attention" in name for name, _, _ in others)
    assert all(count > 0 for _, _, count in others)


def test_command_prints_and_records(tmp_path, monkeypatch, capsys):
    options = "--device cpu --size tiny --num-episodes 4 --minibatch-size 2 --prompt-tokens 4"
    options += f" --response-tokens 4 --ptx --out {tmp_path}"
    monkeypatch.setattr(sys, "argv", ["profile_ppo", *options.split()])
    profile_ppo.main()
    shown = capsys.readouterr().out
    assert "products and attention" in shown
    assert "seconds without it" in shown
    record = json.loads((tmp_path / "cpu.jsonl").read_text())
    assert record["benchmark"] == "profile_ppo"
    assert sum(record["shares"][ITERATION].values()) == pytest.approx(1)
    assert record["unprofiled_s"][ITERATION] > 0
    assert record["job"]["ptx_examples_per_episode"] == 1
