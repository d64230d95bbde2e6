import torch

from engine.generation.scheduler import Prefill, Step
from engine.generation.sequence import LiveSequence
from engine.generation.step_tensors import upload
from models.paged_attention import PagedCache

CPU = torch.device("cpu")
STOPS = torch.tensor([0])


def cache() -> PagedCache:
    lanes = [torch.empty(512, dtype=torch.uint8) for _ in range(2)]
    return PagedCache([1], (16, 4, 1, 2), blocks_per_sequence=4, dtype=torch.float32, lanes=lanes)


def decoding(index: int, length: int, blocks: list[int], max_length: int = 16) -> LiveSequence:
    """A sequence of tokens 100, 101, ..., all but the last in the cache."""
    return LiveSequence(
        sample_index=index,
        tokens=list(range(100, 100 + length)),
        prompt_length=2,
        max_length=max_length,
        blocks=blocks,
        num_cached=length - 1,
    )


def decode_step(*sequences: LiveSequence) -> Step:
    return Step(decodes=list(sequences), prefills=[], num_steps=1)


def tensors_of(step: Step, num_rows: int):
    return upload(step, cache(), num_decode_rows=num_rows, min_new_tokens=3, device=CPU)


def test_a_decoding_step_feeds_last_tokens_and_idle_rows_write_nowhere():
    step = decode_step(decoding(8, 6, [3, 5]), decoding(9, 4, [7], max_length=9))
    tensors = tensors_of(step, 3)
    assert tensors.tokens.tolist() == [105, 103, 0]
    assert tensors.positions.tolist() == [5, 3, 0]
    assert tensors.paged.slots.tolist() == [5 * 4 + 1, 7 * 4 + 3, -1]
    assert tensors.paged.context_lengths.tolist() == [6, 4, 0]
    assert tensors.paged.block_tables[:, :2].tolist() == [[3, 5], [7, 0], [0, 0]]
    assert tensors.rows.tolist() == [0, 1, 2]
    assert tensors.is_idle.tolist() == [False, False, True]
    assert tensors.sample_index.tolist() == [8, 9, 0]
    assert tensors.first_stop.tolist() == [5, 5, 0]
    assert tensors.last_position.tolist() == [15, 8, 0]


def test_a_clone_shares_nothing():
    first = tensors_of(decode_step(decoding(8, 6, [3, 5])), 2)
    copy = first.clone()
    assert len(copy.buffers()) == 10
    for mine, theirs in zip(copy.buffers(), first.buffers(), strict=True):
        assert torch.equal(mine, theirs)
        assert mine.data_ptr() != theirs.data_ptr()
    copy.advance(torch.tensor([50, -1], dtype=torch.int32), STOPS)
    assert first.tokens.tolist() == [105, 0]
    assert first.paged.slots.tolist() == [5 * 4 + 1, -1]


def test_chunks_follow_the_decoding_rows_and_sample_at_their_ends():
    whole = decoding(1, 3, [1])
    part = decoding(2, 9, [4, 2, 6])
    prefills = [
        Prefill(sequence=whole, start=0, stop=3),
        Prefill(sequence=part, start=4, stop=7),
    ]
    step = Step(decodes=[decoding(0, 2, [9])], prefills=prefills, num_steps=1)
    tensors = tensors_of(step, 2)
    assert tensors.tokens.tolist() == [101, 0, 100, 101, 102, 104, 105, 106]
    assert tensors.positions.tolist() == [1, 0, 0, 1, 2, 4, 5, 6]
    assert tensors.paged.slots.tolist() == [37, -1, 4, 5, 6, 8, 9, 10]
    assert tensors.rows.tolist() == [0, 4]  # the second chunk does not reach its sequence's end
    paged = tensors.paged
    assert paged.prompts.cu_seqlens_q.tolist() == [0, 3, 6]
    assert paged.prompts.cu_seqlens_kv.tolist() == [0, 3, 10]
    assert (paged.prompts.max_seqlen_q, paged.prompts.max_seqlen_kv) == (3, 7)
    assert paged.prompt_slots.tolist() == [4, 5, 6, 16, 17, 18, 19, 8, 9, 10]


def test_whole_prompts_need_no_keys_from_the_cache():
    prefill = Prefill(sequence=decoding(1, 3, [1]), start=0, stop=3)
    paged = tensors_of(Step(decodes=[], prefills=[prefill], num_steps=1), 0).paged
    assert paged.prompt_slots is None
    assert paged.prompts.cu_seqlens_kv is paged.prompts.cu_seqlens_q


def test_advancing_on_the_device_equals_uploading_the_next_step():
    going, full, stopping = decoding(1, 4, [3, 5]), decoding(2, 4, [7], 5), decoding(3, 4, [8])
    tensors = tensors_of(decode_step(going, full, stopping), 4)
    sampled = torch.tensor([50, 51, 0, -1], dtype=torch.int32)  # the last row is idle
    tensors.advance(sampled, STOPS)
    going.tokens.append(50)
    going.num_cached += 1
    expected = tensors_of(decode_step(going), 1)
    assert tensors.is_idle.tolist() == [False, True, True, True]
    for name in ("tokens", "positions"):
        assert getattr(tensors, name)[0] == getattr(expected, name)[0]
    assert tensors.paged.slots.tolist() == [expected.paged.slots.item(), -1, -1, -1]
    assert tensors.paged.context_lengths.tolist() == [5, 0, 0, 0]
    assert tensors.tokens.min() >= 0
