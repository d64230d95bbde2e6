import pytest
import torch

from engine.ranks.parallel import Parallel
from engine.residency.host import HostCopy, Link
from engine.settings.residency import ResidencyConfig
from tests.engine.residency.scene import equal, scene

CPU = torch.device("cpu")


@pytest.mark.parametrize("bucket_bytes", [64, 192, 1000, 10**6])
def test_host_copy_returns_every_byte_whatever_the_buckets(bucket_bytes: int):
    generator = torch.Generator().manual_seed(0)
    tensors = [torch.randn(n, generator=generator) for n in (1, 500, 16, 3)]
    before = [tensor.clone() for tensor in tensors]
    storages = [tensor.untyped_storage() for tensor in tensors]
    copy = HostCopy(Link(CPU, bucket_bytes=bucket_bytes), [s.nbytes() for s in storages])
    copy.save(storages)
    for tensor in tensors:
        tensor.zero_()
    copy.load(storages)
    assert equal(tensors, before)
    assert 4 * 520 <= copy.num_bytes <= 4 * 520 + 3 * 64


def test_optimizer_on_the_host_keeps_its_state_and_refuses_to_step_there(parallel: Parallel):
    case = scene(parallel, ResidencyConfig(optimizer="host"))
    optimizer, ema = case.learner.policy, case.learner.ema
    tensors = [*optimizer.state_tensors(), *ema.shadows]
    for n, tensor in enumerate(tensors):
        tensor.fill_(n)
    with case.residency.rollout():
        assert not any(tensor.untyped_storage().nbytes() for tensor in tensors)
        with pytest.raises(RuntimeError, match="the optimizer's state is in host memory"):
            optimizer.prepare_state()
    with case.residency.update():
        assert all(bool((tensor == n).all()) for n, tensor in enumerate(tensors))
        optimizer.prepare_state()
