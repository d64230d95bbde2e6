import torch

from models.packed_sequences import PackedSequences
from models.prefixes import Prefixes

CU_SEQLENS = torch.tensor([0, 2, 5, 6], dtype=torch.int32)


def test_keys_are_the_rows_own_where_each_sequence_holds_all_it_has():
    sequences = PackedSequences.of(CU_SEQLENS, 3)
    assert sequences.keys is None
    assert sequences.cu_seqlens_kv is sequences.cu_seqlens_q is CU_SEQLENS
    assert (sequences.max_seqlen_q, sequences.max_seqlen_kv) == (3, 3)


def test_keys_count_the_prefixes():
    lengths = torch.tensor([0, 1, 1], dtype=torch.int32)
    prefixes = Prefixes(starts=torch.zeros_like(lengths), lengths=lengths, num_keys=8)
    sequences = PackedSequences.of(CU_SEQLENS, 4, None, prefixes)
    assert sequences.cu_seqlens_q is CU_SEQLENS
    assert sequences.cu_seqlens_kv.tolist() == [0, 2, 6, 8]
    assert sequences.keys is not None and sequences.keys.is_of_row


def test_padding_gathers_sequences_to_one_length_and_scatters_them_back():
    sequences = PackedSequences.of(CU_SEQLENS, 3)
    gather, scatter = sequences.padding
    assert gather.tolist() == [[0, 1, 2], [2, 3, 4], [5, 5, 5]]
    assert torch.equal(gather.flatten()[scatter], torch.arange(6))


def test_a_rank_that_holds_the_whole_row_holds_its_tokens_as_they_lie():
    sequences, values = PackedSequences.of(CU_SEQLENS, 3), torch.arange(6)
    assert sequences.held(values) is values
    assert sequences.in_row(values) is values
    assert sequences.join(values) is values
