import dataclasses

import pytest

from engine.residency.expected import PHASES, ExpectedBytes, ModelBytes, expected_bytes
from engine.settings.residency import ResidencyConfig
from tests.engine.residency.scene import CHOICES

TRAINED = ModelBytes(weights=100, gradients=200, optimizer=600, layer=8, ends=20, dp=4)
FROZEN = ModelBytes(weights=100, layer=8, ends=20, dp=4)
SMALL = ModelBytes(weights=10, gradients=20, optimizer=60, layer=2, ends=3, dp=4)
SMALL_FROZEN = ModelBytes(weights=10, layer=2, ends=3, dp=4)
MODELS = {"policy": TRAINED, "critic": SMALL, "reference": FROZEN, "reward_model": SMALL_FROZEN}


def rows(config: ResidencyConfig, **models: ModelBytes) -> ExpectedBytes:
    return expected_bytes(config, MODELS | models)


def test_gradients_are_there_in_updates_alone():
    device = rows(ResidencyConfig()).device
    assert device["policy gradients"] == {"rollout": 0, "score": 0, "update": 200}
    assert device["policy optimizer"] == dict.fromkeys(PHASES, 600)
    assert device["policy weights"] == dict.fromkeys(PHASES, 100)


def test_optimizer_on_the_host_is_on_the_device_in_updates():
    found = rows(ResidencyConfig(optimizer="host"))
    assert found.device["critic optimizer"] == {"rollout": 0, "score": 0, "update": 60}
    assert (found.host["policy optimizer"], found.host["critic optimizer"]) == (600, 60)


def test_critic_on_the_host_is_away_in_rollouts():
    found = rows(ResidencyConfig(critic="host"))
    assert found.device["critic weights"] == {"rollout": 0, "score": 10, "update": 10}
    assert found.host["critic weights"] == 10
    assert found.host["policy weights"] == 0


def test_reference_that_borrows_sends_the_policy_to_the_host_meanwhile():
    found = rows(ResidencyConfig(reference="host"))
    assert found.device["reference weights"] == dict.fromkeys(PHASES, 0)
    assert (found.host["reference weights"], found.host["policy weights"]) == (100, 100)


def test_reference_of_another_size_has_memory_of_its_own_while_it_is_read():
    other = dataclasses.replace(FROZEN, weights=150)
    found = rows(ResidencyConfig(reference="host"), reference=other)
    assert found.device["reference weights"] == {"rollout": 0, "score": 150, "update": 0}
    assert (found.host["reference weights"], found.host["policy weights"]) == (150, 0)


def test_sharded_model_is_a_share_and_two_layers_while_it_is_read():
    found = rows(ResidencyConfig(reference="sharded"), reference=dataclasses.replace(FROZEN, dp=3))
    passing = 20 + 2 * 8  # the ends, the layer that is read and the one that comes
    assert found.device["reference weights"] == {
        "rollout": 34,  # a third, rounded up
        "score": 34 + passing,
        "update": 34,
    }
    assert found.passing == {"reference weights": passing}
    assert found.host_total == 0


def test_of_two_models_that_pass_the_device_holds_the_larger_at_a_time():
    found = rows(ResidencyConfig(reference="sharded", reward_model="sharded"))
    assert found.passing == {"reference weights": 36, "reward_model weights": 7}
    rest = sum(row["score"] for row in found.device.values()) - 36 - 7
    assert found.device_total("score") == rest + 36
    assert found.device_total("update") == sum(row["update"] for row in found.device.values())


def test_copy_that_generates_is_there_in_rollouts():
    found = rows(ResidencyConfig(), generation=ModelBytes(weights=50))
    assert found.device["generation weights"] == {"rollout": 50, "score": 0, "update": 0}
    assert "generation weights" not in rows(ResidencyConfig()).device


@pytest.mark.parametrize("phase", PHASES)
def test_what_leaves_the_device_makes_room_in_every_phase_but_updates(phase: str):
    host = ResidencyConfig(reference="host", reward_model="host", critic="host", optimizer="host")
    resident, parked = rows(ResidencyConfig()), rows(host)
    spared = resident.device_total(phase) - parked.device_total(phase)
    frozen = 100 + 10
    optimizers = 0 if phase == "update" else 600 + 60
    critic = 10 if phase == "rollout" else 0
    assert spared == frozen + optimizers + critic


def test_host_choices_leave_the_device_to_what_works():
    size = ModelBytes(weights=100, gradients=200, optimizer=600, layer=8, ends=20, dp=4)
    frozen = ModelBytes(weights=100, layer=8, ends=20, dp=4)
    models = {"policy": size, "critic": size, "reference": frozen, "reward_model": frozen}
    everything = expected_bytes(CHOICES["resident"], models)
    assert [everything.device_total(phase) for phase in PHASES] == [1600, 1600, 2000]
    least = expected_bytes(CHOICES["host"], models)
    assert [least.device_total(phase) for phase in PHASES] == [100, 200, 1800]
    assert least.host_total == 4 * 100 + 2 * 600
    spread = expected_bytes(CHOICES["sharded"], models)
    assert [spread.device_total(phase) for phase in PHASES] == [250, 250 + 36, 1850]
    larger = {"reference": dataclasses.replace(frozen, weights=150)}
    own = expected_bytes(CHOICES["host"], models | larger)
    assert [own.device_total(phase) for phase in PHASES] == [100, 350, 1800]
    assert own.host_total == 150 + 2 * 100 + 2 * 600  # the policy lends its memory to nobody
