"""Runs TRL's PPOTrainer on the same job as this engine's PPO (ppo_step.py).

GPT-2 of transformers with the weights of ppo_weights.py, its attention through torch's SDPA, its
GELU in torch's one kernel. TRL is set for speed: no gradient checkpointing, all episodes generated
and scored in one batch, fused AdamW, nothing saved or reported. In bf16 all four models and Adam's
moments are bf16, which is the fastest and smallest that TRL has. It is less exact than what stands
beside it: this engine keeps fp32 masters, fp32 gradient sums and fp32 moments. "mixed" has fp32
policy and value weights, trained under autocast as `accelerate launch --mixed_precision` asks for
it (bf16 in PPOConfig alone changes nothing); it generates from them in fp32, as PPOTrainer does.

TRL's accelerator would take one optimizer step an iteration, whatever num_mini_batches says; it is
told to take one a minibatch. TRL reads the policy's log-probs off the logits it sampled from, as
this engine does in fp32; in bf16 this engine runs a forward pass more. It generates until the
longest response of the batch has ended, and scores and trains on the whole rectangle; where an end
of text is drawn, its setting stop_token="eos" cuts what comes after it.
"""

import contextlib
import importlib
import io
import os
import statistics
import tempfile
import time
from collections.abc import Iterator
from pathlib import Path
from types import SimpleNamespace
from typing import Any
from unittest import mock

import numpy as np
import torch

from benchmarks.ppo_job import MOST_ITERATIONS, NUM_PROBED, GoesOn, Job, Measured, peak_bytes
from engine.ranks.device import DTYPES

_MODULE = "trl.experimental.ppo.ppo_trainer"


class _EnoughError(Exception):
    """Ends PPOTrainer.train, which nothing else stops before its last batch."""


def run_trl(
    job: Job, device: torch.device, goes_on: GoesOn, weights: Path, *, is_mixed: bool
) -> Measured:
    """Train for the job's iterations. Raises ImportError where TRL or what it needs is missing."""
    os.environ.setdefault("TRL_EXPERIMENTAL_SILENCE", "1")
    module = importlib.import_module(_MODULE)
    importlib.import_module("transformers").logging.set_verbosity_error()
    start_bytes = peak_bytes(device)
    models = _models(job, device, weights, is_mixed=is_mixed)
    before = _before(job, models)
    with (
        tempfile.TemporaryDirectory() as folder,
        contextlib.redirect_stdout(io.StringIO()),
        _mixed_precision(job.numerics.dtype if is_mixed else "no"),
    ):
        trainer = _trainer(module, job, models, folder, device, is_mixed=is_mixed)
        watch = _Watch(trainer, job, device, goes_on)
        is_cast = trainer.accelerator.mixed_precision != "no"
        assert is_cast == (is_mixed and job.numerics.dtype != "fp32")
        trainer.add_callback(_callback(watch))
        with watch.around_generation(module), contextlib.suppress(_EnoughError):
            trainer.train()
    logs = [row for row in trainer.state.log_history if "loss/policy_avg" in row]
    return Measured(
        seconds=watch.iterations[1:],
        lengths=watch.lengths,
        num_updates=watch.num_updates,
        losses=(logs[-1]["loss/policy_avg"], logs[-1]["loss/value_avg"]),
        kl_per_token=logs[0]["objective/kl"] / statistics.mean(watch.lengths[0]),
        before=before,
        start_bytes=start_bytes,
        peak_bytes=peak_bytes(device),
    )


def settings(job: Job, *, is_mixed: bool) -> dict[str, Any]:
    """Return what TRL is told, for the record."""
    batch = _batch_size(job)
    return {
        "trl": importlib.import_module("trl").__version__,
        "transformers": importlib.import_module("transformers").__version__,
        "numerics": _numerics(job, is_mixed=is_mixed),
        "per_device_train_batch_size": batch,
        "gradient_accumulation_steps": job.num_episodes // batch,
        "num_mini_batches": job.num_updates,
        "local_rollout_forward_batch_size": job.num_episodes,
        "num_ppo_epochs": 1,
        "gradient_checkpointing": False,
        "attention": "sdpa",
        "stop_token": _stop_token(job),
    }


@contextlib.contextmanager
def _mixed_precision(dtype: str) -> Iterator[None]:
    """Run a block in which accelerate starts anew, in the way that its launcher asks for."""
    from accelerate.state import AcceleratorState

    AcceleratorState._reset_state(reset_partial_state=True)
    word = "no" if dtype == "fp32" else dtype
    with mock.patch.dict(os.environ, {"ACCELERATE_MIXED_PRECISION": word}):
        yield
    AcceleratorState._reset_state(reset_partial_state=True)


def _numerics(job: Job, *, is_mixed: bool) -> str:
    if job.numerics.dtype == "fp32":
        return "fp32"
    if is_mixed:
        return f"fp32 policy and value under {job.numerics.dtype} autocast; frozen models in it"
    return f"weights, gradients and Adam's moments in {job.numerics.dtype}"


def _stop_token(job: Job) -> str | None:
    return None if job.eos_id is None else "eos"


def _batch_size(job: Job) -> int:
    """Episodes of one forward and backward pass: what divides a minibatch and fits the budget."""
    most = max(1, job.micro_batch_tokens // (job.prompt_tokens + job.response_tokens))
    divisors = (n for n in range(1, job.minibatch_size + 1) if job.minibatch_size % n == 0)
    return max(n for n in divisors if n <= most)


def _models(job: Job, device: torch.device, weights: Path, *, is_mixed: bool) -> dict[str, Any]:
    """Return policy, reference, value and reward model; each frozen one holds its partner's
    weights."""
    from transformers import GPT2ForSequenceClassification, GPT2LMHeadModel

    from benchmarks.ppo_weights import load_theirs
    from benchmarks.random_gpt2 import gpt2_config

    dtype = DTYPES[job.numerics.dtype]
    trained = torch.float32 if is_mixed else dtype
    made: dict[str, Any] = {}
    for role, frozen, kind, size in (
        ("model", "ref_model", GPT2LMHeadModel, job.size),
        ("value_model", "reward_model", GPT2ForSequenceClassification, job.critic_size),
    ):
        config = gpt2_config(size, num_labels=1, bos_token_id=None, eos_token_id=None)
        with device:
            made[role] = kind(config).to(trained)
            made[frozen] = kind(config).to(dtype)
        load_theirs(made[role], weights)
        made[frozen].load_state_dict(made[role].state_dict())
        made[frozen].requires_grad_(False).eval()
    return made


@torch.no_grad()
def _before(job: Job, models: dict[str, Any]) -> dict[str, float]:
    """Return Measured.before."""
    policy, critic = models["model"].eval(), models["value_model"].eval()
    tokens = torch.from_numpy(job.prompts()[:NUM_PROBED]).to(policy.device)
    logprobs = policy(tokens).logits[:, :-1].float().log_softmax(-1)
    values = critic.score(critic.transformer(tokens).last_hidden_state[:, 1:])
    return {
        "logprob": float(logprobs.gather(-1, tokens[:, 1:, None]).mean()),
        "value": float(values.float().mean()),
    }


def _trainer(
    module: Any,
    job: Job,
    models: dict[str, Any],
    folder: str,
    device: torch.device,
    *,
    is_mixed: bool,
) -> Any:
    batch = _batch_size(job)
    config = module.PPOConfig(
        output_dir=folder,
        use_cpu=device.type == "cpu",
        bf16=is_mixed and job.numerics.dtype == "bf16",  # left out it would be True
        optim="adamw_torch_fused",
        # A tenth, where this engine's warm-up begins: more of it soon ends responses earlier.
        learning_rate=5.49e-7,
        lr_scheduler_type="constant",
        gradient_checkpointing=False,
        report_to="none",
        save_strategy="no",
        disable_tqdm=True,
        per_device_train_batch_size=batch,
        gradient_accumulation_steps=job.num_episodes // batch,
        num_mini_batches=job.num_updates,
        num_ppo_epochs=1,
        total_episodes=job.num_episodes * MOST_ITERATIONS,
        local_rollout_forward_batch_size=job.num_episodes,
        num_sample_generations=0,
        response_length=job.response_tokens,
        temperature=1.0,
        kl_coef=0.02,
        stop_token=_stop_token(job),
    )
    dataset = [{"input_ids": row} for row in job.prompts().tolist()]
    eos_id = job.size.vocab_size + 1 if job.eos_id is None else job.eos_id
    trainer = module.PPOTrainer(
        args=config,
        # Ids beyond the vocabulary are no tokens: no prompt is padded, and the end may not exist.
        processing_class=SimpleNamespace(pad_token_id=job.size.vocab_size, eos_token_id=eos_id),
        train_dataset=dataset,
        eval_dataset=dataset,
        data_collator=lambda rows: {"input_ids": torch.tensor([row["input_ids"] for row in rows])},
        **models,
    )
    accumulation = trainer.accelerator.gradient_state.plugin_kwargs
    accumulation.update(num_steps=job.minibatch_size // batch, sync_with_dataloader=False)
    return trainer


class _Watch:
    """Stops the time of PPOTrainer's phases, and counts what it does.

    Rollout is its batch generation, update what comes after the first training pass of an
    iteration; between the two it scores and estimates advantages.
    """

    def __init__(self, trainer: Any, job: Job, device: torch.device, goes_on: GoesOn) -> None:
        self.iterations: list[dict[str, float]] = []
        self.lengths: list[list[int]] = []
        self.num_updates = 0
        self._job, self._device, self._goes_on = job, device, goes_on
        self._marks: list[float] = []
        trainer.model.register_forward_pre_hook(lambda *_: self._begin_update())
        optimizer = getattr(
            trainer.optimizer, "optimizer", trainer.optimizer
        )  # accelerate's, torch's
        optimizer.register_step_post_hook(lambda *_: self._count_update())

    def begin(self) -> None:
        """Note the time at which an iteration begins; raises _EnoughError where there is none."""
        if not self._goes_on(self.iterations):
            raise _EnoughError
        self._marks = [self._now()]
        self.num_updates = 0

    def end(self) -> None:
        """Note an iteration."""
        self._marks.append(self._now())
        rollout, score, update = np.diff(self._marks).tolist()
        self.iterations.append({"rollout": rollout, "score": score, "update": update})

    @contextlib.contextmanager
    def around_generation(self, module: Any) -> Iterator[None]:
        """Run a block in which PPOTrainer's batch generation notes its end and its tokens."""
        generate = module.batch_generation

        def watched(model: Any, queries: torch.Tensor, *others: Any) -> Any:
            sequences, logits = generate(model, queries, *others)
            self._marks.append(self._now())
            self.lengths.append(self._lengths_of(sequences[:, queries.shape[1] :]))
            return sequences, logits

        with mock.patch.object(module, "batch_generation", watched):
            yield

    def _lengths_of(self, responses: torch.Tensor) -> list[int]:
        """Tokens up to the first end of text, which is what TRL trains on."""
        num_tokens = responses.shape[1]
        if self._job.eos_id is None:
            assert bool((responses < self._job.size.vocab_size).all())
            return [num_tokens] * len(responses)
        rows = (responses == self._job.eos_id).tolist()
        return [row.index(True) + 1 if True in row else num_tokens for row in rows]

    def _begin_update(self) -> None:
        if len(self._marks) == 2:  # the first pass of the iteration that trains
            self._marks.append(self._now())

    def _count_update(self) -> None:
        self.num_updates += 1

    def _now(self) -> float:
        if self._device.type == "cuda":
            torch.cuda.synchronize(self._device)  # sync
        return time.monotonic()


def _callback(watch: _Watch) -> Any:
    """Return the callback that tells the watch of iterations."""
    from transformers import TrainerCallback

    class Iterations(TrainerCallback):
        def on_train_begin(self, *_: Any, **__: Any) -> None:
            watch.begin()

        def on_step_end(self, *_: Any, **__: Any) -> None:
            watch.end()
            watch.begin()

    return Iterations()
