import numpy as np
import pytest

from engine.data.examples import Example
from engine.generation.generate import generate
from engine.ranks.parallel import Parallel
from engine.residency.expected import PHASES
from engine.rollout import generate_rollout
from engine.score import read_rollout
from tests.engine.generation.recorded import record_steps
from tests.engine.residency.scene import CHOICES, SAMPLING, Scene, scene


def held_bytes(case: Scene) -> int:
    """What the tensors of all four models, and of what trains, hold on the device."""
    tensors = [p for n in case.networks.values() for m in n.modules for p in m.parameters()]
    for optimizer in (case.learner.policy, case.learner.critic):
        tensors += optimizer.state_tensors()
        tensors += [b.grad_data for chunk in optimizer.network.chunks for b in chunk.buffers]
    storages = {t.untyped_storage()._cdata: t.untyped_storage() for t in tensors}
    storages |= {t.untyped_storage()._cdata: t.untyped_storage() for t in case.learner.ema.shadows}
    return sum(storage.nbytes() for storage in storages.values())


def test_a_cache_beside_torchs_allocator_is_counted(parallel: Parallel):
    case = scene(parallel, CHOICES["resident"])
    decoding = record_steps(case.networks["policy"])
    with case.residency.rollout() as network:
        list(generate(network, [np.array([3, 4, 5])], SAMPLING, eos_id=-1, seed=0))
        decoding.memory.last_bytes = 123
    assert case.residency.ledger.outside_bytes == 123
    with case.residency.score():
        assert case.residency.ledger.outside_bytes == 0


@pytest.mark.parametrize("dtype", ["fp32", "bf16"])
@pytest.mark.parametrize("choice", CHOICES)
def test_peaks_follow_the_plan(choice: str, dtype: str, parallel: Parallel):
    case = scene(parallel, CHOICES[choice], dtype=dtype)
    ledger = case.residency.ledger
    prompts = [Example(tokens=np.array([3, 4, 5]), prompt_length=3)] * 2
    with case.residency.rollout():
        rollout = generate_rollout(
            case.networks["policy"], prompts, SAMPLING, eos_id=-1, seed=0, first_sample_index=0
        )
        in_rollout = held_bytes(case)
    with case.residency.score():
        for role in ("policy", "critic", "reference", "reward_model"):
            read_rollout(case.networks[role], rollout, 100)
    with case.residency.update():
        in_update = held_bytes(case)
    expected = ledger.expected
    assert expected is not None
    for phase in PHASES:
        assert ledger.peaks[phase] == pytest.approx(expected.device_total(phase), rel=0.05), phase
    if "sharded" not in (case.residency.config.reference, case.residency.config.reward_model):
        assert ledger.peaks["rollout"] == in_rollout
        assert ledger.peaks["update"] == in_update
    host = ledger.metrics()["memory/host_bytes"]
    assert host == pytest.approx(expected.host_total, rel=0.05)
    assert (host > 0) == (choice != "resident")
