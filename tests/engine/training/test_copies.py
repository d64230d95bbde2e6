"""A weight that one rank alone has is named with its rank, before a step and before a save."""

import dataclasses
from pathlib import Path

import pytest
import torch

from engine.errors import UserError
from engine.ranks.start import start_parallel
from engine.settings.layout import ParallelLayout
from engine.settings.numerics import Numerics
from engine.settings.saving import SaveConfig
from engine.training.copies import check_copies
from engine.training.network import Network
from engine.training.optimizer import Optimizer, StepResult
from models.sizes import Kind
from tests.engine.planted_spikes import spiky_config
from tests.ranks import run_ranks
from tests.tiny import random_network, rows_of, train

MATRIX = "decoder.layers.1.mlp.linear_fc1.weight"  # of which tensor-parallel ranks have parts
COMPARE = Numerics(compare_every=1)


def flip_bit(network: Network, name: str, element: int = 0) -> None:
    weight = network.modules[0].get_parameter(name).detach()
    weight.view(-1).view(torch.int32)[element] ^= 1


def found(layout: ParallelLayout, kind: Kind, flips: dict[int, list[str]]) -> str:
    """Flip the lowest bit of weights on ranks; return what is said then."""
    parallel = start_parallel(layout, seed=0)
    network = random_network(kind, parallel)
    if layout.tp * layout.pp > 1:  # drawn alike on all, and their own parts are another matter
        for module in network.modules:
            for weight in module.parameters():
                weight.data.fill_(0.5)
    check_copies(network, "step 3", "policy")  # nothing is wrong yet
    for name in flips.get(parallel.rank, []):
        flip_bit(network, name)
    try:
        check_copies(network, "step 4", "policy")
    except UserError as error:
        return str(error)
    return ""


def test_most_of_three_replicas_or_more_are_believed():
    said = run_ranks(found, 3, ParallelLayout(), "language", {1: [MATRIX]})
    assert said[0] == said[1] == said[2]
    for words in ("step 4:", "of the policy", "rank 1 (node ", "device cpu", MATRIX):
        assert words in said[0]
    assert "rank 0 (" not in said[0] and "rank 2 (" not in said[0]


def test_of_two_that_differ_both_are_named():
    ours, theirs = run_ranks(found, 2, ParallelLayout(), "scalar", {0: [MATRIX]})
    assert ours == theirs
    assert "rank 0 (" in ours and "rank 1 (" in ours and MATRIX in ours


def test_context_parallel_ranks_are_replicas_too():
    (said, _) = run_ranks(found, 2, ParallelLayout(cp=2), "language", {1: [MATRIX]})
    assert MATRIX in said


def test_tensor_parallel_ranks_share_norms_and_have_matrices_of_their_own():
    norm = "decoder.final_layernorm.weight"
    (said, _) = run_ranks(found, 2, ParallelLayout(tp=2), "language", {1: [norm, MATRIX]})
    assert norm in said and MATRIX not in said
    (said, _) = run_ranks(found, 2, ParallelLayout(tp=2), "language", {1: [MATRIX]})
    assert said == ""


def test_embedding_at_both_ends_of_a_pipeline_is_the_same():
    name = "embedding.word_embeddings.weight"
    ours, theirs = run_ranks(found, 2, ParallelLayout(pp=2), "language", {0: [name]})
    assert ours == theirs and name in ours and "output_layer.weight" in ours
    (said, _) = run_ranks(found, 2, ParallelLayout(pp=2), "language", {0: [MATRIX]})
    assert said == ""  # a stage has it alone


def test_one_rank_has_nothing_to_compare():
    assert found(ParallelLayout(), "language", {0: [MATRIX]}) == ""


def flipped_run(files: Path, folder: Path, saving: SaveConfig, numerics: Numerics) -> str:
    """Train with a weight of rank 1 flipped behind its fourth step; return what was said."""
    step = Optimizer.step

    def flipping(self: Optimizer, position: int, *arguments: object) -> StepResult:
        result = step(self, position, *arguments)  # type: ignore[arg-type]
        if position == 3 and self.network.parallel.rank == 1:
            flip_bit(self.network, "embedding.word_embeddings.weight")  # in rank 0's shard
        return result

    config = spiky_config("sft", files, folder, saving=saving, numerics=numerics)
    with pytest.MonkeyPatch.context() as patch:
        patch.setattr(Optimizer, "step", flipping)
        try:
            train(config)
        except UserError as error:
            return str(error)
    return ""


@pytest.mark.parametrize(
    ("saving", "where"),
    [
        (SaveConfig(save_every=3), "step 4:"),
        (SaveConfig(save_every=1), "before the checkpoint of step 4:"),
    ],
)
def test_run_ends_before_a_flipped_weight_is_used_or_saved(
    saving: SaveConfig, where: str, tiny: Path, tmp_path: Path
):
    ours, theirs = run_ranks(flipped_run, 2, tiny, tmp_path, saving, COMPARE)
    assert ours == theirs and where in ours and "rank 1 (node " in ours
    assert (tmp_path / "checkpoints/latest").read_text() == "step_00000003"


def test_that_is_silent_where_nothing_is_compared(tiny: Path, tmp_path: Path):
    assert run_ranks(flipped_run, 2, tiny, tmp_path, SaveConfig(), Numerics()) == ["", ""]


def test_sound_run_compares_and_goes_on(tiny: Path, tmp_path: Path):
    for name, numerics in (("compared", COMPARE), ("not", Numerics())):
        config = spiky_config("sft", tiny, tmp_path / name, numerics=numerics)
        run_ranks(train, 2, dataclasses.replace(config, layout=ParallelLayout()))
    assert rows_of(tmp_path / "compared") == rows_of(tmp_path / "not")
