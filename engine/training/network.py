"""A model on this rank: its pipeline chunks, built for a role, frozen or trainable."""

import contextlib
from collections.abc import Iterator
from contextlib import AbstractContextManager
from dataclasses import dataclass, field
from typing import Any, Literal, Protocol

import torch

from engine.ranks.device import DTYPES, choices_for, make_deterministic
from engine.ranks.parallel import Parallel
from engine.ranks.seeds import seed_for_head, seed_for_initialisation
from engine.settings.numerics import Numerics
from models.attention import attention_backend
from models.gpt import GPT
from models.layers import transformer_config
from models.scalar_gpt import ScalarGPT
from models.sizes import GPTSize

Kind = Literal["language", "scalar"]


class Place(Protocol):
    """Device memory that a network's weights come into to be read (engine/residency/seat.py)."""

    def holds(self, network: "Network") -> bool:
        """Whether the network's weights are there, ready to be read."""

    def present(self, network: "Network") -> AbstractContextManager[None]:
        """Run a block with the network's weights there."""


@dataclass(kw_only=True)
class Network:
    """One model's share on this rank."""

    kind: Kind
    size: GPTSize
    parallel: Parallel
    config: Any  # megatron's TransformerConfig
    modules: list[Any]  # the bare pipeline chunks, one per virtual stage
    chunks: list[Any]  # what the schedules call: modules, or their data-parallel wrappers
    weights_version: int = 0
    """Counts the changes of the weights: what was made from older ones is known as stale."""
    source: "Network | None" = None
    """The network in another layout that this one copies (engine/residency/refit.py)."""
    place: Place | None = None
    """Where the weights come and go; none: they stay."""
    decoding: Any = field(default=None, repr=False, compare=False)
    """What generation keeps between rollouts (engine/generation/decoding.py)."""

    @property
    def dtype(self) -> torch.dtype:
        """The dtype of the weights; a scalar network's head is fp32 whatever it is."""
        return self.config.params_dtype

    @property
    def attention(self) -> str:
        """A line that says what computes attention."""
        return f"attention: {attention_backend(self.parallel.device, self.dtype)}"

    def check_fresh(self) -> None:
        """Raise RuntimeError when the network is a copy of one whose weights have changed since."""
        if self.source is not None and self.source.weights_version != self.weights_version:
            raise RuntimeError(
                f"stale weights: this copy is of version {self.weights_version}, its source at "
                f"{self.source.weights_version}; refit before generating"
            )

    def check_present(self) -> None:
        """Raise RuntimeError when other weights than this network's, or none, are in its memory."""
        if self.place is not None and not self.place.holds(self):
            raise RuntimeError(
                f"absent weights: this {self.kind} network was swapped out; read it inside "
                "network.present(), train it inside residency.update()"
            )

    @contextlib.contextmanager
    def present(self) -> Iterator[None]:
        """Run a block with the weights on the device, wherever they rest."""
        with self.place.present(self) if self.place else contextlib.nullcontext():
            yield

    def settle(self) -> None:
        """Wait for the weights that data-parallel ranks still gather, after a step with
        overlap_param_gather.

        A pass through the chunks waits by itself, layer by layer. Whatever else reads or moves
        weights calls this first, on all data-parallel ranks. RuntimeError where they are absent.
        """
        self.check_present()
        for chunk in self.chunks:
            if getattr(chunk, "use_forward_hook", False):
                for group in chunk.bucket_groups:
                    group.finish_param_sync(skip_next_bucket_dispatch=True)

    def train(self, mode: bool = True) -> None:
        """Switch dropout on or off in every chunk."""
        for chunk in self.chunks:
            chunk.train(mode)


def build_network(
    kind: Kind,
    size: GPTSize,
    parallel: Parallel,
    *,
    numerics: Numerics,
    dropout: float = 0.0,
) -> Network:
    """Return a freshly initialised network: "language" (policy, reference) or "scalar" (critic,
    reward model).

    It is frozen and without dropout until an Optimizer takes it over. Raises UserError where the
    layout cannot hold the size.
    """
    layout = parallel.layout
    layout.check(size)
    if numerics.deterministic:
        make_deterministic()
    choices = choices_for(parallel.device)
    fuses_gradients = numerics.gradient_accumulation_fusion
    if fuses_gradients is None:
        fuses_gradients = choices.fuses_gradient_accumulation
    config = transformer_config(
        size,
        tp=layout.tp,
        pp=layout.pp,
        virtual_pp=layout.virtual_pp,
        sequence_parallel=layout.sequence_parallel,
        dtype=DTYPES[numerics.dtype],
        dropout=dropout,
        recompute=numerics.recompute,
        fuses_elementwise=choices.fuses_elementwise,
        fuses_gradient_accumulation=fuses_gradients,
        deterministic=numerics.deterministic,
    )
    seed_for_initialisation(parallel)
    with parallel.active():
        modules = [_build_chunk(kind, size, parallel, config, n) for n in range(layout.virtual_pp)]
    network = Network(
        kind=kind, size=size, parallel=parallel, config=config, modules=modules, chunks=modules
    )
    network.train(False)
    return network


def _build_chunk(
    kind: Kind, size: GPTSize, parallel: Parallel, config: Any, stage: int
) -> GPT | ScalarGPT:
    """Return the frozen chunk of a virtual stage on this rank."""
    virtual_pp = parallel.layout.virtual_pp
    model_class = GPT if kind == "language" else ScalarGPT
    module: GPT | ScalarGPT = model_class(
        config,
        size,
        pre_process=parallel.is_first_stage and stage == 0,
        post_process=parallel.is_last_stage and stage == virtual_pp - 1,
        vp_stage=stage if virtual_pp > 1 else None,
    )
    module.to(device=parallel.device, dtype=config.params_dtype)
    if isinstance(module, ScalarGPT) and module.post_process:
        module.scalar_head.float()
        seed_for_head(parallel)
        module.scalar_head.initialise()
    module.requires_grad_(False)
    return module
