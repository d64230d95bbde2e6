"""A process that runs a rival finds it in .rivals; a missing one is named with its command."""

import subprocess
import sys

from benchmarks import rivals


def test_only_the_process_of_a_rival_has_the_folder_on_its_path(tmp_path, monkeypatch):
    (tmp_path / "a_rival.py").write_text("print('found')\n")
    monkeypatch.setattr(rivals, "RIVALS", tmp_path)
    monkeypatch.setenv("PYTHONPATH", "/elsewhere")
    command = [sys.executable, "-c", "import a_rival"]
    environment = rivals.rivals_environment()
    assert environment["PYTHONPATH"].startswith("/elsewhere")
    found = subprocess.run(command, env=environment, capture_output=True, text=True)
    assert found.stdout == "found\n"
    assert subprocess.run(command, capture_output=True).returncode != 0


def test_what_is_missing_is_named_with_the_command(tmp_path, monkeypatch):
    monkeypatch.setattr(rivals, "RIVALS", tmp_path)
    (tmp_path / "a_rival.py").touch()
    assert rivals.missing_rivals("a_rival", "torch") is None
    assert rivals.missing_rivals("a_rival", "no_such_rival") == (
        "no_such_rival is not installed: make rivals"
    )


def test_every_rival_has_one_version():
    lines = (rivals.RIVALS.parent / "benchmarks/rivals.txt").read_text().splitlines()
    pins = [line for line in lines if not line.startswith("#")]
    assert {"trl", "accelerate"} <= {pin.partition("==")[0] for pin in pins}
    assert all(pin.partition("==")[2] for pin in pins)
