"""The end of text has the chance that the job names, where a response may end and nowhere else."""

import dataclasses

import pytest
import torch

from benchmarks.ppo_weights import draw_the_end, write_weights
from benchmarks.random_gpt2 import random_gpt2
from engine.settings.numerics import Numerics
from models.sizes import SIZES
from tests.benchmarks.test_ppo_provider import CPU, JOB, MIXED


@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16])
def test_the_end_has_the_jobs_hazard_from_the_shortest_response_on(dtype):
    job = dataclasses.replace(MIXED, size=SIZES["tiny"], prompt_tokens=64, response_tokens=128)
    assert (job.shortest, job.hazard) == (16, 1 / 48)
    model = random_gpt2(job.size, CPU, torch.float32)
    draw_the_end(model, job)
    generator = torch.Generator().manual_seed(7)
    tokens = torch.randint(job.size.vocab_size - 1, (16, 64 + 127), generator=generator)
    with torch.no_grad():
        chances = model.to(dtype)(tokens).logits.float().softmax(-1)[..., -1]
    # The token at p is drawn in the state of position p - 1; the 16th response token is at 79.
    assert chances[:, :78].max() < 1e-6
    assert float(chances[:, 78:].mean()) == pytest.approx(1 / 48, rel=0.03)
    assert chances[:, 78:].mean(0).min() > 0.5 / 48 and chances[:, 78:].mean(0).max() < 2 / 48


def test_critic_and_policy_share_a_file_only_where_they_are_the_same(tmp_path):
    job = dataclasses.replace(JOB, numerics=Numerics(dtype="bf16"))
    for folder, workload in (("a", "fixed"), ("b", "mixed")):
        (tmp_path / folder).mkdir()
        write_weights(dataclasses.replace(job, workload=workload), tmp_path / folder, CPU)
        assert (tmp_path / folder / "critic").is_symlink() == (workload == "fixed")
        assert (tmp_path / folder / "critic" / "model.safetensors").exists()
