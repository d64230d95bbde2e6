"""A step's units go through a file and come back; what is no such file is refused in words."""

import contextlib
import json
from pathlib import Path

import numpy as np
import pytest
import safetensors.numpy
from hypothesis import given
from hypothesis import strategies as st

from engine.data.batches import Cut, micro_batches
from engine.data.examples import Example, sequences_of
from engine.data.unit_file import read_units, units_as_bytes
from engine.errors import UserError
from tests.fuzzing import fuzzed


def example(seed: int, length: int, **fields) -> Example:
    tokens = np.random.default_rng(seed).integers(0, 100, length)
    return Example(tokens=tokens, prompt_length=1 + length // 2, fields=fields)


def episodes() -> list[Example]:
    values = np.float32([0.1, np.nan, -np.inf, 3e38, 1.0])
    return [example(n, n, logprobs=values[:n], has_eos=bool(n % 2)) for n in (1, 5, 3)]


def comparisons() -> list:
    return [[example(n, n + 2, ranks=n) for n in range(size)] for size in (3, 2)]


def test_units_come_back_to_the_bit_and_pack_alike(tmp_path: Path):
    sources = {"episodes": episodes(), "loss": comparisons()}
    (tmp_path / "batch").write_bytes(units_as_bytes(sources))
    found = read_units(tmp_path / "batch")
    assert found.keys() == sources.keys()
    for name, units in sources.items():
        cuts = [micro_batches(each, Cut(multiple_of=4), 9) for each in (units, found[name])]
        for a, b in zip(*cuts, strict=True):
            assert a.tokens.equal(b.tokens) and a.mask.equal(b.mask)
            assert a.cu_units.equal(b.cu_units) and a.cu_seqlens.equal(b.cu_seqlens)
            assert a.fields.keys() == b.fields.keys()
            for field, value in a.fields.items():
                assert value.dtype == b.fields[field].dtype
                assert value.numpy().tobytes() == b.fields[field].numpy().tobytes(), field


BROKEN = {
    "tokens": np.arange(3),
    "lengths": np.array([9, -8]),
    "prompt_lengths": np.array([0, 1, 1]),
    "unit_sizes": np.array([2]),
    "token.logprobs": np.zeros(2, np.float32),
    "sequence.has_eos": np.zeros((3, 1), bool),
}


@pytest.mark.parametrize("key", BROKEN)
def test_rows_that_do_not_belong_together_are_an_error_that_names_the_file(
    key: str, tmp_path: Path
):
    path = tmp_path / "batch"
    arrays = safetensors.numpy.load(units_as_bytes({"episodes": episodes()}))
    path.write_bytes(safetensors.numpy.save(arrays | {f"episodes/{key}": BROKEN[key]}))
    with pytest.raises(UserError, match=f"{path}: not the units of a step"):
        read_units(path)


@pytest.mark.parametrize("content", [b"", b"\xff" * 64, b"\x02" + bytes(7) + b"{}"])
def test_what_is_no_such_file_is_refused(content: bytes, tmp_path: Path):
    (tmp_path / "batch").write_bytes(content)
    with contextlib.suppress(UserError):  # {} has no units at all
        assert read_units(tmp_path / "batch") == {}


@pytest.mark.fuzz
@fuzzed
@given(data=st.data())
def test_any_file_is_read_or_refused(data: st.DataObject, tmp_path_factory: pytest.TempPathFactory):
    path = tmp_path_factory.getbasetemp() / "fuzzed_units"
    content = bytearray(units_as_bytes({"episodes": episodes(), "loss": comparisons()}))
    for _ in range(data.draw(st.integers(1, 4))):
        content[data.draw(st.integers(0, len(content) - 1))] = data.draw(st.integers(0, 255))
    path.write_bytes(
        content[: data.draw(st.integers(0, len(content)))] if data.draw(st.booleans()) else content
    )
    try:
        found = read_units(path)
    except UserError as error:
        assert len(str(error)) < 1000
        return
    for unit in (unit for units in found.values() for unit in units):
        for sequence in sequences_of(unit):
            assert 1 <= sequence.prompt_length <= len(sequence.tokens)
            assert int(sequence.tokens.min()) >= 0
            json.dumps(sorted(sequence.fields))
