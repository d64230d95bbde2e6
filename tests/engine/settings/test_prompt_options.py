import dataclasses

import pytest

from engine.data.prompt_format import OPTIONS, PromptFormat
from engine.settings.generate import GenerateConfig
from engine.settings.ppo import PPOData
from engine.settings.prompt_options import PromptOptions
from engine.settings.rm import RMData
from engine.settings.sft import SFTData


@pytest.mark.parametrize("data", [SFTData, RMData, PPOData])
def test_every_stage_has_them_and_takes_over_what_is_not_given(data: type):
    assert issubclass(data, PromptOptions)
    assert [getattr(data(), name) for name in OPTIONS] == [None] * len(OPTIONS)


@pytest.mark.parametrize("kind", [PromptFormat, GenerateConfig])
def test_the_form_and_generate_have_fields_of_their_names(kind: type):
    assert set(OPTIONS) <= {field.name for field in dataclasses.fields(kind)}
