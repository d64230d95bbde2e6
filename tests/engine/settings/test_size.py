import pytest

from engine.errors import UserError
from engine.settings.size import named_size
from models.sizes import SIZES


@pytest.mark.parametrize("name", list(SIZES))
def test_a_name_of_the_table_is_its_size(name: str):
    assert named_size(name) is SIZES[name]


@pytest.mark.parametrize("name", ["7b", "", "175B"])
def test_unknown_name_is_answered_with_those_there_are(name: str):
    with pytest.raises(UserError, match=f"no size is named {name!r}; the sizes are tiny, .*175b"):
        named_size(name)
