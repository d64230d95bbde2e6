from pathlib import Path

import pytest

from engine.ranks.parallel import Parallel
from engine.ranks.start import start_parallel
from engine.settings.layout import ParallelLayout


@pytest.fixture
def parallel() -> Parallel:
    return start_parallel(ParallelLayout(), seed=1)


@pytest.fixture(scope="session")
def finished(tiny: Path, tmp_path_factory: pytest.TempPathFactory) -> Path:
    """Finished runs of the three stages, not to be changed: finished/{sft,rm,ppo}."""
    from tests.engine.checkpoints.stage_runs import finish_stages  # not for every test

    return finish_stages(tiny, tmp_path_factory.mktemp("finished"))
