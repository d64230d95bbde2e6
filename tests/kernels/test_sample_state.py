"""The state of a draw from a part of a row's columns."""

import pytest
import torch

from kernels import sample_state as state_module
from kernels.philox import SampleKey
from kernels.sample import merge_states
from kernels.sample_state import sample_state
from tests.kernels.oracle import largest_difference

# Sample indices beyond 32 bits, and positions up to the largest.
INDEX = torch.tensor([0, 2**33 + 5, 7, 2**40])
POSITION = torch.tensor([0, 1000, 3, 2**31 - 1])


@pytest.fixture(autouse=True)
def small_blocks(monkeypatch: pytest.MonkeyPatch) -> None:
    """Programs of 64 columns, so that a row is merged from several."""
    monkeypatch.setattr(state_module, "_BLOCK", 64)


def test_a_greedy_state_is_the_maximum_and_the_mass_of_its_columns(backend: str) -> None:
    logits = torch.randn(4, 100)
    states = sample_state(logits, SampleKey(3, INDEX, POSITION), temperature=0.0, first_column=48)
    assert states.shape == ((2 if backend == "triton" else 1), 4, 4)
    assert states.dtype == torch.int32
    state = merge_states(states)
    value, logit, logsumexp = state[:, :3].view(torch.float32).unbind(1)
    best, column = logits.max(1)
    assert value.equal(best)
    assert logit.equal(best)
    assert state[:, 3].tolist() == (column + 48).tolist()
    assert largest_difference(logsumexp, logits.double().logsumexp(1)) < 2e-6


def test_a_drawn_state_has_the_scaled_logit_of_its_column(backend: str) -> None:
    logits = torch.randn(4, 100)
    key = SampleKey(3, INDEX, POSITION)
    thresholds = 2 * logits.topk(3).values[:, 2]  # three columns of each row are kept
    state = merge_states(sample_state(logits, key, temperature=0.5, thresholds=thresholds))
    _, logit, logsumexp = state[:, :3].view(torch.float32).unbind(1)
    picked = logits.gather(1, state[:, 3:].long())[:, 0]
    assert largest_difference(logit, 2 * picked) < 1e-6
    assert (logit >= thresholds).all(), "cut columns are not drawn"
    # Of all columns, whatever is cut.
    assert largest_difference(logsumexp, (2 * logits.double()).logsumexp(1)) < 4e-6


@pytest.mark.parametrize("logit", [torch.nan, -torch.inf])
def test_a_shard_without_mass_names_a_column_of_its_own(backend: str, logit: float) -> None:
    key = SampleKey(3, INDEX, POSITION)
    for num_valid_vocab, column in ((90, 48), (48, 2**31 - 1)):  # the second holds padding alone
        states = sample_state(
            torch.full((4, 100), logit),
            key,
            temperature=1.0,
            first_column=48,
            num_valid_vocab=num_valid_vocab,
        )
        assert merge_states(states)[:, 3].tolist() == [column] * 4


def test_a_shard_that_begins_within_a_group_is_refused(backend: str) -> None:
    with pytest.raises(ValueError, match="columns 20 to 60 must begin at a multiple of 8"):
        sample_state(
            torch.randn(4, 40), SampleKey(3, INDEX, POSITION), temperature=1.0, first_column=20
        )
