import pytest

from engine.ranks.parallel import Parallel
from engine.ranks.start import start_parallel
from engine.settings.layout import ParallelLayout


@pytest.fixture
def parallel() -> Parallel:
    return start_parallel(ParallelLayout(), seed=1)
