"""What is asked of one rank: training steps, rollouts, memory and checkpoints of small models."""

import dataclasses
import tempfile
from pathlib import Path

import numpy as np
import torch

from benchmarks.language_step import Job, trident
from benchmarks.ppo_job import Job as Iteration
from benchmarks.ppo_scene import NO_EOS, build, random_prompts, run_iteration
from benchmarks.ppo_trident import config_of
from benchmarks.real_job import ADAM
from benchmarks.scaling.curve import (
    COUNT_TOLERANCE,
    Question,
    constant,
    cpu_seconds,
    linear,
)
from benchmarks.timing import peak_bytes
from engine.checkpoints.checkpointer import Checkpointer
from engine.data.examples import Example
from engine.feed import pack_for
from engine.losses import comparison_loss
from engine.ranks.start import start_parallel
from engine.rollout import generate_rollout
from engine.settings.layout import ParallelLayout
from engine.settings.numerics import Numerics
from engine.settings.sampling import SamplingConfig
from engine.training.network import build_network
from engine.training.optimizer import Optimizer
from engine.training.passes import forward_backward
from models.sizes import GPTSize

CPU = torch.device("cpu")
SIZE = GPTSize(num_layers=2, hidden_size=128, num_heads=4, vocab_size=1024, context_length=4096)
LENGTH = 64
"""Tokens of a sequence where nothing else is said."""
PROMPT = 16
"""Tokens of a rollout's prompt."""
NUM_TOKENS = 4096
"""Of a step whose sequences get longer."""
MICRO_BATCH_TOKENS = 1024


def questions() -> list[Question]:
    """Return all of them."""
    return [*_training(), *_rollouts(), *_storage()]


def _training() -> list[Question]:
    return [
        Question(
            what=f"training step, {LENGTH} tokens a sequence, {MICRO_BATCH_TOKENS} a micro-batch",
            variable="tokens",
            sizes=(2048, 4096, 8192, 16384),
            quick_sizes=(1024, 2048, 4096, 8192),
            formula="n",
            expected=linear,
            measure=lambda n: _step_seconds(_job(num_tokens=n)),
        ),
        Question(
            what=f"training step, {LENGTH} tokens a sequence, one micro-batch",
            variable="tokens",
            sizes=(1024, 2048, 4096, 8192),
            quick_sizes=(512, 1024, 2048, 4096),
            formula="n",
            expected=linear,
            measure=lambda n: _step_seconds(_job(num_tokens=n, micro_batch_tokens=n)),
        ),
        Question(
            what=f"training step, {NUM_TOKENS} tokens",
            variable="tokens a sequence",
            sizes=(64, 128, 256, 512, 1024),
            quick_sizes=(64, 128, 256, 512),
            formula="layers (24 h^2 + 4 h n) + 2 h V",
            expected=_flops_a_token,
            measure=lambda n: _step_seconds(_job(num_tokens=NUM_TOKENS, length=n)),
        ),
        Question(
            what="reward model's step, 16 prompts",
            variable="K",
            sizes=(4, 8, 16, 32),
            quick_sizes=(2, 4, 8, 16),
            formula="n",
            expected=linear,
            measure=lambda n: _ranking_seconds(16, n, MICRO_BATCH_TOKENS),
        ),
        Question(
            what="reward model's step, K 4, one micro-batch",
            variable="prompts",
            sizes=(8, 16, 32, 64),
            quick_sizes=(4, 8, 16, 32),
            formula="n",
            expected=linear,
            measure=lambda n: _ranking_seconds(n, 4, n * 4 * LENGTH),
        ),
        Question(
            what="training step, 1024 tokens",
            variable="vocabulary",
            sizes=(8192, 16384, 32768, 65536),
            quick_sizes=(2048, 4096, 8192, 16384),
            formula="n",
            expected=linear,
            measure=lambda n: _step_seconds(_job(num_tokens=1024, vocab_size=n)),
        ),
        Question(
            what="training step, 1024 tokens",
            variable="layers",
            sizes=(4, 8, 16, 32),
            quick_sizes=(2, 4, 8, 16),
            formula="n",
            expected=linear,
            measure=lambda n: _step_seconds(_job(num_tokens=1024, num_layers=n)),
        ),
    ]


def _rollouts() -> list[Question]:
    return [
        Question(
            what=f"rollout, {PROMPT} + 16 tokens, a slot a sequence",
            variable="sequences",
            sizes=(64, 128, 256, 512),
            quick_sizes=(16, 32, 64, 128),
            formula="n",
            expected=linear,
            measure=lambda n: _rollout_seconds(n, 16),
        ),
        Question(
            what=f"rollout, {PROMPT} + 16 tokens, 16 slots",
            variable="sequences",
            sizes=(32, 64, 128, 256),
            quick_sizes=(16, 32, 64, 128),
            formula="n",
            expected=linear,
            measure=lambda n: _rollout_seconds(n, 16, num_slots=16),
        ),
        Question(
            what="rollout, 16 sequences",
            variable="response tokens",
            sizes=(64, 128, 256, 512),
            quick_sizes=(16, 32, 64, 128),
            formula=f"sum over the tokens of layers (24 h^2 + 4 h (i + {PROMPT})) + 2 h V",
            expected=lambda n: sum(_flops_a_token(PROMPT + i) for i in range(n)),
            measure=lambda n: _rollout_seconds(16, n),
        ),
        Question(
            what="rollout, 4 sequences of one token, 256 prompt tokens a step",
            variable="prompt tokens",
            sizes=(256, 512, 1024, 2048),
            quick_sizes=(128, 256, 512, 1024),
            formula="sum over the tokens of layers (24 h^2 + 4 h i) + 2 h V",
            expected=lambda n: sum(_flops_a_token(i) for i in range(n)),
            measure=lambda n: _rollout_seconds(4, 1, prompt_tokens=n),
        ),
        Question(
            what="rollout, 16 sequences, 16 tokens",
            variable="vocabulary",
            sizes=(8192, 16384, 32768, 65536),
            quick_sizes=(2048, 4096, 8192, 16384),
            formula="n",
            expected=linear,
            measure=lambda n: _rollout_seconds(16, 16, vocab_size=n),
        ),
        Question(
            what=f"PPO iteration, {PROMPT} + 16 tokens, minibatches of 16",
            variable="episodes",
            sizes=(32, 64, 128, 256),
            quick_sizes=(16, 32, 64, 128),
            formula="n",
            expected=linear,
            measure=_iteration_seconds,
        ),
    ]


def _storage() -> list[Question]:
    return [
        Question(
            what="training step, 512 tokens a micro-batch",
            variable="tokens",
            unit="peak bytes",
            sizes=(1024, 2048, 4096, 8192),
            quick_sizes=(512, 1024, 2048, 4096),
            formula="1",
            expected=constant,
            measure=lambda n: _peak_bytes(n, 512),
            tolerance=COUNT_TOLERANCE,
        ),
        Question(
            what="training step, one micro-batch",
            variable="tokens",
            unit="peak bytes",
            sizes=(1024, 2048, 4096, 8192),
            quick_sizes=(512, 1024, 2048, 4096),
            formula="n",
            expected=linear,
            measure=lambda n: _peak_bytes(n, n),
            tolerance=COUNT_TOLERANCE,
        ),
        Question(
            what="checkpoint with optimizer",
            variable="parameters",
            unit="bytes on disk",
            sizes=[_wide(n).num_parameters for n in (128, 256, 512, 1024)],
            quick_sizes=[_wide(n).num_parameters for n in (32, 64, 128, 256)],
            formula="n",
            expected=linear,
            measure=_checkpoint_bytes,
            tolerance=COUNT_TOLERANCE,
        ),
    ]


def _flops_a_token(length: int) -> float:
    """Multiplications and additions of a token that sees so many, in a forward pass. Attention over
    the whole length, not its causal half: kernels for a CPU compute blocks of it."""
    matrices = 24.0 * SIZE.hidden_size**2
    attention = 4.0 * SIZE.hidden_size * length
    head = 2.0 * SIZE.hidden_size * SIZE.vocab_size
    return SIZE.num_layers * (matrices + attention) + head


def _job(
    *,
    num_tokens: int,
    length: int = LENGTH,
    micro_batch_tokens: int = MICRO_BATCH_TOKENS,
    vocab_size: int = SIZE.vocab_size,
    num_layers: int = SIZE.num_layers,
) -> Job:
    return Job(
        size=dataclasses.replace(SIZE, vocab_size=vocab_size, num_layers=num_layers),
        numerics=Numerics(),
        num_sequences=num_tokens // length,
        length=length,
        micro_batch_tokens=micro_batch_tokens,
    )


def _step_seconds(job: Job) -> float:
    return cpu_seconds(trident(job, CPU, None).step)


def _ranking_seconds(num_prompts: int, num_completions: int, micro_batch_tokens: int) -> float:
    """A reward model's step on rankings of K completions, of LENGTH tokens with their prompt."""
    parallel = start_parallel(ParallelLayout(), seed=0)
    network = build_network("scalar", SIZE, parallel, numerics=Numerics())
    optimizer = Optimizer(network, ADAM, total_steps=1)
    tokens = np.random.default_rng(0).integers(
        0, SIZE.vocab_size, (num_prompts, num_completions, LENGTH)
    )
    units = [
        [
            Example(tokens=row, prompt_length=PROMPT, fields={"ranks": rank})
            for rank, row in enumerate(rows, start=1)
        ]
        for rows in tokens
    ]

    def step() -> None:
        optimizer.zero_gradients()
        batches = pack_for(units[:num_prompts], parallel, micro_batch_tokens)
        forward_backward(network, batches, comparison_loss(num_prompts))
        optimizer.step(0)

    return cpu_seconds(step)


def _rollout_seconds(
    num_sequences: int,
    response_tokens: int,
    *,
    prompt_tokens: int = PROMPT,
    num_slots: int | None = None,
    vocab_size: int = SIZE.vocab_size,
) -> float:
    size = dataclasses.replace(SIZE, vocab_size=vocab_size)
    parallel = start_parallel(ParallelLayout(), seed=0)
    network = build_network("language", size, parallel, numerics=Numerics())
    prompts = random_prompts(size, num_sequences, prompt_tokens)
    sampling = SamplingConfig(
        max_new_tokens=response_tokens,
        num_slots=num_slots or num_sequences,
        prefill_tokens=256,
        cache_gib=2.0,
    )
    return cpu_seconds(
        lambda: generate_rollout(
            network, prompts, sampling, eos_id=NO_EOS, seed=0, first_sample_index=0
        )
    )


def _iteration_seconds(num_episodes: int) -> float:
    job = Iteration(
        size=SIZE,
        critic_size=SIZE,
        numerics=Numerics(),
        num_episodes=num_episodes,
        minibatch_size=16,
        prompt_tokens=PROMPT,
        response_tokens=16,
        pretraining_tokens=LENGTH,
        ptx_examples_per_episode=0,
        micro_batch_tokens=MICRO_BATCH_TOKENS,
    )
    config = config_of(job, 100)
    scene = build(config, (SIZE, SIZE), start_parallel(ParallelLayout(), seed=0))
    prompts = random_prompts(SIZE, num_episodes, PROMPT)
    return cpu_seconds(lambda: run_iteration(scene, config, prompts, 0))


def _peak_bytes(num_tokens: int, micro_batch_tokens: int) -> float:
    """The most that a step holds beyond what stays between steps."""
    step = trident(_job(num_tokens=num_tokens, micro_batch_tokens=micro_batch_tokens), CPU, None)
    step.step()
    return float(peak_bytes(step.step, CPU))


def _wide(width: int) -> GPTSize:
    return dataclasses.replace(SIZE, hidden_size=width)


_WIDTHS = {_wide(width).num_parameters: width for width in (32, 64, 128, 256, 512, 1024)}


def _checkpoint_bytes(num_parameters: int) -> float:
    parallel = start_parallel(ParallelLayout(), seed=0)
    size = _wide(_WIDTHS[num_parameters])
    network = build_network("language", size, parallel, numerics=Numerics())
    optimizer = Optimizer(network, ADAM, total_steps=1)
    with tempfile.TemporaryDirectory() as name:
        checkpointer = Checkpointer(
            directory=Path(name),
            parallel=parallel,
            networks={"policy": network},
            optimizers={"policy": optimizer},
        )
        with checkpointer:
            folder = checkpointer.save(0, {})
        return float(sum(p.stat().st_size for p in folder.rglob("*") if p.is_file()))
