"""A step whose passes are computed twice now and then: a chip that counts wrong is found before its
numbers are in the weights.

Large fleets see chips that now and then give a wrong number and no error: silent data corruption
(Llama 3, 3.3.4: 6 interruptions in 54 days on 16,384 GPUs were laid to it). In deterministic mode
the same pass from the same state gives the same bits, and whatever does not is at fault.
"""

from collections.abc import Callable

from torch import Tensor

from engine.ranks.seeds import kept_generators
from engine.training.copies import check_copies
from engine.training.diagnosis import named_weights
from engine.training.digests import digests
from engine.training.network import Network
from engine.training.optimizer import Optimizer
from engine.training.reduce import StepMetrics
from engine.training.witness import end_if_seen, rank_in_words, some_of

_REMEDY = (
    "Nothing of this step was applied, and what was saved before is as it was. A device or its "
    "memory is at fault there, or a kernel that is not deterministic: if the same command, which "
    "goes on from the newest checkpoint, ends so at another step, leave that node out; if at the "
    "same one on other nodes too, it is a kernel, and --numerics.recheck-every 0 goes on without"
)


def checked_gradients(
    optimizer: Optimizer, compute: Callable[[], StepMetrics], *, step: int, role: str
) -> StepMetrics:
    """Have `compute` add a step's gradients to the network's buffers, which are zero; return what
    it returns.

    In every recheck_every-th step it does so twice. Loss, metrics and gradients must agree to the
    last bit, on each rank before they are summed over ranks. In every compare_every-th, ranks first
    compare weights. Raises UserError on all ranks, who call together, where something
    differs.
    """
    network = optimizer.network
    numerics, parallel = network.numerics, network.parallel
    if _is_due(numerics.compare_every, step):
        check_copies(network, f"step {step}", role)
    if not _is_due(numerics.recheck_every, step):
        return compute()
    put_back = kept_generators(parallel)
    with network.holding_back():
        first = compute()
        before = _digests_of(network, first)
        optimizer.zero_gradients()
        put_back()
        second = compute()
        after = _digests_of(network, second)
        names = [name for name in before if int(before[name]) != int(after[name])]  # sync
        lines = [f"{rank_in_words(parallel)}: {some_of(names)}"] if names else []
        end_if_seen(
            lines,
            parallel,
            f"step {step}: forward and backward pass of the {role}, computed twice from the same "
            "state, differ in",
            _REMEDY,
        )
    return second


def _is_due(every: int, step: int) -> bool:
    return every > 0 and (step + 1) % every == 0


def _digests_of(network: Network, metrics: StepMetrics) -> dict[str, Tensor]:
    """Return the digests, on the host, of what this rank's passes gave, by name."""
    found: dict[str, Tensor] = dict(metrics)
    for name, parameter in named_weights(network):
        found[name] = parameter.main_grad  # type: ignore[attr-defined]
    numbers = digests(list(found.values()), network.parallel.device).cpu()  # sync
    return dict(zip(found, numbers, strict=True))
