"""A model on this rank: its pipeline chunks, built for a role, frozen or trainable."""

import contextlib
import dataclasses
from collections.abc import Callable, Iterator
from contextlib import AbstractContextManager
from dataclasses import dataclass, field
from typing import Any, Protocol

import torch

from engine.ranks.device import DTYPES, choices_for, make_deterministic
from engine.ranks.parallel import Parallel
from engine.ranks.seeds import seed_for_head, seed_for_initialisation
from engine.settings.numerics import Numerics
from models.attention import attention_backend
from models.gpt import GPT
from models.layers import Arithmetic, Degrees, transformer_config
from models.scalar_gpt import ScalarGPT
from models.sizes import GPTSize, Kind


class WeightMemory(Protocol):
    """Device memory that a network's weights come into to be read (engine/residency/seat.py)."""

    def holds(self, network: "Network") -> bool:
        """Whether the network's weights are there, ready to be read."""

    def present(self, network: "Network") -> AbstractContextManager[None]:
        """Run a block with the network's weights there."""


_NEVER_FILLED = -1  # a version that no weights have


@dataclass(kw_only=True)
class Network:
    """One model's share on this rank.

    No other file assigns its fields. They change by these methods, which are called by:

    - become_trainable: engine/training/trainable.py, once, before the first pass with gradients.
    - scale_losses: engine/training/optimizer.py, once, as the optimizer is made.
    - mark_changed: whoever has changed the weights, at once. These are the optimizer, a checkpoint
      or model that was read, and the shift of a reward model's bias.
    - reducing: engine/training/passes.py, around each run through the pipeline.
    - holding_back: engine/training/recheck.py, around the passes of a step that is computed twice.
    - train, evaluating: whoever reads a network that trains; generation, while it samples.
    - move_into, guest: engine/residency/seat.py, before the first iteration.
    - become_copy, mark_copied, mark_emptied: the refit, as it makes, fills and releases the copy.
    - keep: engine/generation/decoding.py, at the first rollout.

    The memory of the weights is not a field. engine/residency frees it and fills it again. It
    hooks into the modules of networks whose weights it gathers layer by layer.
    """

    kind: Kind
    size: GPTSize
    parallel: Parallel
    config: Any  # megatron's TransformerConfig
    modules: list[Any]  # the bare pipeline chunks, one per virtual stage
    chunks: list[Any]  # what the schedules call: modules, or their data-parallel wrappers
    numerics: Numerics = field(default_factory=Numerics)
    """How its numbers are held, computed and checked."""
    weights_version: int = 0
    """Counts the changes of the weights: what was made from older ones is known as stale."""
    source: "Network | None" = None
    """The network in another layout that this one copies."""
    memory: WeightMemory | None = None
    """Where the weights come and go; none: they stay."""
    decoding: Any = field(default=None, repr=False, compare=False)
    """What generation keeps between rollouts (engine/generation/decoding.py)."""
    holds_back: bool = False
    """Whether backward passes leave the gradients to this rank: none starts their reduction."""

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
        if self.memory is not None and not self.memory.holds(self):
            raise RuntimeError(
                f"absent weights: this {self.kind} network was swapped out; read it inside "
                "network.present(), train it inside residency.update()"
            )

    @contextlib.contextmanager
    def present(self) -> Iterator[None]:
        """Run a block with the weights on the device, wherever they rest."""
        with self.memory.present(self) if self.memory else contextlib.nullcontext():
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

    @contextlib.contextmanager
    def evaluating(self) -> Iterator[None]:
        """Run a block without dropout, and put the mode back that was found."""
        was_training = self.chunks[0].training
        self.train(False)
        try:
            yield
        finally:
            self.train(was_training)

    def become_trainable(self, wrap: Callable[[int, Any], Any]) -> None:
        """Give the weights gradients and switch dropout on; the chunks are what `wrap` makes of
        (virtual stage, module)."""
        for module in self.modules:
            module.requires_grad_(True)
        self.chunks = [wrap(stage, module) for stage, module in enumerate(self.modules)]
        self.train(True)

    def scale_losses(self, scale: Callable[[torch.Tensor], torch.Tensor] | None) -> None:
        """Have backward passes begin with what `scale` makes of a loss (fp16); none: with the
        loss."""
        self.config.grad_scale_func = scale

    def mark_changed(self) -> None:
        """Count a change of the weights."""
        self.weights_version += 1

    @contextlib.contextmanager
    def reducing(self, *, starts: bool) -> Iterator[None]:
        """Run a block whose backward passes start the overlapped reduction of a bucket with its
        last micro-batch, or not at all."""
        with contextlib.ExitStack() as stack:
            if not any(self.overlapping_groups):
                pass
            elif starts and not self.holds_back:
                no_syncs = [chunk.no_sync for chunk in self.chunks]  # kept by all but the last
                self.config.no_sync_func = no_syncs if len(no_syncs) > 1 else no_syncs[0]
                stack.callback(setattr, self.config, "no_sync_func", None)
            else:
                for chunk in self.chunks:
                    stack.enter_context(chunk.no_sync())
            yield

    @contextlib.contextmanager
    def holding_back(self) -> Iterator[None]:
        """Run a block whose backward passes leave the gradients as this rank computed them; start
        the overlapped reduction at its end, unless that is an exception."""
        self.holds_back = True
        try:
            yield
        finally:
            self.holds_back = False
        for group in self.overlapping_groups:
            group.start_grad_sync()

    @property
    def overlapping_groups(self) -> list[Any]:
        """megatron's groups of buckets whose reduction overlaps with backward passes."""
        return [
            group
            for chunk in self.chunks
            for group in getattr(chunk, "bucket_groups", [])
            if group.ddp_config.overlap_grad_reduce
        ]

    def move_into(self, memory: WeightMemory) -> None:
        """Have the weights come and go as `memory` says."""
        self.memory = memory

    def guest(self) -> "Network":
        """Return a frozen network of the same modules, whose weights take turns with this one's."""
        return dataclasses.replace(self, chunks=self.modules, weights_version=0)

    def become_copy(self, source: "Network") -> None:
        """Be a copy of a network in another layout, not yet filled."""
        self.source = source
        self.mark_emptied()

    def mark_copied(self) -> None:
        """Say that the weights are those of the source."""
        assert self.source is not None
        self.weights_version = self.source.weights_version

    def mark_emptied(self) -> None:
        """Say that a copy's weights are gone: it is stale until the next mark_copied."""
        self.weights_version = _NEVER_FILLED

    def keep(self, decoding: Any) -> None:
        """Keep what generation wants to find again in the next rollout."""
        self.decoding = decoding


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
    degrees = Degrees(
        tp=layout.tp,
        pp=layout.pp,
        virtual_pp=layout.virtual_pp,
        sequence_parallel=layout.sequence_parallel,
    )
    arithmetic = Arithmetic(
        dtype=DTYPES[numerics.dtype],
        recompute=numerics.recompute,
        fuses_elementwise=choices.fuses_elementwise,
        fuses_gradient_accumulation=fuses_gradients,
        deterministic=numerics.deterministic,
    )
    config = transformer_config(size, degrees, arithmetic, dropout=dropout)
    seed_for_initialisation(parallel)
    with parallel.active():
        modules = [_build_chunk(kind, size, parallel, config, n) for n in range(layout.virtual_pp)]
    network = Network(
        kind=kind,
        size=size,
        parallel=parallel,
        config=config,
        modules=modules,
        chunks=modules,
        numerics=numerics,
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
