import pytest

from models.form import Form
from models.huggingface.families import MISTRAL, QWEN2
from models.huggingface.windows import config_of_window, window_of_config

FULL, SLIDING = "full_attention", "sliding_attention"
ON = {"use_sliding_window": True, "sliding_window": 9}


@pytest.mark.parametrize(
    ("family", "config", "expected"),
    [
        (MISTRAL, {}, {"window": 4096}),
        (MISTRAL, {"sliding_window": None}, {}),
        (MISTRAL, {"sliding_window": 9}, {"window": 9}),
        (QWEN2, {}, {}),
        (QWEN2, {"use_sliding_window": False, "sliding_window": 9, "max_window_layers": 0}, {}),
        (QWEN2, {"layer_types": [FULL] * 4}, {}),
        (QWEN2, ON, {}),  # max_window_layers is 28, of 4 layers
        (QWEN2, ON | {"max_window_layers": 4}, {}),
        (QWEN2, ON | {"max_window_layers": 0}, {"window": 9}),
        (QWEN2, ON | {"layer_types": [SLIDING] * 4}, {"window": 9, "windowed_layers": "all"}),
        (
            QWEN2,
            ON | {"layer_types": [FULL, SLIDING] * 2, "max_window_layers": 28},
            {"window": 9, "windowed_layers": "every second"},
        ),
    ],
)
def test_windows_are_read_and_go_around(family, config, expected):
    found = window_of_config(config, family, 4)
    assert found == expected
    written = config_of_window(Form(**found), family, 4)
    assert Form(**window_of_config(written, family, 4)) == Form(**found)


@pytest.mark.parametrize(
    ("family", "config", "said"),
    [
        (QWEN2, ON | {"max_window_layers": 2}, "max_window_layers is 2 of 4 layers"),
        (QWEN2, ON | {"layer_types": [SLIDING, FULL] * 2}, "layer_types is"),
        (QWEN2, ON | {"layer_types": [SLIDING]}, "no list of 4"),
        (QWEN2, ON | {"layer_types": ["chunked_attention"] * 4}, "layer_types is"),
        (QWEN2, {"layer_types": [FULL, SLIDING] * 2}, "layer_types is"),
        (QWEN2, {"use_sliding_window": 1}, "use_sliding_window is 1 and must be true or false"),
        (QWEN2, {"max_window_layers": None}, "max_window_layers is None"),
        (MISTRAL, {"sliding_window": 0}, "sliding_window is 0"),
        (MISTRAL, {"sliding_window": 9, "layer_types": [SLIDING, FULL] * 2}, "layer_types is"),
    ],
)
def test_windows_that_a_form_cannot_name_are_refused(family, config, said):
    with pytest.raises(ValueError, match=said):
        window_of_config(config, family, 4)
