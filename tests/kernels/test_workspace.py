"""Chunks of logits: even, in whole tiles, within their memory."""

import torch

from kernels.workspace import WORKSPACE_BYTES, chunk_rows, logit_workspace


def test_chunks_are_even_whole_tiles_within_the_workspace() -> None:
    mib = 2**20
    assert chunk_rows(8192, 50304, 4, 256 * mib) == 1280  # 1334 rows fit
    assert chunk_rows(1400, 50304, 4, 256 * mib) == 768  # not 1280 and a tail of 120
    assert chunk_rows(300, 50304, 4, 256 * mib) == 300
    assert chunk_rows(8192, 262144, 4, 256 * mib) == 256
    assert chunk_rows(131072, 50304, 4, WORKSPACE_BYTES["cuda"]) == 2304
    assert chunk_rows(131072, 50304 // 8, 4, WORKSPACE_BYTES["cuda"]) == 8192  # 197 MiB
    assert chunk_rows(100, 50304, 4, 1) == 1
    assert chunk_rows(0, 50304, 4, 256 * mib) == 0


def test_the_device_has_a_default() -> None:
    weight = torch.zeros(2**12, 1)
    whole = logit_workspace(10**6, weight, torch.float64, None)
    given = logit_workspace(10**6, weight, torch.float64, 2**24)
    assert 0.9 * WORKSPACE_BYTES["cpu"] < whole.nbytes <= WORKSPACE_BYTES["cpu"]
    assert 0.5 * 2**24 < given.nbytes <= 2**24
