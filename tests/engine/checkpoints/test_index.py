import dataclasses
import itertools
import json
import time
from pathlib import Path
from typing import Any

import pytest
from hypothesis import given
from hypothesis import strategies as st

from engine.checkpoints.index import (
    Index,
    IndexedTensor,
    TensorPiece,
    index_text,
    piece_name,
    read_index,
)
from engine.checkpoints.manifest import Damage, FileDigest, Manifest
from tests.engine.checkpoints.near_json import near, refused_or_read
from tests.fuzzing import fuzzed
from tests.special_files import KINDS, make_special

WEIGHTS, OPTIMIZER = "weights-00000.safetensors", "optimizer-00001.safetensors"
INDEX = Index(
    tensors={
        "a.weight": IndexedTensor(
            "BF16",
            (2, 3),
            (TensorPiece(WEIGHTS, (0, 0), (1, 3)), TensorPiece(WEIGHTS, (1, 0), (1, 3))),
        ),
        "optimizer.state.param.a.weight": IndexedTensor(
            "F32", (2, 3), (TensorPiece(OPTIMIZER, (0, 0), (2, 3)),)
        ),
    },
    counts={"step": 2.0},
)


def manifest(**num_bytes: int) -> Manifest:
    sizes = {WEIGHTS: 12, OPTIMIZER: 24} | num_bytes
    files = {f"policy/{name}": FileDigest(bytes=n, xxh3_128="") for name, n in sizes.items()}
    return Manifest(step=1, files=files)


def read(folder: Path, text: str, listed: Manifest | None = None) -> Index:
    policy = folder / "policy"
    policy.mkdir(exist_ok=True)
    (policy / "tensors.json").write_text(text)
    return read_index(policy, listed or manifest())


def content() -> dict[str, Any]:
    return json.loads(index_text(INDEX))


def test_index_is_read_as_it_was_written(tmp_path: Path):
    assert read(tmp_path, index_text(INDEX)) == INDEX
    assert piece_name("a.weight", (1, 0)) == "a.weight@1,0"


def test_no_more_is_promised_than_the_files_hold(tmp_path: Path):
    for listed in (
        manifest(**{WEIGHTS: 11}),
        manifest(**{OPTIMIZER: 23}),
        Manifest(step=1, files={}),
    ):
        with pytest.raises(Damage, match="is not listed, or has less than is said"):
            read(tmp_path, index_text(INDEX), listed)


def pieces_of(*found: tuple[tuple[int, ...], tuple[int, ...]]) -> list[dict]:
    return [{"file": WEIGHTS, "offset": offset, "shape": shape} for offset, shape in found]


@pytest.mark.parametrize(
    ("change", "cause"),
    [
        ({"pieces": pieces_of(((0, 0), (1, 3)))}, "leave a gap or overlap"),
        ({"pieces": pieces_of(((0, 0), (1, 3)), ((0, 0), (1, 3)))}, "leave a gap or overlap"),
        (  # six elements, one of them twice
            {"pieces": pieces_of(((0, 0), (2, 2)), ((1, 1), (1, 2)))},
            "leave a gap or overlap",
        ),
        ({"pieces": []}, "leave a gap or overlap"),
        ({"pieces": pieces_of(((1, 0), (2, 3)))}, "outside of its tensor"),
        ({"pieces": pieces_of(((0,), (6,)))}, "outside of its tensor"),
        ({"pieces": pieces_of(((-1, 0), (2, 3)))}, "something else than counts"),
        ({"pieces": pieces_of(((0, 0), (2, 10**30)))}, "something else than counts"),
        ({"pieces": [{"file": OPTIMIZER, "offset": [0, 0], "shape": [2, 3]}]}, "a piece in"),
        ({"pieces": [{"file": "../x", "offset": [0, 0], "shape": [2, 3]}]}, "a piece in '../x'"),
        ({"pieces": [{"file": 3, "offset": [0, 0], "shape": [2, 3]}]}, "a piece in 3"),
        ({"pieces": [{"file": WEIGHTS, "offset": [0, 0]}]}, "no index of tensors"),
        ({"pieces": 3}, "no index of tensors"),
        ({"dtype": "I64"}, "a dtype 'I64'"),
        ({"dtype": ["F32"]}, "a dtype"),
        ({"shape": [2, 3, 1, 1, 1]}, "no short list"),
        ({"shape": "23"}, "no short list"),
        ({"shape": [2, True]}, "something else than counts"),
        ({"shape": [2**40, 2**40]}, "leave a gap or overlap"),
    ],
)
def test_tensor_that_cannot_be_is_damage(change: dict, cause: str, tmp_path: Path):
    changed = content()
    changed["tensors"]["a.weight"] |= change
    with pytest.raises(Damage, match=cause) as error:
        read(tmp_path, json.dumps(changed))
    assert str(tmp_path / "policy" / "tensors.json") in str(error.value)


@pytest.mark.parametrize(
    "text",
    [
        "",
        "{}",
        "[]",
        "null",
        '{"tensors": {}}',
        '{"tensors": [], "counts": {}}',
        "\0" * 9,
        "[" * 99999,
    ]
    + ['{"tensors": {}, "counts": []}', '{"tensors": {"a": 1}, "counts": {}}'],
)
def test_text_that_is_no_index_is_damage(text: str, tmp_path: Path):
    with pytest.raises(Damage, match=r"tensors\.json"):
        read(tmp_path, text)


@pytest.mark.parametrize("kind", KINDS)
def test_special_file_is_no_index(kind: str, tmp_path: Path):
    (tmp_path / "policy").mkdir()
    make_special(tmp_path / "policy" / "tensors.json", kind)
    with pytest.raises(Damage, match=r"tensors\.json"):
        read_index(tmp_path / "policy", manifest())


def test_optimizer_state_in_a_file_of_weights_is_damage(tmp_path: Path):
    """Whoever loads weights alone has checked no file of optimizer state, nor the other way."""
    changed = content()
    (piece,) = changed["tensors"]["optimizer.state.param.a.weight"]["pieces"]
    piece["file"] = WEIGHTS
    with pytest.raises(Damage, match="a piece in"):
        read(tmp_path, json.dumps(changed), manifest(**{WEIGHTS: 99}))


def test_pieces_of_many_ranks_are_checked_in_no_time(tmp_path: Path):
    """Of 96 layers on 8 x 64 ranks: as many as a large model's tensor has."""
    pieces = [
        TensorPiece(WEIGHTS, (layer, 2 * row, 16 * column), (1, 2, 16))
        for layer, row, column in itertools.product(range(96), range(64), range(8))
    ]
    tensor = IndexedTensor("BF16", (96, 128, 128), tuple(pieces))
    index = dataclasses.replace(INDEX, tensors={"a": tensor})
    text, listed = index_text(index), manifest(**{WEIGHTS: 2 * 96 * 128 * 128})
    start = time.process_time()
    assert read(tmp_path, text, listed) == index
    assert (
        time.process_time() - start < 20.0
    )  # 49,152 of them; half a second where nothing else runs
    broken = dataclasses.replace(tensor, pieces=(*pieces[:-1], pieces[0]))
    with pytest.raises(Damage, match="leave a gap or overlap"):
        read(tmp_path, index_text(dataclasses.replace(index, tensors={"a": broken})), listed)


@given(data=st.data())
@pytest.mark.fuzz
@fuzzed
def test_any_index_is_read_or_refused(tmp_path: Path, data: st.DataObject):
    found = refused_or_read(lambda: read(tmp_path, json.dumps(data.draw(near(content())))))
    if found is not None:
        for name, tensor in found.tensors.items():
            covered = [
                element
                for piece in tensor.pieces
                for element in itertools.product(
                    *(range(a, a + n) for a, n in zip(piece.offset, piece.shape, strict=True))
                )
            ]
            whole = itertools.product(*map(range, tensor.shape))
            assert sorted(covered) == sorted(whole), name
