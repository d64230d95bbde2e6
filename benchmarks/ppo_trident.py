"""Runs this engine's PPO on the job that TRL's PPOTrainer does in trl_ppo.py."""

from pathlib import Path

import torch

from benchmarks.ppo_job import MOST_ITERATIONS, NUM_PROBED, GoesOn, Job, Measured, peak_bytes
from benchmarks.ppo_scene import NO_EOS, Scene, build, random_feed, run_iteration
from benchmarks.ppo_weights import score_weight
from engine.data.examples import Example
from engine.feed import Feed, pack_for
from engine.huggingface.convert import load_huggingface
from engine.ranks.parallel import Parallel
from engine.ranks.start import start_parallel
from engine.settings.layout import ParallelLayout
from engine.settings.numerics import Numerics
from engine.settings.ppo import PPOConfig, PPOData
from engine.settings.sampling import SamplingConfig
from engine.training.network import Network, build_network
from engine.training.passes import forward


def config_of(job: Job, num_iterations: int) -> PPOConfig:
    """Return the paper's coefficients for a job."""
    num_ptx = job.ptx_examples_per_episode
    return PPOConfig(
        data=PPOData(
            pretraining_tokens=job.pretraining_tokens, max_prompt_tokens=job.prompt_tokens
        ),
        sampling=SamplingConfig(
            max_new_tokens=job.response_tokens,
            num_slots=min(job.num_episodes, 256),
            # All prompts in few steps, as a batch generator has them: at most 16k tokens at once.
            prefill_tokens=max(1024, min(2**14, job.num_episodes * job.prompt_tokens)),
        ),
        iterations=num_iterations,
        rollout_batch_size=job.num_episodes,
        minibatch_size=job.minibatch_size,
        ptx_coef=PPOConfig.ptx_coef if num_ptx else 0.0,
        ptx_examples_per_episode=max(1, num_ptx),
        micro_batch_tokens=job.micro_batch_tokens,
        numerics=job.numerics,
    )


def feed_of(job: Job, config: PPOConfig, parallel: Parallel) -> Feed | None:
    """Return the job's pretraining text, None without ptx."""
    if not job.ptx_examples_per_episode:
        return None
    return random_feed(config, job.size, parallel, job.pretraining_tokens)


def run_trident(
    job: Job, device: torch.device, goes_on: GoesOn, weights: Path | None = None
) -> Measured:
    """Run this engine's iterations, from the weights or else from its own initialisation."""
    start_bytes = peak_bytes(device)
    config = config_of(job, MOST_ITERATIONS)
    parallel = start_parallel(ParallelLayout(), seed=0)
    feed = feed_of(job, config, parallel)
    fill = None if weights is None else lambda network: _fill(network, weights, job.numerics)
    scene = build(config, (job.size, job.critic_size), parallel, feed, fill)
    prompts = [Example(tokens=row, prompt_length=len(row)) for row in job.prompts()]
    before = _before(scene, prompts[:NUM_PROBED], job.micro_batch_tokens)
    eos_id = NO_EOS if job.eos_id is None else job.eos_id
    seconds: list[dict[str, float]] = []
    lengths: list[list[int]] = []
    values: list[dict[str, float]] = []
    num_updates = 0
    while goes_on(seconds):
        iteration = run_iteration(scene, config, prompts, len(seconds), eos_id)
        seconds.append(iteration.seconds)
        lengths.append(iteration.rollout.response_lengths)
        values.append(iteration.values)
        num_updates = iteration.num_updates
        del iteration  # the next one's memory is its own
    return Measured(
        seconds=seconds[1:],
        lengths=lengths,
        num_updates=num_updates,
        losses=(values[-1]["update/policy_loss"], values[-1]["update/value_loss"]),
        kl_per_token=values[0]["score/kl_per_token"],
        before=before,
        start_bytes=start_bytes,
        peak_bytes=peak_bytes(device),
    )


def _before(scene: Scene, prompts: list[Example], micro_batch_tokens: int) -> dict[str, float]:
    """Return Measured.before."""
    # All but a prompt's first token are predicted.
    examples = [Example(tokens=prompt.tokens, prompt_length=1) for prompt in prompts]

    def mean(network: Network) -> float:
        batches = pack_for(examples, network.parallel, micro_batch_tokens)
        outputs = forward(network, batches)
        found = [out[batch.mask] for out, batch in zip(outputs, batches, strict=True)]
        return float(torch.cat(found).mean())

    learner = scene.learner
    with scene.residency.score():
        return {"logprob": mean(learner.policy.network), "value": mean(learner.critic.network)}


def _fill(network: Network, folder: Path, numerics: Numerics) -> None:
    """Give a policy or a critic that has no optimizer yet the weights of ppo_weights.py."""
    if network.kind == "language":
        load_huggingface(network, folder / "policy")
        return
    trunk = build_network("language", network.size, network.parallel, numerics=numerics)
    load_huggingface(trunk, folder / "critic")
    for mine, theirs in zip(network.modules, trunk.modules, strict=True):
        found = dict(theirs.named_parameters())
        for name, parameter in mine.named_parameters():
            if name == "scalar_head.weight":
                parameter.data.copy_(score_weight(network.size.hidden_size))
            elif name == "scalar_head.bias":
                parameter.data.zero_()
            else:
                parameter.data.copy_(found[name].data)
