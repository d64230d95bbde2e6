"""Units as one safetensors file, to be packed again elsewhere, and back.

    NAME/tokens  NAME/lengths  NAME/prompt_lengths  NAME/unit_sizes
    NAME/token.FIELD  NAME/sequence.FIELD     a number a token, a number a sequence

NAME is that of a source of units; the sequences of all its units lie end to end.
"""

import itertools
import os
from collections.abc import Mapping
from pathlib import Path

import numpy as np
import safetensors.numpy
from safetensors import SafetensorError

from engine.data.batches import Units
from engine.data.examples import Example, Unit, sequences_of
from engine.errors import UserError, named
from engine.files import MAX_SHOWN_PATH, open_file

_MAX_BYTES = 4 << 30  # of a file; our choice: a step's batch has megabytes
_PER_TOKEN, _PER_SEQUENCE = "token.", "sequence."
_NUMBERS = ("lengths", "prompt_lengths", "unit_sizes")


def units_as_bytes(sources: Mapping[str, Units]) -> bytes:
    """Return a file's bytes of units by the name of their source."""
    arrays: dict[str, np.ndarray] = {}
    for name, units in sources.items():
        chosen = [sequences_of(units[index]) for index in range(len(units))]
        sequences = [sequence for unit in chosen for sequence in unit]
        arrays[f"{name}/tokens"] = np.concatenate([s.tokens for s in sequences], dtype=np.int64)
        counts = {
            "lengths": [len(s.tokens) for s in sequences],
            "prompt_lengths": [s.prompt_length for s in sequences],
            "unit_sizes": [len(unit) for unit in chosen],
        }
        arrays |= {f"{name}/{key}": np.array(count, np.int64) for key, count in counts.items()}
        for field in sequences[0].fields:
            values = [np.asarray(s.fields[field]) for s in sequences]
            kind = _PER_TOKEN if values[0].ndim else _PER_SEQUENCE
            arrays[f"{name}/{kind}{field}"] = np.concatenate(
                [np.atleast_1d(value) for value in values]
            )
    return safetensors.numpy.save(arrays)


def read_units(path: Path) -> dict[str, list[Unit]]:
    """Return the units of a file by the name of their source; raises UserError."""
    shown = named(path, MAX_SHOWN_PATH)
    with open_file(path) as stream:
        num_bytes = os.fstat(stream.fileno()).st_size
        if num_bytes > _MAX_BYTES:
            raise UserError(
                f"{shown} has {num_bytes} bytes; {_MAX_BYTES} are the most that is read"
            )
        content = stream.read(_MAX_BYTES)
    try:
        return _units_in(safetensors.numpy.load(content))
    # A dtype that numpy lacks is a KeyError of the library's.
    except (SafetensorError, ValueError, KeyError, TypeError, OverflowError) as error:
        raise UserError(f"{shown}: not the units of a step: {error}") from None


def _units_in(arrays: Mapping[str, np.ndarray]) -> dict[str, list[Unit]]:
    sources = dict.fromkeys(key.partition("/")[0] for key in arrays)
    return {
        name: _units_of(
            {
                key.removeprefix(f"{name}/"): array
                for key, array in arrays.items()
                if key.startswith(f"{name}/")
            }
        )
        for name in sources
    }


def _units_of(arrays: Mapping[str, np.ndarray]) -> list[Unit]:
    """Return the units of one source; raises KeyError or ValueError."""
    for key, array in arrays.items():
        if array.ndim != 1 or array.dtype.kind not in "fiub":
            raise ValueError(f"{key} is no row of numbers")
    tokens = _whole(arrays, "tokens", least=0)
    lengths, prompt_lengths, unit_sizes = (_whole(arrays, key, least=1) for key in _NUMBERS)
    if not len(unit_sizes) or sum(lengths.tolist()) != len(tokens):
        raise ValueError("lengths are not those of the tokens")
    if len(prompt_lengths) != len(lengths) or sum(unit_sizes.tolist()) != len(lengths):
        raise ValueError("prompts or units are not those of the sequences")
    ends = np.cumsum(lengths).tolist()
    bounds = list(zip([0, *ends[:-1]], ends, strict=True))
    fields: list[dict[str, np.ndarray | float | int]] = [{} for _ in bounds]
    for key, array in arrays.items():
        if key.startswith(_PER_TOKEN):
            _check_length(key, array, len(tokens))
            for into, (start, end) in zip(fields, bounds, strict=True):
                into[key.removeprefix(_PER_TOKEN)] = array[start:end]
        elif key.startswith(_PER_SEQUENCE):
            _check_length(key, array, len(lengths))
            for into, value in zip(fields, array.tolist(), strict=True):
                into[key.removeprefix(_PER_SEQUENCE)] = value
    sequences = [
        Example(tokens=tokens[start:end], prompt_length=prompt_length, fields=own)
        for (start, end), prompt_length, own in zip(
            bounds, prompt_lengths.tolist(), fields, strict=True
        )
    ]
    taken = iter(sequences)
    units = [list(itertools.islice(taken, size)) for size in unit_sizes.tolist()]
    return [unit[0] if len(unit) == 1 else unit for unit in units]


def _whole(arrays: Mapping[str, np.ndarray], key: str, *, least: int) -> np.ndarray:
    array = arrays[key]
    if array.dtype != np.int64 or (len(array) and int(array.min()) < least):
        raise ValueError(f"{key} are no whole numbers from {least}")
    return array


def _check_length(key: str, array: np.ndarray, length: int) -> None:
    if len(array) != length:
        raise ValueError(f"{key} has {len(array)} numbers, not {length}")
