from pathlib import Path

import pytest


@pytest.fixture
def run(tiny: Path) -> Path:
    """A folder with a run of a policy, one of a reference and one of a reward model."""
    return tiny
