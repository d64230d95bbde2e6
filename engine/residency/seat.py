"""Device memory that the weights of one network at a time lie in: its owner's, or a guest's."""

import contextlib
from collections.abc import Callable, Iterator

from torch import Tensor

from engine.residency.host import HostCopy, Link, allocate, distinct_storages, release
from engine.training.network import Network


class Seat:
    """A trained network's memory, which a frozen one of the same size borrows to be read.

    Both keep a copy in host memory. A swap moves buckets: while the leaving network's are still on
    their way out, the arriving one's fill those that are through. The owner's copy is made again
    only when its weights have changed, and may be begun while they are still being read.
    """

    def __init__(self, owner: Network, link: Link, observe: Callable[[], None]) -> None:
        """observe: called whenever device or host memory was taken or is about to be given up."""
        self.owner = owner
        self.guest: Network | None = None
        self.awaits_guest = False
        """Whether the guest comes in as soon as the owner was read."""
        self.rests_on_host = False
        """Whether nobody stays after having been read."""
        self._link = link
        self._observe = observe
        self._storages = distinct_storages(weights_of(owner))
        self._sizes = [storage.nbytes() for storage in self._storages]
        self._copies: dict[int, HostCopy] = {}  # by id of the network
        self._versions: dict[int, int] = {}  # of the weights in the copies
        self._occupant: Network | None = owner
        self._is_ready = True
        owner.move_into(self)

    @property
    def host_bytes(self) -> dict[str, int]:
        """Host memory taken by "owner" and "guest"."""
        networks = {"owner": self.owner, "guest": self.guest}
        copies = {role: self._copies.get(id(network)) for role, network in networks.items()}
        return {role: copy.num_bytes if copy else 0 for role, copy in copies.items()}

    def admit(self, load: Callable[[Network], object]) -> Network:
        """Return a guest, its weights brought into the owner's memory by `load` and copied out."""
        guest = self.owner.guest()
        self._save(self.owner)
        self._copies[id(self.owner)].wait_saved()
        self.guest = self._occupant = guest
        load(guest)
        self._save(guest)
        self.start(self.owner)
        self._wait()
        return guest

    def holds(self, network: Network) -> bool:
        """Whether the network's weights are on the device, ready to be read."""
        return self._occupant is network and self._is_ready

    @contextlib.contextmanager
    def present(self, network: Network) -> Iterator[None]:
        """Run a block with the network's weights on the device; whoever is next comes in after."""
        self.start(network)
        self._wait()
        yield
        if self.rests_on_host:
            self.vacate()
        elif network is not self.owner:
            self.start(self.owner)
        elif self.awaits_guest and self.guest is not None:
            self.start(self.guest)

    def start(self, network: Network) -> None:
        """Start bringing a network in, once the computation so far has run."""
        leaving = self._occupant
        if leaving is network:
            return
        if leaving is None:
            allocate(self._storages, self._sizes)
        elif self._is_stale(leaving):
            self._save(leaving)
        after = None if leaving is None else self._copies[id(leaving)]
        self._copies[id(network)].load(self._storages, after=after)
        self._occupant, self._is_ready = network, False
        self._observe()

    def begin_saving(self) -> None:
        """Start copying the owner out ahead of a swap, where its copy is not of these weights."""
        if self._occupant is self.owner and self._is_stale(self.owner):
            self._save(self.owner)

    def restore(self) -> None:
        """Bring the owner in, to be read and to be changed."""
        self.start(self.owner)
        self._wait()
        if id(self.owner) in self._copies:
            self._copies[id(self.owner)].wait_saved()

    def vacate(self) -> None:
        """Give the memory up; the occupant's weights are on the host then."""
        if self._occupant is None:
            return
        self._wait()
        if self._is_stale(self._occupant):
            self._save(self._occupant)
        self._copies[id(self._occupant)].wait_saved()
        self._observe()
        release(self._storages)
        self._occupant, self._is_ready = None, False

    def _wait(self) -> None:
        if not self._is_ready:
            self._copies[id(self._occupant)].wait_loaded()
            self._is_ready = True

    def _is_stale(self, network: Network) -> bool:
        return self._versions.get(id(network)) != network.weights_version

    def _save(self, network: Network) -> None:
        network.settle()
        if id(network) not in self._copies:
            self._copies[id(network)] = HostCopy(self._link, self._sizes)
        self._copies[id(network)].save(self._storages)
        self._versions[id(network)] = network.weights_version
        self._observe()


def weights_of(network: Network) -> list[Tensor]:
    """Return the parameters and buffers of all chunks."""
    return [
        tensor
        for module in network.modules
        for tensor in (*module.parameters(), *module.buffers())
        if tensor is not None
    ]
