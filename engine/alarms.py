"""Checks on the numbers of a step or a PPO iteration that name the likely bug and not only the
symptom.

Thresholds are our choice: wide enough that a sound run stays silent, narrow enough that each bug
which a message names trips one within a few iterations. The tests plant those bugs.
"""

import math
from collections.abc import Iterable, Iterator, Mapping
from typing import Any, Literal, NamedTuple

from engine.settings.alarms import AlarmConfig, LossAlarmConfig

# What rounding alone explains. One model and one set of weights serve generation and scoring; what
# is left is that other batches have their sums taken in another order. Every layer then rounds the
# residual stream anew, each time by up to u of its size, and the errors of L layers add up like
# independent ones: sqrt(L) u. The mean |difference| of log-probs was 0.2 to 1.7 sqrt(L) u nats for
# random networks of 3 to 48 layers, widths 256 and 768, and logits with deviations of 1 to 4; the
# largest |ratio - 1| of 800 to 13,000 tokens 2 to 8 sqrt(L) u. Measured on a CPU, in bf16 and fp16;
# a GPU, whose kernels round in other places, has yet to be measured.
_ROUNDING = {"fp32": 2.0**-24, "fp16": 2.0**-11, "bf16": 2.0**-8}
_MISMATCH = 4.0  # sqrt(L) u
_RATIO_ERROR = 40.0  # sqrt(L) u
# In fp32 sums of many terms are less exact than u.
_LEAST_MISMATCH = 1e-4
_LEAST_RATIO_ERROR = 1e-3

# Steps in a row that fp16 may skip to find its loss scale, our choice: 2^16 has become 2^7 by then,
# and a network whose gradients want less learns nothing.
_SEARCH = 10
_LEAST_RISE = 0.5  # nats, of a loss above its mean; our choice: of one near 0 any factor is noise
_NO_SPREAD = 1e-3  # of scores; our choice: a head that has just been drawn spreads them by 1
_ZEROS = 3  # gradients of 0 in a row; our choice: one may be a batch without a target

_MESSAGES = {
    "non_finite": (
        "{value} not finite: look at the first of them in the order of the phases, and at what "
        "feeds it (learning rate, loss scale, an empty mask divided by its count)"
    ),
    "non_finite_grad_norm": (
        "{value} not finite, again and again, in steps that were skipped: look at the learning "
        "rate and at the largest logits"
    ),
    "logprob_mismatch": (
        "generation and scoring differ by {value:.2g} nats a token in the mean, where rounding "
        "explains {limit:.2g}: stale weights after an update, another temperature, positions that "
        "do not start at 0, or a token masked in one of the two only"
    ),
    "first_ratio": (
        "a ratio in the first minibatch of the first epoch is {value:.2g} away from 1, where "
        "rounding explains {limit:.2g}: old log-probs are of other weights (stale ones that "
        "generated?), of other tokens (shifted by one?) or at another temperature, or dropout is on"
    ),
    "pad_leak": (
        "rewards, advantages or returns reach {value:.2g} outside response_mask: the reverse scan "
        "runs across a sequence's end, or whitening moved the masked positions"
    ),
    "negative_kl": (
        "KL to the reference is {value:.2g} nats a response and stays below zero, which no KL "
        "can: responses come from another distribution than the one scored (top-k, top-p, "
        "temperature, a suppressed end token), or policy and reference are swapped"
    ),
    "large_kl": (
        "KL to the reference is {value:.3g} nats a response, above {limit:g}: the policy games "
        "the reward model; raise kl_coef, lower the learning rate, check that the reference is "
        "the init policy"
    ),
    "eos_rate": (
        "only {value:.0%} of responses end by themselves: demonstrations lack the end token or "
        "mask it in their loss, the length limit is too short, or the missing-EOS rule is too "
        "weak"
    ),
    "length_drift": (
        "responses have {value:.0f} tokens, {limit:.0f} in the first iteration: the reward model "
        "pays for length (or against it), or the score is added to more than the last token"
    ),
    "clip_fraction": (
        "{value:.0%} of the ratios are clipped: the policy's learning rate or --ppo-epochs is too "
        "high, or advantages are not whitened"
    ),
    "skipped_steps": (
        "{value}: optimizer steps were skipped again and again, and nothing is learned in them; in "
        "fp16 the loss scale is still looked for, and one that falls on means gradients too large "
        "at any scale: lower the learning rate, or use bf16"
    ),
    "zero_gradient": (
        "{value} is exactly 0 again and again: nothing is learned; no token is a target (prompts "
        "as long as the limit?), all rewards or comparisons are alike, or fp16 rounds all to 0"
    ),
    "reward_spread": (
        "all responses have one reward ({limit:.4g}, spread {value:.2g}): the reward model is "
        "constant, or sees nothing of the responses, and only the KL penalty is learned from"
    ),
    "reward_scale": (
        "rewards reach {value:.3g}, beyond {limit:g}: the KL penalty is nothing beside them, and "
        "the value loss is their square; was the reward model's bias shifted to 0 on "
        "demonstrations, and its training sound?"
    ),
    "loss_rise": (
        "{value}, after a mean of {limit:.3g}, for many steps: training diverges; lower the "
        "learning rate, or go back to a checkpoint of before"
    ),
    "large_norm": (
        "the gradient's norm is {value:.3g} in one step after the other, where {limit:.3g} is "
        "what clipping is meant for: every step has one length; look at the learning rate, the "
        "loss scale and the largest weights"
    ),
    "chance": (
        "{value:.1%} of pairs are in the right order on average, and chance is 50%: the ranks "
        "contradict the texts or one another, answers were cut to the same tokens, or the "
        "learning rate is too low or far too high"
    ),
    "score_spread": (
        "all answers have one score (spread {value:.2g}), the loss stays at ln 2 = 0.693: the "
        "head or its input has collapsed; start from another checkpoint, lower the learning rate"
    ),
    "score_scale": (
        "scores reach {value:.3g}, beyond {limit:g}: lower the learning rate; PPO would see "
        "nothing but them"
    ),
    "value_loss": (
        "value loss is {value:.3g} after a mean of {limit:.3g}: the critic's learning rate is too "
        "high, the reward's scale has jumped, or returns were whitened with the advantages"
    ),
}


class Alarm(NamedTuple):
    """A condition that does not hold: its name, and the likely bug with where to look."""

    name: str
    message: str


_Condition = tuple[str, bool, int, Any, float]
"""(name, is_wrong, patience, value, limit)."""


def _raised(streaks: dict[str, int], conditions: Iterable[_Condition]) -> list[Alarm]:
    """Count on how long each condition has lasted, and return the alarms that are due."""
    alarms = []
    for name, is_wrong, patience, value, limit in conditions:
        streaks[name] = streaks.get(name, 0) + 1 if is_wrong else 0
        if is_wrong and streaks[name] % patience == 0:
            alarms.append(Alarm(name, _MESSAGES[name].format(value=value, limit=limit)))
    return alarms


class Alarms:
    """Reads one iteration's metrics after another: `alarms.check(metrics)`.

    The state (how long each condition has lasted, the first length, the running value loss) belongs
    in the checkpoint; state_dict() is plain JSON.
    """

    def __init__(
        self, config: AlarmConfig, *, dtype: Literal["fp32", "fp16", "bf16"], num_layers: int
    ) -> None:
        """`dtype` of weights and activations and the layers of the policy set how exact log-probs
        can be."""
        self._config = config
        self._searches_scale = dtype == "fp16"
        rounding = _ROUNDING[dtype] * math.sqrt(num_layers)
        self._max_mismatch = max(_MISMATCH * rounding, _LEAST_MISMATCH)
        self._max_ratio_error = max(_RATIO_ERROR * rounding, _LEAST_RATIO_ERROR)
        self._streaks: dict[str, int] = {}  # iterations in a row, by condition
        self._first_length: float | None = None  # tokens
        self._value_loss: float | None = None  # running mean
        self._skipped: dict[str, float] = {}  # steps so far, by metric

    def check(self, metrics: Mapping[str, float]) -> list[Alarm]:
        """Return the alarms of an iteration; a condition whose key is absent is not checked.

        A condition with patience n is reported at its n-th, 2n-th, ... iteration in a row.
        """
        # A NaN would compare as False below: it has an alarm of its own and no other.
        finite = {key: value for key, value in metrics.items() if math.isfinite(value)}
        alarms = _raised(self._streaks, self._conditions(metrics, finite))
        self._remember(finite)
        return alarms

    def state_dict(self) -> dict[str, Any]:
        """Return what the next check depends on."""
        return {
            "streaks": dict(self._streaks),
            "first_length": self._first_length,
            "value_loss": self._value_loss,
            "skipped": dict(self._skipped),
        }

    def load_state_dict(self, state: Mapping[str, Any]) -> None:
        """Continue where state_dict() was taken."""
        self._streaks = dict(state["streaks"])
        self._first_length = state["first_length"]
        self._value_loss = state["value_loss"]
        self._skipped = dict(state.get("skipped", {}))

    def _conditions(
        self, metrics: Mapping[str, float], finite: Mapping[str, float]
    ) -> Iterator[_Condition]:
        """Yield every condition that can be checked."""
        yield from self._conditions_of_rewards(finite)
        config, patience = self._config, self._config.patience
        bad = [key for key in metrics if key not in finite]
        # An infinite gradient norm is how fp16 finds its loss scale; what is more than that ends
        # the run (engine/training/skipped.py).
        norms = [key for key in bad if key.endswith("grad_norm")]
        others = [key for key in bad if key not in norms]
        yield "non_finite", bool(others), 1, ", ".join(others), 0.0
        is_wrong = bool(norms) and not self._searches_scale
        yield "non_finite_grad_norm", is_wrong, patience, ", ".join(norms), 0.0

        # These hold in every iteration, whatever is learned; a break is a bug.
        if (value := finite.get("score/logprob_mismatch_mean")) is not None:
            limit = self._max_mismatch
            yield "logprob_mismatch", value > limit, 1, value, limit
        if (value := finite.get("update/first_ratio_error")) is not None:
            limit = self._max_ratio_error
            yield "first_ratio", value > limit, 1, value, limit
        if (value := finite.get("advantage/pad_leak")) is not None:
            yield "pad_leak", value != 0.0, 1, value, 0.0

        # These a sound run keeps, and a poor setting or a subtle bug breaks.
        if (value := finite.get("score/kl")) is not None:
            yield "negative_kl", value < config.min_kl, patience, value, config.min_kl
            yield "large_kl", value > config.max_kl, patience, value, config.max_kl
        if (value := finite.get("rollout/eos_rate")) is not None:
            limit = config.min_eos_rate
            yield "eos_rate", value < limit, patience, value, limit
        value, first = finite.get("rollout/response_tokens"), self._first_length
        if value is not None and first is not None:
            drift = max(value, first) / max(min(value, first), 1.0)
            yield "length_drift", drift > config.max_length_drift, patience, value, first
        if (value := finite.get("update/clip_fraction")) is not None:
            limit = config.max_clip_fraction
            yield "clip_fraction", value > limit, patience, value, limit
        value, mean = finite.get("update/value_loss"), self._value_loss
        if value is not None and mean is not None:
            yield "value_loss", value > config.value_loss_factor * mean, 1, value, mean

    def _conditions_of_rewards(self, finite: Mapping[str, float]) -> Iterator[_Condition]:
        """Yield those of what there is to learn from, and whether it is learned."""
        config, patience = self._config, self._config.patience
        mean, spread = finite.get("score/reward_mean"), finite.get("score/reward_std")
        if mean is not None and spread is not None:
            # Of equal numbers rounding alone leaves a spread.
            is_one = spread <= 1e-6 * abs(mean)
            yield "reward_spread", is_one, patience, spread, mean
            size = max(abs(mean), spread)
            yield "reward_scale", size > config.max_reward, patience, size, config.max_reward
        norms = ("update/policy_grad_norm", "update/critic_grad_norm")
        zeros = [name for name in norms if finite.get(name) == 0.0]
        yield "zero_gradient", bool(zeros), patience, ", ".join(zeros), 0.0
        counts = ("update/policy_skipped_steps", "update/critic_skipped_steps")
        risen = [name for name in counts if finite.get(name, 0.0) > self._skipped.get(name, 0.0)]
        self._skipped |= {name: finite[name] for name in counts if name in finite}
        yield "skipped_steps", bool(risen), patience, ", ".join(risen), 0.0

    def _remember(self, finite: Mapping[str, float]) -> None:
        if self._first_length is None:
            self._first_length = finite.get("rollout/response_tokens")
        loss = finite.get("update/value_loss")
        if loss is not None:
            mean = loss if self._value_loss is None else self._value_loss
            self._value_loss = 0.9 * mean + 0.1 * loss


class LossAlarms:
    """Reads one step's metrics after another, of SFT, pretraining or the reward model.

    The state (how long each condition has lasted, running means, steps skipped so far) belongs in
    the checkpoint; state_dict() is plain JSON.
    """

    def __init__(self, config: LossAlarmConfig, *, clip_norm: float) -> None:
        """clip_norm: the optimizer's."""
        self._config = config
        self._max_norm = config.max_norm_factor * clip_norm
        self._streaks: dict[str, int] = {}  # steps in a row, by condition
        self._means: dict[str, float] = {}  # running, by metric
        self._num_skipped = 0.0

    def check(self, metrics: Mapping[str, float]) -> list[Alarm]:
        """Return the alarms of a step; a condition whose key is absent is not checked."""
        was_skipped = metrics.get("train/skipped_steps", 0.0) > self._num_skipped
        self._num_skipped = metrics.get("train/skipped_steps", 0.0)
        finite = {key: value for key, value in metrics.items() if math.isfinite(value)}
        if was_skipped:  # its numbers are those of a step that is said on its own
            finite = {key: value for key, value in finite.items() if not key.startswith("train/")}
        conditions = [
            *self._of_all(metrics, finite, was_skipped),
            *self._of_losses(finite),
            *self._of_scores(finite),
        ]
        return _raised(self._streaks, conditions)

    def state_dict(self) -> dict[str, Any]:
        """Return what the next check depends on."""
        return {
            "streaks": dict(self._streaks),
            "means": dict(self._means),
            "num_skipped": self._num_skipped,
        }

    def load_state_dict(self, state: Mapping[str, Any]) -> None:
        """Continue where state_dict() was taken; anew where a checkpoint has none."""
        self._streaks = dict(state.get("streaks", {}))
        self._means = dict(state.get("means", {}))
        self._num_skipped = state.get("num_skipped", 0.0)

    def _of_all(
        self, metrics: Mapping[str, float], finite: Mapping[str, float], was_skipped: bool
    ) -> Iterator[_Condition]:
        bad = [key for key, value in metrics.items() if not math.isfinite(value)]
        bad = [key for key in bad if not (was_skipped and key.startswith("train/"))]
        yield "non_finite", bool(bad), 1, ", ".join(bad), 0.0
        yield "skipped_steps", was_skipped, _SEARCH, "train/skipped_steps", 0.0
        norm = finite.get("train/grad_norm")
        if norm is not None:
            yield "zero_gradient", norm == 0.0, _ZEROS, "train/grad_norm", 0.0
            limit = self._max_norm
            yield "large_norm", norm > limit, self._config.patience, norm, limit

    def _of_losses(self, finite: Mapping[str, float]) -> Iterator[_Condition]:
        risen, usual = [], 0.0
        for key in ("train/loss", "train/pretrain_loss"):
            value = finite.get(key)
            if value is None:
                continue
            mean = self._means.get(key, value)
            if value > max(self._config.loss_factor * mean, mean + _LEAST_RISE):
                risen.append(f"{key} is {value:.3g}")
                usual = mean
            self._means[key] = 0.99 * mean + 0.01 * value
        yield "loss_rise", bool(risen), self._config.patience, ", ".join(risen), usual

    def _of_scores(self, finite: Mapping[str, float]) -> Iterator[_Condition]:
        config = self._config
        accuracy, spread = finite.get("train/pair_accuracy"), finite.get("train/score_std")
        if accuracy is None or spread is None:
            return
        mean = self._means.get("train/pair_accuracy", accuracy)
        mean = self._means["train/pair_accuracy"] = 0.9 * mean + 0.1 * accuracy
        limit = config.min_pair_accuracy
        yield "chance", mean < limit, config.chance_patience, mean, limit
        yield "score_spread", spread < _NO_SPREAD, config.patience, spread, _NO_SPREAD
        size = max(abs(finite.get("train/score_mean", 0.0)), spread)
        yield "score_scale", size > config.max_score, config.patience, size, config.max_score
