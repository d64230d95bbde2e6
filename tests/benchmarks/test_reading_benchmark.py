from pathlib import Path

from benchmarks.reading import made_records, seconds_to_read, write_containers
from engine.data.demonstrations import read_demonstrations


def test_every_container_holds_the_same_records(tmp_path: Path):
    records = made_records(30)
    paths = write_containers(tmp_path, records)
    assert len(paths) == 10
    for path in paths:
        found, _ = read_demonstrations(path)
        texts = [{"prompt": each.prompt.text, "response": each.response.text} for each in found]
        assert texts == records
    assert seconds_to_read(paths[0]) > 0
