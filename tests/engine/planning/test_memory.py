"""Bytes of the head's workspace: what the kernels take."""

import pytest

from engine.planning.memory import HEAD_ROWS, HEAD_WORKSPACE, PlannedNetwork
from engine.settings.layout import ParallelLayout
from engine.settings.numerics import Numerics
from kernels.workspace import MOST_ROWS, WORKSPACE_BYTES, chunk_rows
from models.sizes import SIZES


@pytest.mark.parametrize("tp", [1, 8])
def test_the_head_has_the_workspace_that_the_kernels_take(tp: int) -> None:
    assert (WORKSPACE_BYTES["cuda"], MOST_ROWS) == (HEAD_WORKSPACE, HEAD_ROWS)
    language, scalar = (
        PlannedNetwork(
            kind=kind, size=SIZES["1.3b"], layout=ParallelLayout(tp=tp), numerics=Numerics(), dp=1
        ).workspace_bytes(0, 0, trains=False)
        for kind in ("language", "scalar")
    )
    columns = SIZES["1.3b"].padded_vocab_size // tp
    taken = 4 * columns * chunk_rows(10**6, columns, 4, WORKSPACE_BYTES["cuda"])
    assert taken <= language - scalar <= 1.05 * taken
