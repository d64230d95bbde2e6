"""The merge of a row's states over vocabulary shards."""

import math

import pytest
import torch

from kernels.row_merge import merge_row_states, write_merged_results
from kernels.row_state import RowSpec, empty_results, logprobs_and_entropy, row_state
from tests.kernels.oracle import exact_logprobs, largest_difference, random_rows


def merged_shards(
    logits: torch.Tensor, labels: torch.Tensor, widths: list[int], num_valid: int
) -> torch.Tensor:
    """The state merged from shards of the given widths."""
    states, first_column = [], 0
    for shard in logits.split(widths, dim=1):
        spec = RowSpec(num_valid_vocab=num_valid, first_column=first_column, temperature=0.7)
        states.append(row_state(shard, labels, spec))
        first_column += shard.shape[1]
    return merge_row_states(torch.stack(states))


@pytest.mark.parametrize(
    "widths",
    [
        [145],
        [73, 72],
        [50, 1, 94],
        [37, 37, 37, 34],
        [20, 20, 20, 20, 20, 20, 20, 5],
        [100, 20, 25],  # the last shard has no valid column
        [100, 25, 20],  # nor has most of the last two
    ],
)
def test_shards_merge_to_the_whole_vocabulary(backend: str, widths: list[int]) -> None:
    logits, labels = random_rows(6, 145)
    labels = labels.clamp(max=119)
    labels[2] = -100
    state = merged_shards(logits, labels, widths, num_valid=120)
    got = logprobs_and_entropy(state, labels, RowSpec(num_valid_vocab=120))
    want = exact_logprobs(logits, labels, temperature=0.7, num_valid_vocab=120)
    assert largest_difference(got[0], want[0]) < 2e-6 * logits.abs().max() / 0.7
    assert largest_difference(got[1], want[1]) < 5e-6 * math.log(145)


def test_ranks_agree_bitwise_because_the_merge_has_an_order() -> None:
    states = torch.rand(4, 100, 4)
    merged = merge_row_states(states)
    assert merged.equal(merge_row_states(states.clone()))
    assert largest_difference(merged, merge_row_states(states.flip(0))) < 1e-6


@pytest.mark.parametrize("num_rows", [1, 300, 0])
@pytest.mark.parametrize("with_entropy", [False, True])
def test_results_are_written_from_the_shards_states(
    backend: str, num_rows: int, with_entropy: bool
) -> None:
    logits, labels = random_rows(max(num_rows, 1), 96)
    logits, labels = logits[:num_rows], labels[:num_rows].clamp(max=79)
    if num_rows > 2:
        labels[2] = -100
    spec = RowSpec(num_valid_vocab=80, temperature=0.7, with_entropy=with_entropy)
    states = torch.stack(
        [
            row_state(
                shard,
                labels,
                RowSpec(
                    num_valid_vocab=80,
                    first_column=first,
                    temperature=0.7,
                    with_entropy=with_entropy,
                ),
            )
            for first, shard in zip((0, 32, 64), logits.split(32, dim=1), strict=True)
        ]
    )
    results = empty_results(num_rows, logits, with_entropy)
    write_merged_results(results, states, labels, spec)
    logprob, entropy = exact_logprobs(logits, labels, temperature=0.7, num_valid_vocab=80)
    assert largest_difference(results.logprobs, logprob) < 3e-5
    counts = labels != -100
    assert largest_difference(results.state[counts], merge_row_states(states)[counts]) < 1e-5
    if with_entropy:
        assert largest_difference(results.entropies, entropy) < 5e-5
    else:
        assert results.entropies is None
