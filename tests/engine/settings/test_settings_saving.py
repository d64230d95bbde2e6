import math

import pytest

from engine.errors import UserError
from engine.settings.checks import option_of
from engine.settings.saving import SaveConfig


def test_by_default_the_last_two_are_kept_and_written_beside_training():
    config = SaveConfig()
    assert (config.keep, config.save_every, config.save_every_minutes) == (2, 0, 15.0)
    assert config.save_in_background and not config.strict


@pytest.mark.parametrize(
    ("name", "values"),
    [
        ("save_every", [-1]),
        ("save_every_minutes", [-0.5, math.nan, math.inf]),
        ("keep", [0, -1]),
        ("keep_every", [-1]),
    ],
)
def test_number_that_cannot_be_is_an_error(name: str, values: list):
    for value in values:
        with pytest.raises(UserError, match=name.replace("_", "-")):
            SaveConfig(**{name: value})


@pytest.mark.parametrize("name", ["keep_lowest", "keep_highest"])
def test_metric_is_named_as_metrics_are(name: str):
    SaveConfig(**{name: "valid/loss"})
    for value in ("loss", "valid/\x1b[2J", "a\nb/c"):
        with pytest.raises(UserError, match=f"{option_of(name)} must name a metric such as"):
            SaveConfig(**{name: value})
