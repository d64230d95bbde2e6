"""What PPO holds out: prompts that it answers at times, and text, to learn nothing from.

The numbers are those of the policy behind an iteration's update, as a checkpoint there has it. A
held-out number is defined as the training metric of its name is.
"""

import math
from dataclasses import dataclass, field

from engine.alarms import Alarm
from engine.data.examples import Example
from engine.data.pretraining import TokenSequences
from engine.losses import mean_language_loss
from engine.residency.residency import Residency
from engine.rollout import generate_rollout
from engine.run import Run
from engine.score import score_rollout
from engine.settings.evaluation import is_evaluated
from engine.settings.ppo import PPOConfig
from engine.training.network import Network

_OTHER_DRAWS = 1_000_003  # added to the run's seed: no draw of training's is drawn here
# The numbers of the answers, and the metrics of a training rollout that they are.
_NAMES = {
    "valid/reward_mean": "score/reward_mean",
    "valid/kl": "score/kl",
    "valid/response_tokens": "rollout/response_tokens",
    "valid/eos_rate": "rollout/eos_rate",
}


@dataclass(kw_only=True)
class HeldOut:
    """What a run holds out, and who says how good the policy is on it.

    Draws are keyed alike each time, and by (seed, prompt, position) alone: no training number is
    another for having looked, and evaluations differ by the weights only.
    """

    config: PPOConfig
    run: Run
    residency: Residency
    networks: dict[str, Network]
    """By role: policy, reference, critic, reward_model."""
    prompts: list[Example]
    text: TokenSequences | None
    """Pretraining sequences."""
    _said: list[Alarm] = field(default_factory=list)

    def is_due(self, num_iterations: int) -> bool:
        """Return whether there are numbers to be had after so many iterations."""
        total, every = self.config.iterations, self.config.eval_every
        has_any = bool(self.prompts) or self.text is not None
        return has_any and is_evaluated(num_iterations, total, every)

    def numbers(self) -> dict[str, float]:
        """Return the held-out numbers of the policy as it is; all ranks call together, between an
        update and the next rollout.

        Where it draws from logits that are not finite, the answers' numbers are NaN, and said() has
        the reason: what is learned from decides whether the run goes on.
        """
        found = self._answered() if self.prompts else {}
        with self.residency.update():  # what trains is back, as a checkpoint wants it
            if self.text is not None:
                budget = self.config.micro_batch_tokens
                loss = mean_language_loss(self.networks["policy"], self.text, budget)
                found["valid/pretrain_loss"] = loss
        return found

    def said(self) -> list[Alarm]:
        """Return what was amiss since it was asked last."""
        said, self._said = self._said, []
        return said

    def _answered(self) -> dict[str, float]:
        """Return the numbers of one answer to each prompt."""
        with self.residency.rollout() as generator:
            try:
                rollout = generate_rollout(
                    generator,
                    self.prompts,
                    self.config.sampling,
                    eos_id=self.run.tokenizer.eos_id,
                    tokenizer=self.run.tokenizer,
                    seed=self.config.seed + _OTHER_DRAWS,
                    first_sample_index=0,
                )
            except FloatingPointError as error:  # on all ranks alike
                self._said.append(Alarm("held_out", f"held-out prompts are not answered: {error}"))
                return dict.fromkeys(_NAMES, math.nan)
        # The critic too, whose values nobody asks for: networks swap in pairs.
        with self.residency.score():
            scored = score_rollout(rollout, self.config, **self.networks)
        found = scored.metrics(rollout) | rollout.metrics(seconds=math.inf)
        return {name: found[source] for name, source in _NAMES.items()}


def load_held_out(
    config: PPOConfig,
    run: Run,
    residency: Residency,
    networks: dict[str, Network],
    prompts: list[Example],
) -> HeldOut:
    """Return what a run holds out: the prompts, and the text that its settings name."""
    data, text = config.data, None
    if data.pretraining_valid is not None:
        tokens = run.token_file(
            data.pretraining_valid, skip_bad_lines=data.skip_bad_lines, fields=data.fields
        )
        run.count("data.pretraining_valid", tokens.report)
        context = networks["policy"].size.context_length
        text = tokens.held_out(min(data.pretraining_tokens, context))
    return HeldOut(
        config=config,
        run=run,
        residency=residency,
        networks=networks,
        prompts=prompts,
        text=text,
    )
