"""Which epoch of supervised fine-tuning is the best: the one whose responses to held-out prompts a
reward model scores highest (InstructGPT 3.5).

The held-out loss would choose the first epoch or two; reward and people prefer later ones.
"""

import json
import math
from dataclasses import dataclass
from typing import Any

from engine.checkpoints.checkpointer import Checkpointer
from engine.data.examples import Example
from engine.data.limits import prompt_limits
from engine.data.prompt_format import Prompt
from engine.data.prompts import prompt_examples, read_prompts
from engine.errors import UserError
from engine.files import replacing
from engine.identity.inputs import Inputs
from engine.losses import last_readings
from engine.rollout import generate_rollout
from engine.run import Run
from engine.score import read_rollout
from engine.settings.sft import SFTConfig
from engine.training.network import Network, build_network


@dataclass(kw_only=True)
class EpochSelection:
    """Scores the policy at the end of each epoch, and names the best so far."""

    config: SFTConfig
    run: Run
    prompts: list[Example]
    reward_model: Network
    epochs: list[dict[str, float]]
    """{epoch, step, reward} of each epoch scored so far: what a resume must know."""

    def score(self, policy: Network, epoch: int, step: int) -> dict[str, float]:
        """Answer the prompts, remember the mean reward as the epoch's, and return the metrics.

        The draws are keyed alike each epoch, so that the epochs differ by their weights only.
        """
        rollout = generate_rollout(
            policy,
            self.prompts,
            self.config.selection.sampling,
            eos_id=self.run.tokenizer.eos_id,
            tokenizer=self.run.tokenizer,
            seed=self.config.seed,
            first_sample_index=0,
        )
        readings = read_rollout(self.reward_model, rollout, self.config.micro_batch_tokens)
        reward = float(last_readings(readings, rollout.cu_seqlens).double().mean())
        self.epochs.append({"epoch": epoch, "step": step, "reward": reward})
        return {
            "valid/reward": reward,
            "valid/eos_rate": float(rollout.has_eos.double().mean()),
            "valid/response_tokens": sum(rollout.response_lengths) / len(rollout),
        }

    def state_dict(self) -> list[dict[str, float]]:
        """Return what a resume continues from."""
        return list(self.epochs)

    def load_state_dict(self, state: list[dict[str, float]]) -> None:
        """Continue where state_dict() was taken."""
        self.epochs = list(state)

    def write(self, checkpointer: Checkpointer) -> None:
        """Make the best epoch's weights those of the run, and write selected.json beside them;
        nothing while no epoch has a reward."""
        best = best_epoch(self.epochs)
        if best is None:
            return
        name = epoch_name(int(best["epoch"]))
        checkpointer.select(name)
        if self.run.parallel.is_writer:
            record = {
                **best,
                "checkpoint": f"checkpoints/{name}",
                "reward_model": str(self.config.selection.reward_model),
                "num_prompts": len(self.prompts),
                "epochs": self.epochs,
            }
            with replacing(self.run.directory / "selected.json") as stream:
                stream.write((json.dumps(record, indent=1) + "\n").encode())


def load_selection(
    config: SFTConfig, run: Run, policy: Network, held_out: list[Prompt], inputs: Inputs
) -> EpochSelection | None:
    """Return what scores the epochs, None where the config has no reward model.

    held_out: the prompts of the held-out demonstrations. Raises UserError where no prompt is left.
    """
    selection = config.selection
    if selection.reward_model is None:
        return None
    selection.sampling.check()
    size = inputs.size("selection.reward_model")
    run.tokenizer.draw_below(size.vocab_size)
    limits = prompt_limits(
        {"policy": policy.size.context_length, "reward model": size.context_length},
        selection.sampling.max_new_tokens,
        max_prompt_tokens=config.data.max_prompt_tokens,
        prefix="selection.",
    )
    if selection.prompts is not None:
        skips = config.data.skip_bad_lines
        held_out, report = read_prompts(selection.prompts, inputs.renderer, skip_bad_lines=skips)
        run.count("selection.prompts", report)
    if not held_out:
        raise UserError(
            "no held-out prompts to select an epoch by: give --selection.prompts or --data.valid"
        )
    prompts, lengths = prompt_examples(
        list(dict.fromkeys(held_out))[: selection.num_prompts],
        run.tokenizer,
        max_prompt_length=limits.prompt.tokens,
    )
    limits.check(lengths, "held-out prompts to select an epoch by", cut="")
    reward_model = build_network("scalar", size, run.parallel, numerics=config.numerics)
    inputs.load("selection.reward_model", reward_model)  # the same for all epochs
    return EpochSelection(
        config=config, run=run, prompts=prompts, reward_model=reward_model, epochs=[]
    )


def best_epoch(epochs: list[dict[str, Any]]) -> dict[str, Any] | None:
    """Return the epoch of the highest reward, the earliest of equal ones; None where no reward is
    finite."""
    rewarded = [epoch for epoch in epochs if math.isfinite(epoch["reward"])]
    return max(rewarded, key=lambda epoch: epoch["reward"], default=None)


def epoch_name(epoch: int) -> str:
    """Return the name of the checkpoint of an epoch's end; epochs count from 1."""
    return f"epoch_{epoch:04d}"
