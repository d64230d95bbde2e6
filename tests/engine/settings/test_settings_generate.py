import dataclasses
from pathlib import Path

import pytest

from engine.data.prompt_format import OPTIONS
from engine.errors import UserError
from engine.settings.command_line import parse_config
from engine.settings.generate import GenerateConfig
from engine.settings.ppo import PPOData
from engine.settings.rm import RMData
from engine.settings.saved import load_config, save_config
from engine.settings.sft import SFTData


def test_a_prompt_is_read_as_in_training_unless_an_option_says_otherwise():
    for options in (GenerateConfig(), SFTData(), RMData(), PPOData()):
        assert {getattr(options, name) for name in OPTIONS} == {None}
    typed = ["--prompt-suffix", r"\n\n", "--system", r"Be\tbrief\\n.", "--chat", "template"]
    found = parse_config(GenerateConfig(), typed)
    assert (found.prompt_suffix, found.system) == ("\n\n", "Be\tbrief\\n.")


def test_options_of_the_draws_lie_under_sampling():
    options = ["--prompts", "p.jsonl", "--sampling.top-p", "0.9", "--sampling.stop-token-ids", "7"]
    found = parse_config(GenerateConfig(), options)
    assert found.prompts == Path("p.jsonl")
    sampling = GenerateConfig().sampling
    assert found.sampling == dataclasses.replace(sampling, top_p=0.9, stop_token_ids=(7,))


def test_a_dtype_that_no_network_has_is_an_error():
    with pytest.raises(UserError, match="'fp32', 'fp16', 'bf16'"):
        parse_config(GenerateConfig(), ["--dtype", "fp8"])


@pytest.mark.parametrize("seed", ["-1", str(2**63), "9" * 5000])
def test_a_seed_that_no_generator_takes_is_an_error(seed: str):
    with pytest.raises(UserError, match="seed") as error:
        parse_config(GenerateConfig(), ["--seed", seed])
    assert len(str(error.value)) < 300


def test_a_saved_config_reads_back_equal(tmp_path: Path):
    config = parse_config(GenerateConfig(), ["--source", "runs/x", "--sampling.top-k", "5"])
    save_config(config, tmp_path / "config.json")
    assert load_config(GenerateConfig, tmp_path / "config.json") == config
