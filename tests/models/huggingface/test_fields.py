import pytest

from models.huggingface.fields import positive, shown, whole_number


@pytest.mark.parametrize("value", [0, -1, 1.0, True, None, "3", 1 << 25, 10**4000, []])
def test_what_is_no_size_is_named(value):
    with pytest.raises(ValueError, match="n_layer is .* a whole number from 1 to 16777216"):
        whole_number({"n_layer": value}, "n_layer")
    assert whole_number({"n_layer": 3}, "n_layer") == 3


@pytest.mark.parametrize("value", [0, -1e-5, float("nan"), float("inf"), True, None, "1e-5", 1e300])
def test_what_is_no_number_above_zero_is_named(value):
    with pytest.raises(ValueError, match="eps is .* must be a number above 0"):
        positive("eps", value)


def test_a_bound_is_said_and_kept():
    assert positive("factor", 1, at_least=1.0) == 1.0
    with pytest.raises(ValueError, match=r"factor is 0\.5 and must be a number from 1"):
        positive("factor", 0.5, at_least=1.0)


def test_a_long_value_is_cut():
    assert len(shown("x" * 10**6)) <= 60
