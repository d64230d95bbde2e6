import os
from dataclasses import replace
from typing import Any

import pytest
import torch.distributed as dist
from megatron.core import parallel_state
from torch.testing._internal.distributed.fake_pg import FakeStore

from engine.planning.parameters import (
    PipelineStage,
    buffer_elements,
    largest_parameter,
    network_parameters,
    optimizer_bytes,
)
from engine.ranks.groups import forget_groups
from engine.ranks.start import start_parallel
from engine.settings.adam import AdamConfig
from engine.settings.layout import ParallelLayout
from engine.settings.numerics import Numerics
from engine.training.network import build_network
from engine.training.optimizer import Optimizer
from models.sizes import SIZES, GPTSize
from tests.forms import FORMS
from tests.ranks import run_ranks

# Sizes that divide by nothing convenient, so that every padding shows.
SIZE = GPTSize(num_layers=4, hidden_size=36, num_heads=6, vocab_size=100, context_length=50)
LAYOUTS = [
    ParallelLayout(),
    ParallelLayout(tp=2, sequence_parallel=True, overlap_grad_reduce=True),
    ParallelLayout(pp=2),
    ParallelLayout(tp=2, pp=2, virtual_pp=2, overlap_grad_reduce=True),
    ParallelLayout(pp=4),
    ParallelLayout(cp=2, overlap_grad_reduce=True),
    ParallelLayout(tp=2, pp=2, cp=2),
]
BUCKET = 5000  # elements, so that the first chunk has several where their reduction overlaps


def stage_of(layout: ParallelLayout, pp_rank: int = 0, **changes: Any) -> PipelineStage:
    """A stage of 175B, or of what the changes name."""
    stage = PipelineStage(kind="language", size=SIZES["175b"], layout=layout, pp_rank=pp_rank)
    return replace(stage, **changes)


def build_and_count(stage: PipelineStage) -> list[int]:
    """Return (parameters, buffer elements, optimizer bytes) of the real thing, the bytes of the
    replica's rank that holds most; a rank at a time, over collectives that do nothing."""
    layout, num_replicas = stage.layout, stage.num_replicas
    world = layout.tp * layout.pp * num_replicas
    optimizer_bytes_by_rank = []
    for replica_rank in range(num_replicas):
        rank = (stage.pp_rank * num_replicas + replica_rank) * layout.tp
        os.environ.update(RANK=str(rank), WORLD_SIZE=str(world))
        parallel_state.destroy_model_parallel()
        forget_groups()
        dist.destroy_process_group()
        dist.init_process_group("fake", store=FakeStore(), rank=rank, world_size=world)
        place = start_parallel(layout, seed=0)
        assert (place.pp_rank, place.replica_rank) == (stage.pp_rank, replica_rank)
        network = build_network(stage.kind, stage.size, place, numerics=Numerics(dtype=stage.dtype))
        num_parameters = sum(p.numel() for module in network.modules for p in module.parameters())
        optimizer = Optimizer(network, AdamConfig(), total_steps=1)
        optimizer.prepare_state()
        masters = [master for _, _, master in optimizer.owned_masters()]
        moments = [
            state[name]
            for distributed in optimizer._distributed()
            for state in distributed.optimizer.state.values()
            for name in ("exp_avg", "exp_avg_sq")
        ]
        optimizer_bytes_by_rank.append(sum(t.numel() * t.itemsize for t in masters + moments))
    buffers = sum(buffer.numel for chunk in network.chunks for buffer in chunk.buffers)
    return [num_parameters, buffers, max(optimizer_bytes_by_rank)]


def build_all(cases: list[PipelineStage]) -> list[list[int]]:
    return [build_and_count(case) for case in cases]


@pytest.mark.slow
def test_parameters_and_optimizer_state_are_those_of_the_real_network():
    cases = [
        # Without a choice reductions overlap on GPUs alone, and a plan is for those.
        stage_of(
            replace(
                layout,
                overlap_grad_reduce=bool(layout.overlap_grad_reduce),
                bucket_elements=BUCKET,
            ),
            pp_rank,
            kind=kind,
            size=size,
            dp=3,
            dtype=dtype,
        )
        for size, kind, layouts, dtype in (
            (SIZE, "language", LAYOUTS, "bf16"),
            (SIZE, "scalar", LAYOUTS[1:4] + LAYOUTS[-1:], "bf16"),
            (SIZE, "scalar", LAYOUTS[1:4], "fp32"),
            *((form, "language", LAYOUTS[:4], "bf16") for form in FORMS.values()),
            *((form, "scalar", LAYOUTS[3:4], "bf16") for form in FORMS.values()),
        )
        for layout in layouts
        for pp_rank in {0, layout.pp // 2, layout.pp - 1}
    ]
    (found,) = run_ranks(build_all, 1, cases)
    for stage, real in zip(cases, found, strict=True):
        planned = [network_parameters(stage), buffer_elements(stage), optimizer_bytes(stage)]
        assert planned == real, stage


def test_one_rank_holds_the_parameters_of_the_size_and_the_padding_of_its_vocabulary():
    size = SIZES["175b"]
    padding = (size.padded_vocab_size - size.vocab_size) * size.hidden_size
    counted = network_parameters(stage_of(ParallelLayout()))
    assert counted == size.num_parameters + padding
    # The scalar network has a head of hidden + 1 besides.
    scalar = network_parameters(stage_of(ParallelLayout(), kind="scalar"))
    assert scalar == counted + size.hidden_size + 1


def test_stages_of_175b_hold_what_megatron_was_seen_to_build():
    layout = ParallelLayout(tp=8, pp=16)
    held = [network_parameters(stage_of(layout, pp_rank)) for pp_rank in (0, 15)]
    assert [round(n / 1e9, 3) for n in held] == [1.462, 1.437]


def test_largest_parameter_is_the_embedding_or_a_matrix_of_the_mlp():
    layout, size = ParallelLayout(tp=8, pp=16), SIZES["175b"]
    largest = [largest_parameter(stage_of(layout, pp_rank)) for pp_rank in (0, 3)]
    assert largest == [size.padded_vocab_size // 8 * 12288, 4 * 12288 // 8 * 12288]


def test_optimizer_state_is_split_over_data_parallel_ranks():
    layout = ParallelLayout(tp=8, pp=16)
    whole = optimizer_bytes(stage_of(layout, 3))
    assert whole == 12 * network_parameters(stage_of(layout, 3))
    share = optimizer_bytes(stage_of(layout, 3, dp=8))
    assert whole / 8 <= share < whole / 8 * 1.0001


def test_small_buckets_pad_more():
    # Only where reductions overlap, and there on the first chunk of the first stage.
    layout = ParallelLayout(pp=2, overlap_grad_reduce=True)
    small = replace(layout, bucket_elements=BUCKET)
    waits = replace(small, overlap_grad_reduce=False)
    first, last = (
        [buffer_elements(stage_of(each, pp_rank, size=SIZE, dp=3)) for each in (layout, small)]
        for pp_rank in (0, 1)
    )
    assert first[0] < first[1]
    assert last[0] == last[1]
    assert buffer_elements(stage_of(waits, 0, size=SIZE, dp=3)) == first[0]
