"""What a run's settings do badly, said before it does it: pure functions of numbers.

None of this is an error: each run would end, with a result that its user may not have wanted. A
stage asks once, at its start, and a resume says only what is new. Thresholds are our choice unless
a source is named. Each message has the number and the remedy.
"""

from collections.abc import Collection, Mapping, Sequence
from typing import NamedTuple

from engine.alarms import Alarm
from engine.data.examples import LengthReport
from engine.data.jsonl import ReadReport
from engine.data.limits import Limit, Limits
from engine.settings.adam import AdamConfig
from engine.settings.ppo import PPOConfig
from engine.settings.sampling import SamplingConfig
from engine.settings.saving import SaveConfig

_MOST_DROPPED = 0.2  # share of the examples that too short a limit, or bad lines, may take
# Times that one thing is read, by what it is.
_MOST_READINGS = {
    "demonstrations": (20.0, "the paper reads them 16 times (C.1)"),
    "comparisons": (4.0, "the paper reads them once, and more overfits fast (C.2)"),
    "prompts": (20.0, "the paper's 256k episodes answer each of 31k prompts 8 times (C.4, A.3)"),
    "pretraining sequences": (16.0, "little is gained from there on (Muennighoff et al. 2023)"),
}
# Adam moves a weight by about lr a step, and GPT's begin with a deviation of 0.02 (GPT-2).
_MOST_LR = 0.02
_LEAST_PROMPT_SHARE = 1 / 8  # of the shortest context
_MOST_INIT_SHARE = 0.75  # of the averaged weights, that are still the policy's start
_MOST_UPDATES = 64  # optimizer steps on one rollout; the paper has 8 (C.4)
_MANY, _LONG = 10, 16  # so many responses of so many tokens are not of one length by chance
_MOST_CUT = 0.5  # share of the responses that may have exactly the longest one's tokens
_END_MARKS = ("<|endoftext|>", "<|im_end|>", "<|eot_id|>", "<|end_of_text|>", "</s>", "<eos>")


class Reading(NamedTuple):
    """How often a run reads what it trains on."""

    num_units: int
    """Different ones that there are."""
    batch_size: int
    """Those that a step is asked to take."""
    num_taken: float
    """Those that the whole run takes, counted again each time."""
    remedy: str
    """What makes it fewer."""


def schedule_cautions(
    option: str, adam: AdamConfig, num_steps: int, unit: str = "steps"
) -> list[Alarm]:
    """Return what is amiss with an optimizer's learning rate over a run of num_steps."""
    found = []
    if adam.warmup >= num_steps:
        start = adam.warmup_start
        share = start + (1.0 - start) * (num_steps - 1) / adam.warmup
        found.append(
            Alarm(
                "warmup",
                f"{option}.warmup {adam.warmup} outlasts the run of {num_steps} {unit}: the "
                f"learning rate ends at {share * adam.lr:.3g} and never reaches {option}.lr "
                f"{adam.lr:g}; lower {option}.warmup, or train longer",
            )
        )
    if adam.warmup and adam.warmup_start == 0.0:
        found.append(
            Alarm(
                "zero_lr",
                f"{option}.warmup_start 0 gives the first of the {unit} a learning rate of 0, and "
                "it teaches nothing; the paper starts at 0.1 (C.4)",
            )
        )
    if adam.lr > _MOST_LR:
        found.append(
            Alarm(
                "large_lr",
                f"{option}.lr {adam.lr:g} moves each weight by about so much a step, where most "
                f"begin within {_MOST_LR}: the model will be lost; the paper's are below 1e-5",
            )
        )
    return found


def interval_cautions(saving: SaveConfig, eval_every: int | None, num_steps: int) -> list[Alarm]:
    """Return which of a run's intervals is longer than the run."""
    found = []
    if saving.save_every > num_steps:
        others = (
            f"the only ones before it are those of save_every_minutes {saving.save_every_minutes:g}"
            if saving.save_every_minutes
            else "a run that is killed has none"
        )
        found.append(
            Alarm(
                "save_every",
                f"save_every {saving.save_every} is beyond the run's {num_steps} steps: a "
                f"checkpoint is due at its end, and {others}; lower save_every",
            )
        )
    elif not saving.save_every and not saving.save_every_minutes:
        found.append(
            Alarm(
                "no_saves",
                "save_every 0 and save_every_minutes 0 write a checkpoint at the end alone: a run "
                "that is killed has none; set one of them",
            )
        )
    if eval_every and eval_every > num_steps:
        found.append(
            Alarm(
                "eval_every",
                f"eval_every {eval_every} is beyond the run's {num_steps} steps: held-out numbers "
                "come at its end alone, and make no curve; lower eval_every",
            )
        )
    return found


def held_out_cautions(
    what: str, num_kept: int, num_dropped: int, *, path: object, fraction: float, num_all: int
) -> list[Alarm]:
    """Return what is amiss with a held-out part that has no example left.

    num_kept, num_dropped: held-out examples, and those that were too long. path: the file that was
    given, None where `fraction` of num_all records is held out.
    """
    if num_kept:
        return []
    if num_dropped:
        where = f"--data.valid {path}" if path is not None else f"data.valid_fraction {fraction:g}"
        problem = f"all {num_dropped} held-out {what} are too long ({where})"
    else:
        problem = f"no {what} are held out (data.valid_fraction {fraction:g} of {num_all})"
    return [
        Alarm(
            "held_out",
            f"{problem}: there will be no valid/ metric, and nothing tells learning from learning "
            "by heart; give --data.valid, or raise --data.valid-fraction",
        )
    ]


def no_held_out_text() -> list[Alarm]:
    """Return the caution of a run on text alone that holds out none."""
    return [
        Alarm(
            "held_out",
            "no pretraining text is held out: there will be no valid/ metric; give "
            "--data.pretraining-valid",
        )
    ]


def overlap_cautions(what: str, held_out: Sequence[str], trained: Collection[str]) -> list[Alarm]:
    """Return whether held-out prompts are trained on too; the held-out numbers are then too
    good."""
    seen = set(trained)
    num_seen = sum(prompt in seen for prompt in held_out)
    if not num_seen:
        return []
    return [
        Alarm(
            "overlap",
            f"{num_seen} of {len(held_out)} held-out {what} have a prompt that is trained on too: "
            "valid/ metrics are better than they should be; take them out of one of the files",
        )
    ]


def reading_cautions(
    what: str, report: ReadReport, lengths: LengthReport, limits: Limits
) -> list[Alarm]:
    """Return whether many of a file's lines or examples are left out, and why."""
    found = []
    num_lines = report.num_read + report.num_bad
    if report.num_bad > _MOST_DROPPED * num_lines:
        found.append(
            Alarm(
                "bad_lines",
                f"{report.num_bad} of {num_lines} lines of {what} "
                f"({report.num_bad / num_lines:.0%}) are bad and skipped, the first: "
                f"{report.first_errors[0]}; correct the file",
            )
        )
    num_all = len(lengths.kept) + lengths.num_dropped
    if lengths.num_dropped > _MOST_DROPPED * num_all:
        found.append(
            Alarm(
                "dropped",
                f"{lengths.num_dropped} of {num_all} {what} ({lengths.num_dropped / num_all:.0%}) "
                f"are too long and dropped: {limits.dropped(lengths)}; raise what limits them, or "
                "cut the texts",
            )
        )
    return found


def repetition_cautions(readings: Mapping[str, Reading]) -> list[Alarm]:
    """Return what is read very often, or is fewer than a batch; keys are those of
    _MOST_READINGS."""
    found = []
    for what, reading in readings.items():
        times, (most, source) = reading.num_taken / reading.num_units, _MOST_READINGS[what]
        if times > most:
            found.append(
                Alarm(
                    "repeated",
                    f"each of {reading.num_units} {what} is read {times:.3g} times: they are "
                    f"learned by heart; {source}. {reading.remedy}, or give more of them",
                )
            )
        if reading.num_units < reading.batch_size:
            found.append(
                Alarm(
                    "small_data",
                    f"{reading.num_units} {what} are fewer than a batch of {reading.batch_size}: "
                    "each step takes all of them once; lower the batch size, or give more",
                )
            )
    return found


def rank_cautions(option: str, size: int, num_ranks: int) -> list[Alarm]:
    """Return whether a batch of `size` leaves some of the ranks that share it without work."""
    if size >= num_ranks:
        return []
    return [
        Alarm(
            "idle_ranks",
            f"{option} {size} is shared by {num_ranks} data-parallel ranks: {num_ranks - size} of "
            f"them have nothing to do; raise {option}, or take fewer ranks",
        )
    ]


def response_cautions(what: str, texts: Sequence[str], lengths: Sequence[int]) -> list[Alarm]:
    """Return whether responses look cut, or spell out an end that is added anyway.

    texts: the responses; lengths: the tokens of those that are trained on.
    """
    found = []
    longest = max(lengths, default=0)
    num_longest = lengths.count(longest)
    is_long = len(lengths) >= _MANY and longest >= _LONG
    if is_long and num_longest > _MOST_CUT * len(lengths):
        found.append(
            Alarm(
                "equal_lengths",
                f"{num_longest} of {len(lengths)} {what} have exactly {longest} tokens, the "
                "most of all: were they cut? The model learns to end there; give whole texts",
            )
        )
    marked = [text.rstrip() for text in texts if text.rstrip().endswith(_END_MARKS)]
    if marked:
        mark = next(mark for mark in _END_MARKS if marked[0].endswith(mark))
        found.append(
            Alarm(
                "end_marks",
                f"{len(marked)} of {len(texts)} {what} end with an end of text that is spelled out "
                f"({mark}): it is read as words, and the end is added anyway; take it out",
            )
        )
    return found


def twin_cautions(rankings: Sequence[tuple[Sequence[str], Sequence[int]]]) -> list[Alarm]:
    """Return how many comparisons rank one text above itself; `rankings`: completions, ranks."""
    num_twins = sum(
        len(set(zip(texts, ranks, strict=True))) > len(set(texts)) for texts, ranks in rankings
    )
    if not num_twins:
        return []
    return [
        Alarm(
            "twins",
            f"{num_twins} of {len(rankings)} comparisons ({num_twins / len(rankings):.0%}) rank "
            "one text above itself, which no score can: give equal completions equal ranks",
        )
    ]


def ppo_cautions(config: PPOConfig, *, num_prompts: int, num_sequences: int) -> list[Alarm]:
    """Return what is amiss with the settings of a PPO run; num_sequences: of pretraining text, 0
    without any."""
    found = schedule_cautions("adam", config.adam, config.iterations, "iterations")
    found += schedule_cautions("critic_adam", config.critic_adam, config.iterations, "iterations")
    found += interval_cautions(config.saving, None, config.iterations)
    found += _episode_cautions(config, num_prompts)
    if num_sequences:
        batch = config.ptx_examples_per_episode * config.minibatch_size
        taken = config.iterations * config.num_updates * min(batch, num_sequences)
        reading = Reading(num_sequences, batch, taken, "Lower ptx_examples_per_episode")
        found += repetition_cautions({"pretraining sequences": reading})
    found += _sampling_cautions(config.sampling)
    if config.kl.coef == 0:
        found.append(
            Alarm(
                "kl_coef",
                "kl.coef 0: nothing holds the policy near the reference, and it will find what the "
                "reward model pays for and no reader wants; the paper has 0.02 (C.4)",
            )
        )
    if config.num_updates > _MOST_UPDATES:
        found.append(
            Alarm(
                "many_updates",
                f"{config.num_updates} optimizer steps on each rollout (ppo_epochs x "
                "rollout_batch_size / minibatch_size), the last of them far from the policy that "
                "drew it; the paper has 8 (C.4): raise minibatch_size",
            )
        )
    share = config.ema_decay ** (config.iterations * config.num_updates)
    if share > _MOST_INIT_SHARE:
        found.append(
            Alarm(
                "average",
                f"ema_decay {config.ema_decay:g} leaves the averaged weights {share:.0%} the "
                f"policy's start after {config.iterations * config.num_updates} optimizer steps: "
                "lower it, or take the policy and not its average (role ema)",
            )
        )
    return found


def _episode_cautions(config: PPOConfig, num_prompts: int) -> list[Alarm]:
    episodes, batch = config.iterations * config.rollout_batch_size, config.rollout_batch_size
    reading = Reading(num_prompts, 0, episodes, "Lower iterations")
    found = repetition_cautions({"prompts": reading})
    if num_prompts < batch:
        found.append(
            Alarm(
                "small_data",
                f"{num_prompts} prompts are fewer than rollout_batch_size {batch}: each is "
                f"answered {batch / num_prompts:.3g} times in one iteration; lower it, or give "
                "more prompts",
            )
        )
    return found


def room_cautions(sampling: SamplingConfig, prompt: Limit, context_length: int) -> list[Alarm]:
    """Return whether prompts have little of the shortest context."""
    if prompt.tokens >= _LEAST_PROMPT_SHARE * context_length:
        return []
    return [
        Alarm(
            "prompt_room",
            f"prompts have at most {prompt}, beside sampling.max_new_tokens "
            f"{sampling.max_new_tokens} in a context of {context_length}; longer ones are dropped: "
            "lower max_new_tokens, or raise data.max_prompt_tokens",
        )
    ]


def _sampling_cautions(sampling: SamplingConfig) -> list[Alarm]:
    found = []
    if sampling.top_k == 1:
        found.append(
            Alarm(
                "greedy",
                "sampling.top_k 1 draws the likeliest token each time: PPO has no other answers to "
                "compare; set it to 0",
            )
        )
    elif sampling.top_k or sampling.top_p < 1.0:
        found.append(
            Alarm(
                "cut_distribution",
                f"sampling.top_k {sampling.top_k} and sampling.top_p {sampling.top_p:g} draw from "
                "another distribution than the one whose log-probs are scored: the KL comes out "
                "wrong, often below 0; the paper draws from all of it (top_k 0, top_p 1)",
            )
        )
    if sampling.min_new_tokens >= sampling.max_new_tokens:
        found.append(
            Alarm(
                "no_end",
                f"sampling.min_new_tokens {sampling.min_new_tokens} lets no response end before "
                f"max_new_tokens {sampling.max_new_tokens}: none learns to end; lower it",
            )
        )
    return found
