import json

from benchmarks import small_operations
from engine.ranks.lone_rank import LONE


def test_each_group_is_measured_and_recorded(tmp_path, monkeypatch, capsys):
    monkeypatch.setattr("sys.argv", ["small_operations", "--out", str(tmp_path)])
    small_operations.main()
    records = [json.loads(line) for line in (tmp_path / "cpu.jsonl").read_text().splitlines()]
    assert [record["provider"] for record in records] == [LONE, "gloo"]
    assert all(record[time] > 0 for record in records for time in ("before_us", "after_us"))
    assert "after a gather" in capsys.readouterr().out
