"""What the stages of a pipeline send one another arrives, and where it is meant to.

gloo takes a message and keeps it until it is asked for. NCCL keeps none: the messages of two ranks
in a group run one after the other, in the order in which each side asked for them. With two stages
both neighbours of a rank are the other one, and a wrong order gives a chunk what was meant for
another, or lets both wait for ever. So what the schedules ask for is also written down, by ranks
that are not there, and played by NCCL's rules.
"""

import dataclasses
import zlib
from collections import defaultdict, deque
from collections.abc import Iterable, Iterator
from typing import Any, Literal

import numpy as np
import pytest
import torch
import torch.distributed as dist
from megatron.core.pipeline_parallel import p2p_communication
from torch import Tensor

from engine.data.batches import PackedBatch, pack
from engine.data.examples import Example
from engine.losses import NegativeLogLikelihood
from engine.ranks.start import end_parallel, pretended_rank, start_parallel
from engine.settings.layout import ParallelLayout
from engine.settings.numerics import Numerics
from engine.training.network import Network, build_network
from engine.training.passes import forward, forward_backward
from engine.training.trainable import make_trainable
from models.sizes import GPTSize
from tests.gpu_choices import choices_of_a_gpu
from tests.ranks import run_ranks

NUM_BATCHES, NUM_TOKENS = 12, 30
EMBEDDING = "embedding.word_embeddings.weight"
BECOMES = {"send_next": "recv_prev", "send_prev": "recv_next"}


@dataclasses.dataclass(frozen=True, kw_only=True, eq=False)
class Message:
    """One side of a message, as a rank asks for it."""

    side: Literal["send", "recv"]
    peer: int
    pair: tuple[str, frozenset[int]]
    """Its communicator: a group, and two ranks of it."""
    place: str
    """What it is to megatron: send_next, recv_prev, send_prev or recv_next."""


class Stuck(Exception):
    """Ranks wait for each other for ever, or what one sent came to another place."""


class Rank:
    """What a rank has asked for, and how far it is."""

    def __init__(self, requests: Iterable[Message | list[Message]]) -> None:
        self.requests = deque(requests)  # a message to start, or those to wait for
        self.open: list[Message] = []  # asked for and not over, in order
        self.pairs: set[Any] = set()  # the communicators it has come to

    def proceed(self, ranks: dict[int, "Rank"]) -> bool:
        """Ask for all that is not behind something to wait for; return whether that was anything.

        Both ranks of a pair make its communicator when they first use it, and wait there.
        """
        before = len(self.requests)
        while self.requests:
            request = self.requests[0]
            if isinstance(request, list):
                if any(message in self.open for message in request):
                    break
            else:
                self.pairs.add(request.pair)
                if request.pair not in ranks[request.peer].pairs:
                    break
                self.open.append(request)
            self.requests.popleft()
        return len(self.requests) < before

    def running(self) -> list[Message]:
        """The messages that wait for nothing but the other side: one a communicator, and none that
        was asked for after one that cannot start, as under CUDA_DEVICE_MAX_CONNECTIONS=1."""
        first: dict[Any, Message] = {}
        for message in self.open:
            if message.pair in first:
                break
            first[message.pair] = message
        return list(first.values())


def play(requests: dict[int, list]) -> int:
    """Play what each rank asks for by NCCL's rules; return how many messages arrived, or Stuck."""
    ranks = {number: Rank(asked) for number, asked in requests.items()}
    num_arrived = 0
    while True:
        num_moved = sum(rank.proceed(ranks) for rank in ranks.values())
        met = [
            (rank, sent, ranks[sent.peer], received)
            for rank in ranks.values()
            for sent in rank.running()
            for received in ranks[sent.peer].running()
            if (sent.side, received.side, sent.pair) == ("send", "recv", received.pair)
        ]
        for rank, sent, other, received in met:
            if BECOMES[sent.place] != received.place:
                raise Stuck(f"what was {sent.place} came to {received.place}")
            rank.open.remove(sent)
            other.open.remove(received)
        num_arrived += len(met)
        if not any(rank.requests for rank in ranks.values()):
            return num_arrived
        if not met and not num_moved:
            raise Stuck({number: rank.open for number, rank in ranks.items()})


def batches(count: int) -> list[PackedBatch]:
    draw = np.random.default_rng(0)
    return [
        pack([Example(tokens=draw.integers(0, 100, NUM_TOKENS), prompt_length=1)], multiple_of=1)
        for _ in range(count)
    ]


def size_of(num_layers: int) -> GPTSize:
    return GPTSize(
        num_layers=num_layers, hidden_size=32, num_heads=4, vocab_size=100, context_length=64
    )


def requests_of(layout: ParallelLayout, stage: int, *, num_batches: int) -> tuple[int, list]:
    """A stage's global rank and what it asks for, in a pass with gradients and one without."""
    asked: list[Message | list[Message]] = []
    places: dict[int, str] = {}

    class Work:
        def __init__(self, message: Message) -> None:
            self.message = message

        def wait(self) -> None:
            asked.append([self.message])

    def ask(side: Literal["send", "recv"], tensor: Tensor, peer: int, group: Any) -> Work:
        name = "world" if group is dist.group.WORLD else "pipeline"
        pair = (name, frozenset((peer, dist.get_rank())))
        message = Message(side=side, peer=peer, pair=pair, place=places[id(tensor)])
        asked.append(message)
        return Work(message)

    def note_places(**named: Any) -> Any:
        tensors = {k.removeprefix("tensor_"): v for k, v in named.items() if k.startswith("tensor")}
        places.update({id(tensor): place for place, tensor in tensors.items()})
        return start(**named)

    start = p2p_communication._p2p_ops
    size = size_of(layout.pp * layout.virtual_pp)
    with (
        pytest.MonkeyPatch.context() as patch,
        pretended_rank(layout, world_size=2 * layout.pp, tp_rank=0, pp_rank=stage) as parallel,
    ):
        patch.setattr(p2p_communication, "_p2p_ops", note_places)
        patch.setattr(dist, "isend", lambda tensor, dst, group: ask("send", tensor, dst, group))
        patch.setattr(dist, "irecv", lambda tensor, src, group: ask("recv", tensor, src, group))
        network = build_network("scalar", size, parallel, numerics=Numerics())
        make_trainable(network)
        rows = [batch.to(parallel.device) for batch in batches(num_batches)]
        forward_backward(network, rows, lambda _, readings: (readings.sum(), {}))
        forward(network, rows)
        return parallel.rank, asked


@pytest.mark.parametrize("groups_of_batches", [1, 2])
@pytest.mark.parametrize(("pp", "virtual_pp"), [(2, 1), (2, 2), (2, 4), (3, 1), (3, 2), (4, 2)])
def test_messages_arrive_by_the_rules_of_nccl(pp: int, virtual_pp: int, groups_of_batches: int):
    end_parallel()
    layout = ParallelLayout(pp=pp, virtual_pp=virtual_pp)
    num_batches = groups_of_batches * pp
    requests = dict(requests_of(layout, n, num_batches=num_batches) for n in range(pp))
    hops = pp * virtual_pp - 1
    assert play(requests) == num_batches * hops * (2 + 1)  # there, back, and there without gradient


def requests_by_hand(*orders: str) -> dict[int, list]:
    """Two ranks that ask for messages on one communicator, and then wait for them all."""
    requests = {}
    for rank, order in enumerate(orders):
        messages = [
            Message(side=place[:4], peer=1 - rank, pair=("world", frozenset((0, 1))), place=place)
            for place in order.split()
        ]
        requests[rank] = [*messages, messages]
    return requests


def test_the_rules_let_pass_what_is_in_order():
    assert play(requests_by_hand("send_next recv_next", "recv_prev send_prev")) == 2


@pytest.mark.parametrize(
    "orders",
    [
        ("send_next recv_next", "send_prev recv_prev"),  # each waits for the other to receive
        ("send_prev send_next", "recv_prev recv_next"),  # the two change places
        ("send_next send_prev", "recv_prev"),  # one is never asked for
    ],
)
def test_the_rules_find_what_is_not(orders: tuple[str, str]):
    with pytest.raises(Stuck):
        play(requests_by_hand(*orders))


def set_weights(network: Network) -> None:
    """Draw each weight from its layer's number and its name, the same in every layout."""
    for name, parameter in named_weights(network):
        draw = torch.Generator().manual_seed(zlib.crc32(name.encode()))
        noise = 0.15 * torch.randn(parameter.shape, generator=draw)
        is_scale = "layernorm.weight" in name
        parameter.data.copy_(1.0 + noise if is_scale else noise)


def named_weights(network: Network) -> Iterator[tuple[str, Any]]:
    """Yield this rank's weights by a name that says which layer of the model they are of."""
    for module in network.modules:
        for name, parameter in module.named_parameters():
            parts = name.split(".")
            if "layers" in parts:
                local = int(parts[parts.index("layers") + 1])
                number = module.decoder.layers[local].layer_number
                yield f"{number}." + ".".join(parts[parts.index("layers") + 2 :]), parameter
            else:
                yield (EMBEDDING if name.startswith("output_layer") else name), parameter


Reading = tuple[list[Tensor], dict[str, Tensor]]
"""(log-probs of a replica's batches, a rank's own share of the gradients by name)."""


def readings_of(layouts: list[ParallelLayout], num_layers: int) -> list[Reading]:
    """Return what this rank finds in each layout; a gradient is the sum of all ranks' shares."""
    found = []
    for layout in layouts:
        parallel = start_parallel(layout, seed=1)
        rows = batches(NUM_BATCHES)[parallel.dp_rank :: parallel.dp]
        network = build_network("language", size_of(num_layers), parallel, numerics=Numerics())
        set_weights(network)
        logprobs = forward(network, rows)
        make_trainable(network)
        forward_backward(network, rows, NegativeLogLikelihood(NUM_BATCHES * (NUM_TOKENS - 1)))
        shares = {name: weight.main_grad.clone() for name, weight in named_weights(network)}
        found.append((logprobs, shares))
    return found


def readings_as_on_a_gpu(layouts: list[ParallelLayout], num_layers: int) -> list[Reading]:
    with choices_of_a_gpu():
        return readings_of(layouts, num_layers)


@pytest.mark.parametrize(
    ("world_size", "degrees"),
    [
        (2, [(2, 2), (2, 4)]),
        pytest.param(3, [(3, 1), (3, 2)], marks=pytest.mark.slow),
        pytest.param(4, [(4, 1), (4, 2), (2, 4)], marks=pytest.mark.slow),
    ],
)
def test_stages_that_choose_as_gpus_add_up_to_the_gradient_of_one_rank(
    world_size: int, degrees: list[tuple[int, int]]
):
    num_layers = max(pp * virtual_pp for pp, virtual_pp in degrees)
    layouts = [
        ParallelLayout(pp=pp, virtual_pp=virtual_pp, overlap_grad_reduce=False)
        for pp, virtual_pp in degrees
    ]
    ((logprobs, gradients),) = readings_of([ParallelLayout()], num_layers)
    ranks = run_ranks(readings_as_on_a_gpu, world_size, layouts, num_layers)
    for layout, readings in zip(layouts, zip(*ranks, strict=True), strict=True):
        dp = layout.dp(world_size)
        sums: dict[str, Tensor] = defaultdict(lambda: torch.zeros(()))
        for rank, (ours, shares) in enumerate(readings):  # megatron deals ranks to dp before pp
            for read, expected in zip(ours, logprobs[rank % dp :: dp], strict=True):
                torch.testing.assert_close(read, expected, rtol=1e-4, atol=1e-5)
            for name, share in shares.items():
                sums[name] = sums[name] + share
        assert sums.keys() == gradients.keys()
        for name, gradient in gradients.items():
            assert (sums[name] - gradient).norm() < 1e-5 * gradient.norm() + 1e-9, (layout, name)
