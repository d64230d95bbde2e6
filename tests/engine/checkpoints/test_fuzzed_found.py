"""Generated pointers and descriptions of networks, with their checksums right and wrong."""

import json
from pathlib import Path
from typing import Any

import pytest
from hypothesis import given
from hypothesis import strategies as st

from engine.checkpoints.found import progress_in, read_network
from engine.checkpoints.pointers import pointed_checkpoint
from engine.checkpoints.whole import damage_of
from engine.ranks.start import start_parallel
from engine.settings.layout import ParallelLayout
from tests.engine.checkpoints.near_json import near, refused_or_read
from tests.engine.checkpoints.small_runs import saved
from tests.fuzzing import fuzzed
from tests.tiny import SIZE, random_network

pytestmark = pytest.mark.fuzz


@pytest.fixture(scope="module")
def folder(tmp_path_factory: pytest.TempPathFactory) -> Path:
    """A checkpoint of one network."""
    parallel = start_parallel(ParallelLayout(), seed=1)
    run = saved(random_network("language", parallel), tmp_path_factory.mktemp("run"), "policy")
    return run / "checkpoints" / "step_00000001"


@fuzzed
@given(data=st.data())
def test_any_description_is_read_or_refused(folder: Path, data: st.DataObject):
    path = folder / "policy" / "network.json"
    good = path.read_bytes()
    description = data.draw(near(json.loads(good)))
    path.write_text(json.dumps(description))
    try:
        found = refused_or_read(lambda: read_network(folder / "policy"))
        assert found is None or found.size == SIZE or found.size.vocab_size <= 128
        if path.read_bytes() != good:
            assert refused_or_read(lambda: damage_of(folder)) != ""
    finally:
        path.write_bytes(good)


@fuzzed
@given(data=st.data())
def test_any_progress_is_read_or_refused(folder: Path, data: st.DataObject):
    good: dict[str, Any] = {"step": 1, "kl_coef": 0.1, "metrics": {"a/b": 1.0}, "epochs": []}
    path = folder / "progress.json"
    before = path.read_bytes()
    path.write_text(json.dumps(data.draw(near(good))))  # it is read when its checksum was right
    try:
        found = refused_or_read(lambda: progress_in(folder))
        assert found is None or type(found["step"]) is int
    finally:
        path.write_bytes(before)


@fuzzed
@given(content=st.binary(max_size=300) | st.sampled_from([b"step_00000002", b"epoch_0003\n"]))
def test_any_pointer_leads_to_a_folder_beside_it_or_is_refused(tmp_path: Path, content: bytes):
    for name in ("step_00000002", "epoch_0003"):
        (tmp_path / name).mkdir(exist_ok=True)
    (tmp_path / "latest").write_bytes(content)
    found = refused_or_read(lambda: pointed_checkpoint(tmp_path / "latest"))
    assert found is None or found.parent == tmp_path
