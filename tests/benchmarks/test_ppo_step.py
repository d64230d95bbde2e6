"""The command's records are on disk as they are there; a missing rival is named and left out."""

import json
import sys

from benchmarks import ppo_step, rivals


def test_records_are_written_and_a_missing_rival_is_named(tmp_path, monkeypatch, capsys):
    monkeypatch.setattr(rivals, "RIVALS", tmp_path / "nothing")
    monkeypatch.setattr(ppo_step, "OF_TRL", ("no_such_trl",))
    options = "--device cpu --size tiny --num-episodes 4 --minibatch-size 2 --prompt-tokens 4"
    options += f" --response-tokens 4 --num-samples 1 --out {tmp_path} --lengths mixed"
    monkeypatch.setattr(
        sys, "argv", ["ppo_step", *options.split(), "--providers", "trident", "trl"]
    )
    ppo_step.main()
    (line,) = (tmp_path / "cpu.jsonl").read_text().splitlines()
    record = json.loads(line)
    assert (record["provider"], record["workload"]) == ("trident", "mixed")
    assert record["order"] == "taking turns"
    assert record["response_lengths"]["max"] <= 8
    printed = capsys.readouterr().out
    assert "trl is left out: no_such_trl is not installed: make rivals" in printed
    assert "goal" not in printed
