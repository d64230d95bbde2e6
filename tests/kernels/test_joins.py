"""A row's results over the whole vocabulary, from all of it or from a shard that is joined."""

import torch
from torch import Tensor

from kernels.joins import ONE_SHARD, Joins, write_joined_results
from kernels.row_state import RowSpec, empty_results, row_state
from tests.kernels.oracle import exact_logprobs, largest_difference, random_rows


def test_a_shard_gives_what_the_whole_vocabulary_gives(backend: str) -> None:
    logits, labels = random_rows(5, 90)
    labels[2] = -100
    first, second = logits.split(45, dim=1)
    spec, other = (RowSpec(num_valid_vocab=90, first_column=column) for column in (0, 45))

    def gather(state: Tensor) -> Tensor:
        return torch.stack([state, row_state(second, labels, other)])

    exact = exact_logprobs(logits, labels)
    for shard, joins in ((logits, ONE_SHARD), (first, Joins(gather_states=gather))):
        results = empty_results(5, logits, with_entropy=True)
        write_joined_results(results, shard, labels, spec, joins)
        assert largest_difference(results.logprobs, exact[0]) < 2e-5
        assert largest_difference(results.entropies, exact[1]) < 2e-5


def test_a_single_shard_is_joined_by_doing_nothing() -> None:
    tensor = torch.randn(3)
    assert ONE_SHARD.gather_states is None
    assert ONE_SHARD.gather_hidden(tensor) is tensor
    assert ONE_SHARD.start_reduction(tensor)() is tensor
