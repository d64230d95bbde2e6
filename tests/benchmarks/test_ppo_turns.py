"""One provider works at a time, each keeps its own place, and one that dies costs itself alone."""

import os
import sys

from benchmarks.ppo_job import Effort
from benchmarks.ppo_turns import Provider, run_in_turns

# Speaks as ppo_provider.py does; argv: name, file of what happened, iteration that it dies in.
PROGRAM = """
import json, sys
name, path, end = sys.argv[1], sys.argv[2], int(sys.argv[3])
done = []
def say(**message):
    print(json.dumps(message), flush=True)
while True:
    say(iterations=done)
    if sys.stdin.readline() != "go\\n":
        break
    if len(done) == end:
        sys.exit("out of luck")
    with open(path, "a") as file:
        file.write(f"{name}{len(done)} ")
    done.append({"update": 1.0})
say(record={"provider": name})
"""


def turns(path, said, names, *, one_by_one=False, num_samples=1):
    def opening(name, end):
        command = (sys.executable, "-c", PROGRAM, name, str(path), end)
        return lambda: Provider(name, command, os.environ, said.append)

    openings = [opening(name[0], name[1:] or "-1") for name in names]
    effort = Effort(num_samples=num_samples)
    records = list(run_in_turns(openings, effort, said.append, one_by_one=one_by_one))
    return [record["provider"] for record in records], path.read_text().split()


def test_providers_take_turns_or_run_one_by_one(tmp_path):
    assert turns(tmp_path / "a", [], ["a", "b"]) == (["a", "b"], ["a0", "b0", "a1", "b1"])
    order = ["a0", "a1", "b0", "b1"]
    assert turns(tmp_path / "b", [], ["a", "b"], one_by_one=True) == (["a", "b"], order)


def test_a_dead_provider_costs_itself_alone_and_its_last_words_are_said(tmp_path):
    said = []
    records, happened = turns(tmp_path / "a", said, ["a1", "b"], num_samples=2)
    assert records == ["b"]
    assert happened == ["a0", "b0", "b1", "b2"]
    assert "a ended with exit status 1\nout of luck" in said


def test_one_that_cannot_begin_is_named(tmp_path):
    (tmp_path / "a").touch()
    said = []
    broken = Provider("c", (sys.executable, "-c", "import no_such_thing"), os.environ, said.append)
    assert (
        list(run_in_turns([lambda: broken], Effort(num_samples=1), said.append, one_by_one=True))
        == []
    )
    assert "No module named 'no_such_thing'" in said[-1]


def test_what_takes_long_is_said_to_be_at_work(tmp_path, monkeypatch):
    monkeypatch.setattr("benchmarks.provider_process.SILENCE", 1e-3)
    said = []
    turns(tmp_path / "a", said, ["a"])
    assert any(line.startswith("a: starting, ") for line in said)
