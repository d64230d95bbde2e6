"""Networks of every form train alike in every layout, in all stages, and save alike."""

from pathlib import Path

import pytest

from engine.settings.layout import ParallelLayout
from engine.settings.numerics import Numerics
from tests.engine.training.test_layout_invariance import STAGES, assert_same_training, train_stages
from tests.forms import FORMS
from tests.ranks import run_ranks
from tests.tiny import write_checkpoints, write_files

LAYOUTS: dict[str, dict] = {
    "tp2_sequence_selective": {
        "layout": ParallelLayout(tp=2, sequence_parallel=True),
        "numerics": Numerics(recompute="selective"),
    },
    "pp2_virtual_full": {
        "layout": ParallelLayout(pp=2, virtual_pp=2),
        "numerics": Numerics(recompute="full"),
    },
    "cp2": {"layout": ParallelLayout(cp=2)},
}
FOLDED = {
    "tp2_generates_in_dp2": {
        "layout": ParallelLayout(tp=2),
        "generation_layout": ParallelLayout(),
    },
}


@pytest.fixture(scope="module", params=FORMS)
def runs(request: pytest.FixtureRequest, tmp_path_factory: pytest.TempPathFactory) -> Path:
    """A form's files, and its runs on one rank and on two."""
    folder = tmp_path_factory.mktemp("form")
    write_files(folder)
    write_checkpoints(folder, FORMS[request.param])
    train_stages(folder, folder, {"one": {}}, {})
    run_ranks(train_stages, 2, folder, folder, LAYOUTS, FOLDED)
    return folder


@pytest.mark.slow
def test_two_ranks_train_a_form_as_one(runs: Path):
    for layout in LAYOUTS:
        for stage in STAGES:
            assert_same_training(runs, stage, runs / layout / stage, runs / "one" / stage)
    for layout in FOLDED:
        assert_same_training(runs, "ppo", runs / layout / "ppo", runs / "one" / "ppo")
