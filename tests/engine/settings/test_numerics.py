from pathlib import Path

import pytest

from engine.errors import UserError
from engine.settings.command_line import parse_config
from engine.settings.numerics import Numerics
from engine.settings.saved import load_config, save_config


def test_what_is_not_said_is_fp32_with_nothing_computed_again():
    assert Numerics() == Numerics(
        dtype="fp32", recompute="none", gradient_accumulation_fusion=None, deterministic=False
    )
    assert (Numerics().recheck_every, Numerics().compare_every) == (0, 0)


def test_passes_are_computed_twice_in_deterministic_mode_alone():
    with pytest.raises(UserError, match="recheck-every 5 wants --numerics.deterministic"):
        Numerics(recheck_every=5)
    assert Numerics(recheck_every=5, deterministic=True).recheck_every == 5
    assert Numerics(compare_every=5).compare_every == 5
    for name in ("recheck_every", "compare_every"):
        with pytest.raises(
            UserError, match=f"numerics.{name.replace('_', '-')} must be at least 0"
        ):
            Numerics(**{name: -1}, deterministic=True)


@pytest.mark.parametrize(
    ("option", "value", "choices"),
    [
        ("dtype", "fp8", "'fp32', 'fp16', 'bf16'"),
        ("recompute", "some", "'none', 'selective', 'full'"),
    ],
)
def test_other_words_are_refused_with_those_there_are(option: str, value: str, choices: str):
    with pytest.raises(UserError, match=choices):
        parse_config(Numerics(), [f"--{option}", value])


@pytest.mark.parametrize(
    ("words", "chosen"),
    [
        ([], None),
        (["--gradient-accumulation-fusion", "True"], True),
        (["--gradient-accumulation-fusion", "False"], False),
    ],
)
def test_fusion_is_on_off_or_left_to_the_device(words: list[str], chosen: bool | None):
    assert parse_config(Numerics(), words).gradient_accumulation_fusion is chosen


def test_saved_numerics_read_back(tmp_path: Path):
    numerics = Numerics(dtype="bf16", recompute="selective", deterministic=True)
    save_config(numerics, tmp_path / "numerics.json")
    assert load_config(Numerics, tmp_path / "numerics.json") == numerics
    (tmp_path / "older.json").write_text('{"dtype": "bf16"}')
    assert load_config(Numerics, tmp_path / "older.json") == Numerics(dtype="bf16")
