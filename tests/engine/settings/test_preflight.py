import pytest

from engine.errors import UserError
from engine.settings.preflight import PreflightConfig


@pytest.mark.parametrize(
    ("name", "value"),
    [("payload_mib", 0), ("timeout_s", 0.0), ("min_disk_gib", -1.0), ("slow_share", 1.5)],
)
def test_limit_that_means_nothing_is_refused(name: str, value: float):
    with pytest.raises(UserError, match=f"{name.replace('_', '-')} must be"):
        PreflightConfig(**{name: value})
