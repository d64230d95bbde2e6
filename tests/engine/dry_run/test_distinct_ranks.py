"""What pretended ranks hold is what layout and planner say, and every planted fault is named."""

import dataclasses

import pytest
import torch

from engine.dry_run import distinct_ranks
from engine.dry_run.distinct_ranks import Model, Rank, build_ranks, check_checkpoint, check_rank
from engine.errors import UserError
from engine.ranks.start import end_parallel, pretended_rank, start_parallel
from engine.settings.adam import AdamConfig
from engine.settings.layout import ParallelLayout
from engine.settings.numerics import Numerics
from engine.training.network import build_network
from engine.training.optimizer import Optimizer
from models.sizes import GPTSize, Kind
from tests.forms import FORMS
from tests.tiny import SIZE

LAYOUT = ParallelLayout(tp=4, pp=2, sequence_parallel=True)
NUM_GPUS = 24


@pytest.fixture(autouse=True)
def alone():
    """Leave the world of one that other tests of this process may have joined."""
    end_parallel()


def model(
    kind: Kind = "language",
    layout: ParallelLayout = LAYOUT,
    dtype: str = "bf16",
    size: GPTSize = SIZE,
) -> Model:
    return Model(
        roles=("policy", "reference"),
        kind=kind,
        size=size,
        layout=layout,
        numerics=Numerics(dtype=dtype),
        adam=AdamConfig(),
    )


def ranks_of(one: Model) -> list[Rank]:
    return [rank for _, rank in build_ranks([one], NUM_GPUS)]


def changed(rank: Rank, tensor: str, **changes) -> Rank:
    """The rank with its shards of a tensor changed, or left out where no change is named."""
    shards = [
        dataclasses.replace(shard, **changes) if shard.name == tensor else shard
        for shard in rank.shards
        if changes or shard.name != tensor
    ]
    return dataclasses.replace(rank, shards=shards)


@pytest.mark.parametrize("kind", ["language", "scalar"])
@pytest.mark.parametrize(
    ("layout", "dtype"),
    [
        (ParallelLayout(), "fp32"),
        (LAYOUT, "bf16"),
        (ParallelLayout(tp=2, pp=2, virtual_pp=2), "fp16"),
        (ParallelLayout(pp=4), "bf16"),
        (ParallelLayout(tp=2, cp=4), "bf16"),
        (ParallelLayout(pp=2, cp=3), "fp32"),
    ],
)
def test_what_ranks_hold_is_what_layout_and_planner_say(kind, layout, dtype):
    one = model(kind, layout, dtype)
    ranks = ranks_of(one)
    assert len(ranks) == min(layout.tp, 2) * layout.pp
    for rank in ranks:
        check_rank(one, rank)
        assert sum(rank.num_owned) == rank.num_parameters
        assert len(rank.num_owned) == NUM_GPUS // (layout.tp * layout.pp)
    check_checkpoint(one, ranks)


@pytest.mark.parametrize("kind", ["language", "scalar"])
@pytest.mark.parametrize("name", FORMS)
def test_what_ranks_hold_of_a_form_is_what_the_planner_says(kind, name):
    one = model(kind, ParallelLayout(tp=2, pp=2, sequence_parallel=True), size=FORMS[name])
    ranks = ranks_of(one)
    for rank in ranks:
        check_rank(one, rank)
    check_checkpoint(one, ranks)


def test_buckets_of_many_replicas_are_as_large_as_megatrons():
    # Full at a million elements a data-parallel rank, of which cp ranks are none; full later, the
    # buckets would be fewer, and the padding of each another.
    size = dataclasses.replace(SIZE, hidden_size=2048, vocab_size=50_000)
    one = dataclasses.replace(model(layout=ParallelLayout(cp=2)), size=size)
    (rank,) = [rank for _, rank in build_ranks([one], 2 * 47)]
    check_rank(one, rank)


def test_ranks_that_share_rows_alone_reduce_gradients_in_buckets():
    size = dataclasses.replace(SIZE, hidden_size=36)  # that each bucket is padded
    layout = ParallelLayout(cp=2, bucket_elements=5000)
    one = dataclasses.replace(model(layout=layout), size=size)
    (rank,) = [rank for _, rank in build_ranks([one], 2)]
    check_rank(one, rank)


def test_pretended_ranks_have_the_place_that_was_asked_for():
    for tp_rank, pp_rank in ((0, 0), (3, 0), (1, 1)):
        with pretended_rank(
            LAYOUT, world_size=NUM_GPUS, tp_rank=tp_rank, pp_rank=pp_rank
        ) as parallel:
            assert (parallel.tp_rank, parallel.pp_rank, parallel.dp_rank) == (tp_rank, pp_rank, 0)
            assert (parallel.world_size, parallel.dp) == (NUM_GPUS, 3)
            network = build_network("scalar", SIZE, parallel, numerics=Numerics())
            assert {p.device.type for m in network.modules for p in m.parameters()} == {"meta"}
            adam = Optimizer(network, AdamConfig(), total_steps=1)
            masters = [master for _, _, master in adam.owned_masters()]
            assert sum(m.numel() for m in masters) == adam.num_owned_by_rank()[0]


def test_real_networks_are_built_as_before_afterwards():
    ranks_of(model(layout=ParallelLayout()))
    parallel = start_parallel(ParallelLayout(), seed=0)
    assert torch.zeros(1, device=parallel.device).item() == 0
    network = build_network("language", SIZE, parallel, numerics=Numerics())
    assert all(p.device == parallel.device for m in network.modules for p in m.parameters())
    with (
        pytest.raises(RuntimeError, match="real world"),
        pretended_rank(ParallelLayout(), world_size=1, tp_rank=0, pp_rank=0),
    ):
        pass


@pytest.mark.parametrize("function", ["network_parameters", "optimizer_bytes"])
def test_wrong_count_of_the_planner_is_found(monkeypatch, function):
    one = model()
    rank = ranks_of(one)[-1]
    right = getattr(distinct_ranks, function)
    monkeypatch.setattr(distinct_ranks, function, lambda *a, **k: right(*a, **k) + 1)
    with pytest.raises(UserError, match="policy and reference: pipeline stage 1, tp rank 3 holds"):
        check_rank(one, rank)


def test_wrong_shape_of_a_parameter_is_found():
    one = model()
    rank = ranks_of(one)[0]
    name = "decoder.layers.mlp.linear_fc1.weight"
    with pytest.raises(UserError, match=r"holds \(1, 64, 32\) of .*fc1.weight .*gives \(1, 32, 32"):
        check_rank(one, changed(rank, name, shape=(1, 64, 32)))
    with pytest.raises(UserError, match="unknown tensor other"):
        check_rank(one, changed(rank, name, name="other"))


@pytest.mark.parametrize(
    ("name", "changes", "message"),
    [
        ("decoder.final_layernorm.bias", {}, "write 0 of the 32 elements of decoder.final_layer"),
        ("embedding.word_embeddings.weight", {"is_written": False}, "write 0 of the 4096 elements"),
        ("decoder.layers.input_layernorm.bias", {"is_written": True}, "two ranks write decoder"),
        ("decoder.final_layernorm.bias", {"offset": (1,)}, "is not on its grid"),
    ],
)
def test_checkpoint_that_is_not_covered_once_is_found(name, changes, message):
    one = model()
    ranks = [changed(rank, name, **changes) for rank in ranks_of(one)]
    with pytest.raises(UserError, match=message):
        check_checkpoint(one, ranks)


def test_layer_that_no_stage_writes_is_found():
    one = model()
    first = [rank for rank in ranks_of(one) if rank.pp_rank == 0]
    again = [dataclasses.replace(rank, pp_rank=1) for rank in first]
    silent = [
        dataclasses.replace(
            rank, shards=[dataclasses.replace(s, is_written=False) for s in rank.shards]
        )
        for rank in again
    ]
    with pytest.raises(UserError, match="write 64 of the 128 elements of decoder.layers"):
        check_checkpoint(one, first + silent)
