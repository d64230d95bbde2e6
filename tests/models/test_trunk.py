import pytest
import torch

from engine.ranks.start import start_parallel
from engine.settings.layout import ParallelLayout
from engine.training.network import Kind
from models.packed_sequences import PackedSequences
from models.trunk import run_trunk
from tests.tiny import SIZE, random_network


def row(*lengths: int) -> tuple[torch.Tensor, torch.Tensor, PackedSequences]:
    """Return tokens, positions and bounds of sequences of these lengths, packed into a row."""
    tokens = (7 * torch.arange(sum(lengths))) % SIZE.vocab_size
    positions = torch.cat([torch.arange(n) for n in lengths])
    bounds = torch.tensor([0, *lengths]).cumsum(0).to(torch.int32)
    return tokens, positions, PackedSequences.of(bounds, max(lengths))


@pytest.mark.parametrize("kind", ["language", "scalar"])
def test_sequences_of_a_row_do_not_see_one_another(kind: Kind):
    network = random_network(kind, start_parallel(ParallelLayout(), seed=0))
    (chunk,) = network.modules
    tokens, positions, sequences = row(12, 20)
    with network.parallel.active(), torch.no_grad():
        hidden = run_trunk(chunk, tokens, positions, sequences)
        assert hidden.shape == (32, 1, SIZE.hidden_size)
        alone = [
            run_trunk(chunk, tokens[a:b], positions[a:b], row(b - a)[2])
            for a, b in ((0, 12), (12, 32))
        ]
        assert torch.allclose(torch.cat(alone), hidden, atol=1e-5)
        joined = run_trunk(chunk, tokens, positions, row(32)[2])
    assert torch.allclose(joined[:12], hidden[:12], atol=1e-5)
    assert not torch.allclose(joined[12:], hidden[12:], atol=1e-2)


@pytest.mark.parametrize("is_first", [True, False])
def test_only_the_first_chunk_embeds(is_first: bool):
    """A later one is given nothing: megatron's layers take what the stage before has sent."""
    tokens, positions, sequences = row(3, 2)

    class Chunk:
        pre_process, size = is_first, SIZE

        def embedding(self, tokens: torch.Tensor, positions: torch.Tensor) -> torch.Tensor:
            assert is_first and tokens.shape == positions.shape == (1, 5)
            return (100 * tokens + positions).float()

        def decoder(self, *, hidden_states, attention_mask, packed_seq_params) -> torch.Tensor:
            assert attention_mask is None and packed_seq_params is sequences
            return torch.full((1,), -1.0) if hidden_states is None else hidden_states

    found = run_trunk(Chunk(), tokens, positions, sequences).flatten().tolist()
    assert found == ([0.0, 701.0, 1402.0, 2100.0, 2801.0] if is_first else [-1.0])
