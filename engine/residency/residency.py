"""Which weights and optimizer state are on the GPU in each phase of PPO, and the moves between.

    phase     on the GPU                                    elsewhere, where the settings say so
    rollout   policy, its copy in a generation layout if    reference, critic, reward model,
              there is one, key-value cache                 optimizer state
    score     policy, then reference in the same memory;    optimizer state
              critic, then reward model in the same memory
    update    policy and critic with gradients and          reference, reward model
              optimizer state

A phase is a block: `with residency.score(): ...`. Between update and the next rollout everything
that trains is on the GPU, for checkpoints.
"""

import contextlib
from collections.abc import Callable, Iterable, Iterator
from dataclasses import dataclass, field
from pathlib import Path
from typing import Literal

import torch
from torch import UntypedStorage

from engine.errors import UserError
from engine.ranks.connections import open_connections
from engine.residency.expected import PARTNERS, ModelBytes, expected_bytes
from engine.residency.host import Link, Parked, distinct_storages
from engine.residency.ledger import Ledger
from engine.residency.refit import Refit
from engine.residency.seat import Seat, weights_of
from engine.residency.sharded import ShardedWeights
from engine.settings.checks import option_of
from engine.settings.layout import ParallelLayout
from engine.settings.numerics import Numerics
from engine.settings.residency import ResidencyConfig
from engine.training.ema import EMA
from engine.training.network import Network
from engine.training.optimizer import Optimizer
from models.sizes import GPTSize

_TRAINED = ("policy", "critic")
FrozenRole = Literal["reference", "reward_model"]
Load = Callable[[Network | None], Network]
"""Loads a model's weights into the network it is given, or into one that it builds."""

_ADVICE = {
    "rollout": "lower --sampling.cache-fraction, --sampling.num-slots or --sampling.prefill-tokens",
    "score": "lower --micro-batch-tokens",
    "update": "lower --micro-batch-tokens, or recompute activations (--numerics.recompute full)",
}


def _no_state() -> list[UntypedStorage]:
    """Return where the state of a frozen model lies: it has none."""
    return []


@dataclass(kw_only=True, eq=False)
class _Model:
    """The model of one role, and where its parts rest."""

    network: Network
    expected: ModelBytes
    """What it takes on this rank."""
    seat: Seat | None = None
    """The memory that its weights come into and leave; none: they stay where they are."""
    find_state: Callable[[], list[UntypedStorage]] = _no_state
    """Returns where a trained model's optimizer state and averaged weights lie now."""
    state: list[UntypedStorage] = field(default_factory=list)
    """What find_state returned at the start of this phase."""
    parked: Parked | None = None
    """The state, where it waits on the host for updates."""

    def release_gradients(self) -> None:
        """Give up what only updates need: the memory of a trained model's gradients."""
        for chunk in self.network.chunks:
            chunk.offload_grad_buffers(synchronize=False, empty_cache=False)

    def restore_gradients(self) -> None:
        """Take their memory again."""
        for chunk in self.network.chunks:
            chunk.restore_grad_buffers(synchronize=False)

    def restore_weights(self) -> None:
        """Have the weights in their memory, to be read and changed."""
        if self.seat is not None:
            self.seat.restore()


class Residency:
    """Moves what trains, loads the frozen models, and keeps the ledger of both."""

    def __init__(
        self, config: ResidencyConfig, *, policy: Optimizer, critic: Optimizer, ema: EMA
    ) -> None:
        """Gives up the gradient buffers: until the first update they are room to load models in."""
        self._parallel = policy.network.parallel
        device = self._parallel.device
        self.config = config
        self.ledger = Ledger(device)
        self._link = Link(device, bucket_bytes=config.bucket_mib * 2**20)
        self._models: dict[str, _Model] = {}
        """By role; the policy's copy is "generation"."""
        self._refit: Refit | None = None
        self._is_connected = False
        for role, optimizer in zip(_TRAINED, (policy, critic), strict=True):
            self._take_over(role, optimizer, ema if ema.optimizer is optimizer else None)
        if config.critic == "host":
            self._seat("critic")
        self._release_gradients()

    def frozen(self, role: FrozenRole, size: GPTSize, load: Load) -> Network:
        """Load a frozen model of that size to where the settings want it; return its network.

        Called before the run's checkpoint is resumed. Of those that rest on the host, a model as
        large as its partner is loaded and read in the partner's memory; another has memory of its
        own for the time.
        """
        choice, partner = getattr(self.config, role), PARTNERS[role]
        entry = f"{role} weights"
        if choice == "host" and size == self._models[partner].network.size:
            seat = self._seat(partner)
            network = seat.admit(load)
            self._models[role] = _Model(network=network, expected=model_bytes(network))
            self.ledger.on_host[entry] = lambda: seat.host_bytes["guest"]
            return network
        network = load(None)
        self._models[role] = _Model(network=network, expected=model_bytes(network))
        if choice == "sharded":
            shards = ShardedWeights(network, self.ledger.observe)
            self.ledger.on_device[entry] = lambda: shards.num_bytes
            return network
        self.ledger.on_device[entry] = _count(distinct_storages(weights_of(network)))
        if choice == "host":
            own_seat = self._seat(role)
            own_seat.rests_on_host = True
            own_seat.vacate()
        return network

    def generate_in(self, layout: ParallelLayout, *, numerics: Numerics) -> None:
        """Have a copy of the policy generate, in another layout of the same ranks: it is made anew
        in every rollout, and has memory there only. Raises UserError for a layout that does not
        fit."""
        try:
            refit = Refit(self._models["policy"].network, layout, numerics=numerics)
        except UserError as error:
            raise UserError(f"generation_layout: {error}".replace("--layout.", "")) from None
        self._refit = refit
        self._models["generation"] = _Model(
            network=refit.network, expected=model_bytes(refit.network)
        )
        self.ledger.on_device["generation weights"] = lambda: refit.num_bytes

    @contextlib.contextmanager
    def rollout(self) -> Iterator[Network]:
        """Run phase 2 with the policy's weights on the device, and no more than the settings want
        besides; gives the network that generates, the policy or its copy, which is made anew."""
        with self._phase("rollout"):
            self._rest()
            self._models["policy"].restore_weights()
            if self.config.critic == "host":
                self._seat("critic").vacate()
            self._connect()
            self.ledger.begin("rollout")
            policy = self._models["policy"].network
            copied = contextlib.nullcontext(policy) if self._refit is None else self._refit.filled()
            with copied as network:
                self.ledger.observe()
                try:
                    yield network
                finally:
                    if network.decoding is not None:
                        self.ledger.outside_bytes = network.decoding.memory.last_bytes
        if self._parallel.device.type == "cuda":
            torch.cuda.empty_cache()  # NCCL's memory, and whoever else's, is not torch's

    @contextlib.contextmanager
    def score(self) -> Iterator[None]:
        """Run phase 3, in which every model's turn to be read comes once: `network.present()`.

        A swap of one pair runs while a network of the other pair is read; the last ends in
        phase 4.
        """
        with self._phase("score"):
            self._rest()
            self.ledger.begin("score")
            seats = [model.seat for model in self._trained() if model.seat is not None]
            for seat in seats:
                seat.awaits_guest = seat.guest is not None
                if seat.awaits_guest:
                    seat.begin_saving()
                seat.start(seat.owner)
            yield
            for seat in seats:
                seat.awaits_guest = False
                seat.start(seat.owner)

    @contextlib.contextmanager
    def update(self) -> Iterator[None]:
        """Run phase 5 with what trains on the device: weights, gradients, optimizer state. It stays
        there after the block."""
        with self._phase("update"):
            for model in self._trained():
                model.restore_weights()
                model.restore_gradients()
            for model in self._trained():  # arrives during the first forward and backward passes
                if model.parked is not None:
                    model.parked.fetch()
            self.ledger.begin("update")
            yield

    def record(self, folder: Path) -> dict[str, float]:
        """Return the bytes by role and phase of this iteration as metrics, and what the copy that
        generates has cost; the writing rank puts the bytes into folder/memory.txt."""
        if self._parallel.is_writer:
            self.ledger.write(folder / "memory.txt", rank=self._parallel.rank)
        values = self.ledger.metrics()
        if self._refit is not None and self._refit.report is not None:
            values["rollout/refit_seconds"] = self._refit.report.seconds
            values["rollout/refit_bytes"] = float(self._refit.report.received_bytes)
        return values

    @contextlib.contextmanager
    def _phase(self, name: str) -> Iterator[None]:
        """Run a block that begins the phase in the ledger; UserError where the device's memory does
        not suffice."""
        for model in self._models.values():
            model.state = model.find_state()
        if PARTNERS.keys() <= self._models.keys():  # the frozen models are there too
            expected = {role: model.expected for role, model in self._models.items()}
            self.ledger.expected = expected_bytes(self.config, expected)
        try:
            yield
        except torch.OutOfMemoryError as error:
            reason = str(error).split(". ")[0]
            self.ledger.end(name)
            raise UserError(
                f"out of GPU memory in phase {name}: {reason}\n"
                f"{self.ledger.table()}\n{_advice(self.config, name)}"
            ) from error
        self.ledger.end(name)

    def _connect(self) -> None:
        """Before the first rollout, open what the run's ranks will talk through."""
        if self._is_connected:
            return
        parallels = [model.network.parallel for model in self._trained()]
        if self._refit is not None:
            parallels.append(self._refit.network.parallel)
        open_connections(parallels)
        self._is_connected = True

    def _trained(self) -> list[_Model]:
        return [self._models[role] for role in _TRAINED]

    def _rest(self) -> None:
        """Give up what only updates need."""
        self._release_gradients()
        for model in self._trained():
            if model.parked is not None:
                model.parked.park()

    def _release_gradients(self) -> None:
        for model in self._trained():
            model.release_gradients()

    def _seat(self, role: str) -> Seat:
        """Return a role's seat, made when it is first asked for."""
        model = self._models[role]
        if model.seat is None:
            seat = model.seat = Seat(model.network, self._link, self.ledger.observe)
            self.ledger.on_host[f"{role} weights"] = lambda: seat.host_bytes["owner"]
        return model.seat

    def _take_over(self, role: str, optimizer: Optimizer, ema: EMA | None) -> None:
        """Enter a trained model's parts in the ledger, and arrange for its state to be parked."""
        network, ledger = optimizer.network, self.ledger
        expected = model_bytes(network, optimizer, ema)
        optimizer.prepare_state()  # what the run will need is taken at its start
        weights = distinct_storages(weights_of(network))
        gradients = distinct_storages(
            b.grad_data for chunk in network.chunks for b in chunk.buffers
        )
        known = {storage._cdata for storage in weights}  # in fp32 the masters are the weights

        def find_state() -> list[UntypedStorage]:
            shadows = [] if ema is None else ema.shadows
            found = distinct_storages([*optimizer.state_tensors(), *shadows])
            return [storage for storage in found if storage._cdata not in known]

        model = _Model(network=network, expected=expected, find_state=find_state)
        self._models[role] = model
        ledger.on_device[f"{role} weights"] = _count(weights)
        ledger.on_device[f"{role} gradients"] = _count(gradients)
        ledger.on_device[f"{role} optimizer"] = lambda: _num_bytes(model.state)
        if self.config.optimizer == "host":
            parked = model.parked = Parked(find_state, self._link)
            optimizer.await_state_by(parked.wait)
            ledger.on_host[f"{role} optimizer"] = lambda: parked.host_bytes


def model_bytes(
    network: Network, optimizer: Optimizer | None = None, ema: EMA | None = None
) -> ModelBytes:
    """Return what a model takes on this rank by the shapes of its parameters, without padding.

    Of an optimizer: fp32 gradients of all parameters; masters (where the weights are not fp32
    themselves), two moments and perhaps the average of this rank's share.
    """
    num_bytes = num_outside = num_in_layer = num_parameters = 0
    for module in network.modules:
        total = _size(module.parameters())  # a tied embedding counts once
        layers = [_size(layer.parameters()) for layer in module.decoder.layers]
        num_bytes += total
        num_outside = max(num_outside, total - sum(layers))
        num_in_layer = max(num_in_layer, *layers)
        num_parameters += sum(p.numel() for p in module.parameters())
    state = 0
    for parameter, _, master in optimizer.owned_masters() if optimizer is not None else ():
        num_copies = 2 + (parameter.dtype is not torch.float32) + (ema is not None)
        state += 4 * num_copies * master.numel()
    return ModelBytes(
        weights=num_bytes,
        gradients=4 * num_parameters if optimizer is not None else 0,
        optimizer=state,
        layer=num_in_layer,
        ends=num_outside,
        dp=network.parallel.dp,
    )


def _size(parameters: Iterable[torch.Tensor]) -> int:
    return sum(p.nbytes for p in parameters)


def _count(storages: list[UntypedStorage]) -> Callable[[], int]:
    return lambda: _num_bytes(storages)


def _num_bytes(storages: list[UntypedStorage]) -> int:
    return sum(storage.nbytes() for storage in storages)


def _advice(config: ResidencyConfig, phase: str) -> str:
    """Return what to change, the options of residency that are left first."""
    helping = {
        "rollout": ("optimizer", "reward_model", "reference", "critic"),
        "score": ("optimizer", "reward_model", "reference"),
        "update": ("reward_model", "reference"),
    }[phase]
    left = [name for name in helping if getattr(config, name) != "host"]
    advice = ", ".join(f"{option_of(f'residency.{name}')} host" for name in left)
    return f"set {advice}; or {_ADVICE[phase]}" if left else _ADVICE[phase]
