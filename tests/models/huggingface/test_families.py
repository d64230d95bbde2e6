import pytest
from transformers import AutoConfig

from models.huggingface.families import FAMILIES, FOREIGN_TYPES, OPT, export_order
from models.sizes import SIZES
from tests.families import CONFIGS


@pytest.mark.parametrize("family", FAMILIES, ids=lambda family: family.model_type)
def test_what_a_table_takes_where_config_json_is_silent_is_what_transformers_takes(family):
    config = AutoConfig.for_model(family.model_type).to_dict()
    for number in family.numbers:
        if number.default not in (None, -1):
            assert config[number.theirs] == number.default, number.theirs
    for choice in family.choices:
        assert tuple(config[name] for name in choice.theirs) == choice.default
    for name, value in family.fixed.items():
        assert config[name] == value, name
    if family.epsilon is not None:
        assert config[family.epsilon[0]] == family.epsilon[1]
    if family.rotary is not None:
        inner = config["rope_parameters"]
        assert inner.get("partial_rotary_factor", 1.0) == family.rotary_fraction


def test_every_family_has_a_model_that_the_tests_build():
    built = {config["model_type"] for config in CONFIGS.values()}
    assert built == {family.model_type for family in FAMILIES}


def test_no_type_that_converts_is_said_to_be_foreign():
    assert not {family.model_type for family in FAMILIES} & FOREIGN_TYPES.keys()


def test_an_export_tries_every_family():
    assert set(map(id, export_order(SIZES["tiny"]))) == set(map(id, FAMILIES))
    assert export_order(SIZES["tiny"])[0] is not OPT
