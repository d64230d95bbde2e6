import numpy as np
import pytest
import torch
from torch import Tensor

from engine.data.batches import PackedBatch, pack
from engine.data.examples import Example
from engine.ranks.parallel import Parallel
from engine.ranks.start import start_parallel
from engine.settings.layout import ParallelLayout
from engine.training.network import Network
from kernels.linear_logprobs import ProportionalLoss
from kernels.row_state import IGNORE_INDEX
from models.context_parallel import ContextShare
from models.packed_sequences import PackedSequences
from models.prefixes import Prefixes
from models.readouts import Logits, Logprobs, Readings, Readout, TokenLosses, shift_right
from tests.ranks import run_ranks
from tests.tiny import SIZE, random_network


def the_batch() -> PackedBatch:
    draw = np.random.default_rng(0)
    tokens = [draw.integers(0, SIZE.vocab_size, n) for n in (30, 3, 11)]
    return pack([Example(tokens=t, prompt_length=2) for t in tokens], multiple_of=8)


def read(
    network: Network, batch: PackedBatch, readout: Readout, share: ContextShare | None = None
) -> Tensor | tuple[Tensor, Tensor]:
    sequences = PackedSequences.of(batch.cu_seqlens, batch.max_seqlen, share)
    return network.modules[0](batch.tokens, batch.positions, sequences, readout)


@pytest.fixture
def parallel() -> Parallel:
    return start_parallel(ParallelLayout(), seed=1)


def test_the_last_state_predicts_nothing():
    sequences = PackedSequences.of(torch.tensor([0, 4], dtype=torch.int32), 4)
    mask = torch.tensor([True, False, True, True])
    labels = Logprobs(mask).labels(torch.tensor([5, 6, 7, 8]), sequences)
    assert labels.tolist() == [IGNORE_INDEX, 7, 8, IGNORE_INDEX]


def test_no_log_prob_is_read_where_a_prefix_ends_before_several_tokens():
    lengths = torch.tensor([0, 1], dtype=torch.int32)
    prefixes = Prefixes(starts=torch.zeros_like(lengths), lengths=lengths, num_keys=6)
    cu_seqlens = torch.tensor([0, 3, 5], dtype=torch.int32)
    sequences = PackedSequences.of(cu_seqlens, 3, None, prefixes)
    with pytest.raises(ValueError, match="log-probs need whole sequences"):
        Logprobs(torch.ones(5, dtype=torch.bool)).labels(torch.arange(5), sequences)


def test_readings_move_to_the_token_they_are_about():
    assert shift_right(torch.tensor([1.0, 2.0, 3.0])).tolist() == [0.0, 1.0, 2.0]
    assert shift_right(torch.tensor([[1.0, 2.0], [3.0, 4.0]])).tolist() == [[0, 1], [0, 3]]


def test_logprobs_are_those_of_the_logits(parallel: Parallel):
    network, batch = random_network("language", parallel), the_batch()
    logits = read(network, batch, Logits(batch.targets - 1))[:, : SIZE.vocab_size]
    log_p = (logits / 0.7).log_softmax(-1)
    expected = log_p.gather(1, batch.tokens[batch.targets, None])[:, 0]
    found = read(network, batch, Logprobs(batch.mask, batch.targets, 0.7))
    torch.testing.assert_close(found[batch.mask], expected, rtol=1e-5, atol=1e-5)
    assert (found[~batch.mask] == 0).all()


def test_a_token_loss_is_told_which_tokens_its_logprobs_are_of(parallel: Parallel):
    network, batch = random_network("language", parallel), the_batch()
    weights = torch.linspace(1, 2, len(batch.tokens))
    asked = Logprobs(batch.mask, batch.targets)
    loss, logprobs = read(network, batch, TokenLosses(asked, lambda x, at: weights[at] * x))
    torch.testing.assert_close(loss, (weights * logprobs).sum())
    assert loss.abs() > 1


def test_a_network_is_not_read_as_one_of_the_other_kind(parallel: Parallel):
    batch = the_batch()
    with pytest.raises(TypeError):
        read(random_network("language", parallel), batch, Readings())
    with pytest.raises(AttributeError):
        read(random_network("scalar", parallel), batch, Logprobs(batch.mask))


def readings_of_rank(cp: int) -> dict[str, Tensor]:
    """What one of cp ranks reads of one row; losses are summed over them."""
    parallel = start_parallel(ParallelLayout(cp=cp), seed=1)
    batch = the_batch()
    share = None
    if cp > 1:
        share = ContextShare(group=parallel.cp_group, num_tokens=len(batch.tokens))
    weights = torch.linspace(1, 2, len(batch.tokens))
    asked = Logprobs(batch.mask, batch.targets, 0.7)
    losses = {
        "weighted": lambda logprobs, at: weights[at] * logprobs,
        "proportional": ProportionalLoss(torch.tensor(-0.5)),
    }
    with torch.no_grad(), parallel.active():
        language = random_network("language", parallel)
        found = {"logprobs": read(language, batch, asked, share)}
        found["readings"] = read(random_network("scalar", parallel), batch, Readings(), share)
        for name, loss in losses.items():
            total, found[f"{name} logprobs"] = read(
                language, batch, TokenLosses(asked, loss), share
            )
            if cp > 1:
                torch.distributed.all_reduce(total, group=parallel.cp_group)
            found[name] = total
    return found


def test_ranks_that_share_a_row_read_all_of_it():
    (expected,) = run_ranks(readings_of_rank, 1, 1)
    for found in run_ranks(readings_of_rank, 2, 2):
        torch.testing.assert_close(found, expected, rtol=1e-5, atol=1e-5)
