"""Embeddings of another width than the layers': projections that every tensor-parallel rank holds,
with the gradients of one rank, and bits that survive every layout."""

import dataclasses
from pathlib import Path

import pytest
import torch
from megatron.core.models.common.embeddings.language_model_embedding import LanguageModelEmbedding
from torch import Tensor

from engine.checkpoints.checkpointer import Checkpointer
from engine.checkpoints.weights import load_weights
from engine.data.batches import pack
from engine.data.examples import Example
from engine.losses import NegativeLogLikelihood
from engine.ranks.start import start_parallel
from engine.residency.refit import Refit
from engine.settings.layout import ParallelLayout
from engine.settings.numerics import Numerics
from engine.settings.saving import SaveConfig
from engine.training.network import Network, build_network
from engine.training.passes import finish_gradients, forward_backward
from engine.training.trainable import make_trainable
from models.embedding import ProjectedEmbedding
from models.paged_forward import paged_embedding
from models.sizes import Kind
from tests.forms import FORMS
from tests.ranks import run_ranks
from tests.tiny import SIZE, random_network, weights_of

PROJECTED = ("opt-350m", "wide embedding")
ONE, TP2, PP2 = ParallelLayout(), ParallelLayout(tp=2), ParallelLayout(pp=2)
SEQUENCE = ParallelLayout(tp=2, sequence_parallel=True)
LENGTHS = (24, 8)


def saved(network: Network, folder: Path) -> None:
    Checkpointer(
        directory=folder / "checkpoints",
        parallel=network.parallel,
        saving=SaveConfig(save_in_background=False),
        networks={"policy": network},
        optimizers={},
    ).save(0, {})


def loaded(name: str, layout: ParallelLayout, run: Path) -> Network:
    parallel = start_parallel(layout, seed=5)
    network = build_network("language", FORMS[name], parallel, numerics=Numerics())
    load_weights(network, run, role="policy")
    return network


def gradients(network: Network) -> dict[str, Tensor]:
    """Of what every tensor-parallel rank holds whole and is no layer's."""
    make_trainable(network)
    tokens = torch.arange(sum(LENGTHS)) * 7 % 90
    examples = [
        Example(tokens=part.numpy(), prompt_length=1) for part in tokens.split(list(LENGTHS))
    ]
    batch = pack(examples, multiple_of=1)
    forward_backward(network, [batch], NegativeLogLikelihood(sum(LENGTHS) - len(LENGTHS)))
    finish_gradients(network)
    return {
        name: parameter.main_grad.clone()
        for module in network.modules
        for name, parameter in module.named_parameters()
        if "layers" not in name and not getattr(parameter, "tensor_model_parallel", False)
    }


@pytest.mark.parametrize("kind", ["language", "scalar"])
def test_a_projection_lies_at_each_end_and_is_drawn_as_a_layers_matrix(kind: Kind):
    size = dataclasses.replace(SIZE, hidden_size=512, embedding_width=256)
    (chunk,) = build_network(kind, size, start_parallel(ONE, seed=1), numerics=Numerics()).modules
    assert chunk.embedding.word_embeddings.weight.shape == (128, 256)
    assert chunk.embedding.position_embeddings.weight.shape == (64, 512)
    for weight, shape in (
        (chunk.embedding.project_in.weight, (512, 256)),
        (chunk.project_out.weight, (256, 512)),
    ):
        assert weight.shape == shape
        assert weight.std().item() == pytest.approx(0.02, rel=0.02)


def test_an_embedding_of_the_layers_width_is_megatrons():
    (chunk,) = random_network("language", start_parallel(ONE, seed=1)).modules
    assert type(chunk.embedding) is LanguageModelEmbedding
    assert not any("project" in name for name, _ in chunk.named_parameters())


def all_gradients(folder: Path) -> dict[tuple[str, str], dict[str, Tensor]]:
    found = {}
    for name in PROJECTED:
        for kind, layout in (("tp2", TP2), ("sequence", SEQUENCE), ("pp2", PP2)):
            network = loaded(name, layout, folder / name)
            found[name, kind] = gradients(network)
    return found


def test_projections_have_the_whole_gradient_on_every_rank(tmp_path: Path):
    parallel, expected = start_parallel(ONE, seed=0), {}
    for name in PROJECTED:
        network = random_network("language", parallel, size=FORMS[name])
        saved(network, tmp_path / name)
        expected[name] = gradients(network)
    first, second = run_ranks(all_gradients, 2, tmp_path)
    for (name, layout), found in first.items():
        others = second[name, layout]
        if layout == "pp2":  # the first stage projects in, the last one out
            assert "embedding.project_in.weight" in found and "project_out.weight" in others
            found, others = found | others, found | others
        for held in (found, others):
            assert {"embedding.project_in.weight", "project_out.weight"} <= held.keys()
            for parameter, gradient in held.items():
                if parameter != "output_layer.weight":  # the copy of a tied embedding
                    wanted = expected[name][parameter]
                    assert wanted.norm() > 1e-2
                    torch.testing.assert_close(gradient, wanted, atol=2e-6, rtol=1e-4)


def go_through_layouts(folder: Path) -> None:
    """Load into one layout after another, each from what the one before has saved."""
    for name in PROJECTED:
        source = folder / name
        for number, layout in enumerate((TP2, PP2, SEQUENCE)):
            network = loaded(name, layout, source)
            source = folder / f"{name} {number}"
            saved(network, source)
        pipeline = loaded(name, PP2, source)
        refit = Refit(pipeline, TP2, numerics=Numerics())
        refit()
        saved(refit.network, folder / f"{name} refitted")


def test_bits_survive_every_layout_and_a_copy_in_another(tmp_path: Path):
    parallel = start_parallel(ONE, seed=0)
    for name in PROJECTED:
        saved(random_network("language", parallel, size=FORMS[name]), tmp_path / name)
    run_ranks(go_through_layouts, 2, tmp_path)
    for name in PROJECTED:
        wanted = weights_of(tmp_path / name, "policy")
        for last in ("2", "refitted"):
            found = weights_of(tmp_path / f"{name} {last}", "policy")
            assert found.keys() == wanted.keys()
            assert all(torch.equal(found[key], wanted[key]) for key in wanted)


def embedded(folder: Path) -> list[tuple[Tensor, Tensor]]:
    """(generation's, training's) hidden states before the layers, by form, without sequence
    parallelism and with it."""
    found = []
    for name in PROJECTED:
        for layout in (TP2, SEQUENCE):
            (chunk,) = loaded(name, layout, folder / name).modules
            embedding, group = chunk.embedding, chunk.pg_collection.tp
            assert isinstance(embedding, ProjectedEmbedding)
            tokens, positions = torch.arange(64) + 20, torch.arange(64)
            with torch.no_grad():
                mine = paged_embedding(embedding, tokens, positions, group)
                trained = embedding(tokens[None], positions[None])
            if layout.sequence_parallel:
                assert len(trained) == 32
                mine = mine.chunk(2)[group.rank()]
            found.append((mine, trained))
    return found


def test_generation_embeds_as_training_does(tmp_path: Path):
    parallel = start_parallel(ONE, seed=0)
    for name in PROJECTED:
        saved(random_network("language", parallel, size=FORMS[name]), tmp_path / name)
    for rank in run_ranks(embedded, 2, tmp_path):
        for mine, trained in rank:
            torch.testing.assert_close(mine, trained, atol=1e-6, rtol=0)
