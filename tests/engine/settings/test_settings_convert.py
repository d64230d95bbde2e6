import inspect
from pathlib import Path

import huggingface_hub
import pytest
import torch
import tyro

from engine.errors import UserError
from engine.ranks.device import DTYPES
from engine.settings.command_line import parse_config
from engine.settings.convert import ConvertConfig


def parsed(*arguments: str) -> ConvertConfig:
    """Parse a command line as recipes/convert_hf.py does."""
    return parse_config(ConvertConfig(direction=tyro.MISSING), arguments)


def test_the_direction_is_a_word_of_its_own():
    found = parsed("export", "--source", "runs/sft", "--layout.tp", "2")
    assert (found.direction, found.source, found.layout.tp) == ("export", Path("runs/sft"), 2)


@pytest.mark.parametrize(
    ("arguments", "cause"),
    [(["--source", "gpt2"], r"{import,export} .*required"), (["back"], "'import', 'export'")],
)
def test_no_direction_and_an_unknown_one_are_errors_that_name_both(arguments, cause):
    with pytest.raises(UserError, match=cause):
        parsed(*arguments)


@pytest.mark.parametrize("other", ["fp16", "bf16"])
def test_weights_are_written_in_a_dtype_that_holds_the_others(other: str):
    dtype = DTYPES[ConvertConfig(direction="import").dtype]
    patterns = torch.arange(-(2**15), 2**15, dtype=torch.int16).view(DTYPES[other])
    finite = patterns[patterns.isfinite()]
    assert torch.equal(finite.to(dtype).to(finite.dtype), finite)


def test_files_are_as_large_as_huggingface_hubs():
    theirs = inspect.signature(huggingface_hub.split_torch_state_dict_into_shards).parameters
    gigabytes = ConvertConfig(direction="export").file_gigabytes
    assert theirs["max_shard_size"].default == f"{gigabytes:g}GB"


@pytest.mark.parametrize("gigabytes", ["0", "-1", "nan", "inf"])
def test_files_of_no_size_are_an_error_that_names_the_option(gigabytes: str):
    with pytest.raises(UserError, match=r"file.gigabytes must be (positive|finite), got"):
        parsed("export", "--source", "runs/sft", "--file-gigabytes", gigabytes)
