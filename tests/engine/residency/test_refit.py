"""A copy in another layout holds the bits that loading into that layout gives."""

from pathlib import Path

import pytest
import torch
import torch.distributed as dist

from engine.errors import UserError
from engine.residency import refit as refit_file
from engine.residency.refit import Refit
from engine.settings.layout import ParallelLayout
from engine.settings.numerics import Numerics
from engine.training.network import Network
from tests.engine.generation.random_gpt2 import load_gpt2
from tests.ranks import run_ranks

PP2 = ParallelLayout(pp=2)
TP2 = ParallelLayout(tp=2)
TP2_PP2 = ParallelLayout(tp=2, pp=2, sequence_parallel=True)
VIRTUAL = ParallelLayout(tp=2, pp=2, virtual_pp=2)
# From which layout to which, in rounds of so many bytes.
CASES = [
    (PP2, TP2, 20_000),
    (TP2_PP2, ParallelLayout(tp=4), 20_000),
    (VIRTUAL, ParallelLayout(), 2**28),
    (ParallelLayout(tp=4), TP2, 20_000),
    (ParallelLayout(), TP2, 2**28),
]


def weights(network: Network) -> dict[str, torch.Tensor]:
    return {name: p for m in network.modules for name, p in m.named_parameters()}


def bytes_not_held(source: Network, target: Network) -> int:
    """What this rank has to receive from others when the source's tp is 1, at most of all ranks."""
    held = set()
    for module in source.modules:
        numbers = [layer.layer_number - 1 for layer in module.decoder.layers]
        for name, _ in module.named_parameters():
            parts = name.split(".")
            if "layers" in parts:
                parts[2] = str(numbers[int(parts[2])])
            held.add(".".join(parts))
    missing = sum(p.nbytes for name, p in weights(target).items() if name not in held)
    most = torch.tensor(missing)
    dist.all_reduce(most, op=dist.ReduceOp.MAX)
    return int(most)


def check_copies(folder: Path) -> None:
    for start, layout, round_bytes in CASES:
        refit_file._ROUND_BYTES = round_bytes  # in this process, which ends with the test
        source = load_gpt2(folder, start)
        refit = Refit(source, layout, numerics=Numerics())
        assert (len(refit._rounds) > 10) == (round_bytes == 20_000)
        assert refit.num_bytes == 0
        report = refit()
        expected = weights(load_gpt2(folder, layout))
        found = weights(refit.network)
        assert found.keys() == expected.keys()
        for name, parameter in expected.items():
            assert torch.equal(found[name], parameter), (start, layout, name)
        if start.tp == 1:
            assert report.received_bytes == bytes_not_held(source, refit.network)


@pytest.mark.slow
def test_a_copy_has_the_bits_of_the_weights_and_a_rank_receives_what_it_lacks(gpt2_folder):
    run_ranks(check_copies, 4, gpt2_folder)


@pytest.mark.parametrize(
    ("layout", "match"),
    [
        (ParallelLayout(cp=2), "without context parallelism, not from cp 1 to cp 2"),
        (ParallelLayout(pp=2), "without pipeline, not to pp 2"),
        (ParallelLayout(), "a copy would gain nothing"),
        (ParallelLayout(tp=3), "layout.tp 3 must divide"),
        (TP2, "1 ranks cannot be split"),
    ],
)
def test_a_layout_that_cannot_be_filled_is_an_error(layout, match, network):
    with pytest.raises(UserError, match=match):
        Refit(network, layout, numerics=Numerics())
