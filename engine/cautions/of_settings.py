"""What a run's settings do badly, said before it does it: pure functions of numbers.

None of this is an error: each run would end, with a result that its user may not have wanted. A
stage asks once, at its start, and a resume says only what is new. Thresholds are our choice unless
a source is named. Each message has the number and the remedy.
"""

from collections.abc import Mapping

from engine.alarms import Alarm
from engine.cautions.of_data import Reading, repetition_cautions
from engine.data.limits import Limit
from engine.ranks.parallel import Parallel
from engine.settings.adam import AdamConfig
from engine.settings.evaluation import num_evaluations
from engine.settings.ppo import PPOConfig
from engine.settings.sampling import SamplingConfig
from engine.settings.saving import SaveConfig
from models.sizes import GPT3_CONTEXT_LENGTH, GPTSize

# Adam moves a weight by about lr a step, and GPT's begin with a deviation of 0.02 (GPT-2).
_MOST_LR = 0.02
# A matrix that reads d numbers moves what it gives by about lr x d a step. GPT-3 was pretrained at
# lr x d of 0.31 to 0.74, from 125M parameters on (Brown et al. 2020, Table 2.1); InstructGPT goes
# on from it at 0.02 to 0.06 (C.1 to C.4, E.9). Our choice: a third of the least that pretrains
# undoes what was learned. Smaller models than the table's know what minutes taught them, and are
# taught on at the same rates.
_MOST_MOVED = 0.1
_LEAST_PRETRAINED = 100e6  # parameters
_LEAST_PROMPT_SHARE = 1 / 8  # of the shortest context, of which GPT-3's 2,048 tokens count
_MOST_INIT_SHARE = 0.75  # of the averaged weights, that are still the policy's start
_MOST_UPDATES = 64  # optimizer steps on one rollout; the paper has 8 (C.4)
_FEW_HELD_OUT = 16  # prompts whose mean reward is known to a quarter of its spread
_MOST_EVALUATION = 1 / 4  # of a run's responses, that nothing is learned from


def schedule_cautions(
    option: str,
    adam: AdamConfig,
    num_steps: int,
    start: GPTSize | None = None,
    counted: str = "steps",
) -> list[Alarm]:
    """Return what is amiss with an optimizer's learning rate over a run of num_steps. start: the
    size of the trained network that is gone on from; None: it starts from nothing."""
    found, option = [], option.replace("_", "-")
    if adam.warmup >= num_steps:
        first = adam.warmup_start
        share = first + (1.0 - first) * (num_steps - 1) / adam.warmup
        found.append(
            Alarm(
                "warmup",
                f"--{option}.warmup {adam.warmup} outlasts the run of {num_steps} {counted}: the "
                f"learning rate ends at {share * adam.lr:.3g} and never reaches --{option}.lr "
                f"{adam.lr:g}; lower --{option}.warmup, or train longer",
            )
        )
    if adam.warmup and adam.warmup_start == 0.0:
        found.append(
            Alarm(
                "zero_lr",
                f"--{option}.warmup-start 0 gives the first of the {counted} a learning rate of "
                "0, and it teaches nothing; the paper starts at 0.1 (C.4)",
            )
        )
    if adam.lr > _MOST_LR:
        found.append(
            Alarm(
                "large_lr",
                f"--{option}.lr {adam.lr:g} moves each weight by about so much a step, where most "
                f"begin within {_MOST_LR}: the model will be lost; the paper's are below 1e-5",
            )
        )
    elif start is not None and start.num_parameters >= _LEAST_PRETRAINED:
        most = _MOST_MOVED / start.hidden_size
        if adam.lr > most:
            found.append(
                Alarm(
                    "large_lr",
                    f"--{option}.lr {adam.lr:g} is for a model that starts from nothing: this one "
                    f"is trained already, and of width {start.hidden_size}, where more than "
                    f"{most:.2g} undoes what it has learned; lower --{option}.lr, the paper goes "
                    "on at about 1e-5 (C.1 to C.4)",
                )
            )
    return found


def interval_cautions(saving: SaveConfig, eval_every: int | None, num_steps: int) -> list[Alarm]:
    """Return which of a run's intervals is longer than the run."""
    found = []
    if saving.save_every > num_steps:
        others = (
            "the only ones before it are those of --save-every-minutes "
            f"{saving.save_every_minutes:g}"
            if saving.save_every_minutes
            else "a run that is killed has none"
        )
        found.append(
            Alarm(
                "save_every",
                f"--save-every {saving.save_every} is beyond the run's {num_steps} steps: a "
                f"checkpoint is due at its end, and {others}; lower --save-every",
            )
        )
    elif not saving.save_every and not saving.save_every_minutes:
        found.append(
            Alarm(
                "no_saves",
                "--save-every 0 and --save-every-minutes 0 write a checkpoint at the end alone: a "
                "run that is killed has none; set one of them",
            )
        )
    if eval_every and eval_every > num_steps:
        found.append(
            Alarm(
                "eval_every",
                f"--eval-every {eval_every} is beyond the run's {num_steps} steps: held-out "
                "numbers come at its end alone, and make no curve; lower --eval-every",
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


def ppo_cautions(
    config: PPOConfig,
    parallel: Parallel,
    num_prompts: int,
    num_sequences: int,
    trained: Mapping[str, GPTSize],
) -> list[Alarm]:
    """Return what is amiss with the settings of a PPO run; num_sequences: of pretraining text, 0
    without any; trained: the sizes of what is trained, by the option of its optimizer."""
    found = []
    for option, size in trained.items():
        adam = getattr(config, option)
        found += schedule_cautions(option, adam, config.iterations, size, "iterations")
    found += interval_cautions(config.saving, config.eval_every, config.iterations)
    found += rank_cautions("--minibatch-size", config.minibatch_size, parallel.dp)
    found += rank_cautions("--rollout-batch-size", config.rollout_batch_size, parallel.num_replicas)
    found += _episode_cautions(config, num_prompts)
    if num_sequences:
        batch = config.ptx_examples_per_episode * config.minibatch_size
        taken = config.iterations * config.num_updates * min(batch, num_sequences)
        reading = Reading(num_sequences, batch, taken, "Lower --ptx-examples-per-episode")
        found += repetition_cautions({"pretraining sequences": reading})
    found += _sampling_cautions(config.sampling)
    if config.kl.coef == 0:
        found.append(
            Alarm(
                "kl_coef",
                "--kl.coef 0: nothing holds the policy near the reference, and it will find what "
                "the reward model pays for and no reader wants; the paper has 0.02 (C.4)",
            )
        )
    if config.num_updates > _MOST_UPDATES:
        found.append(
            Alarm(
                "many_updates",
                f"{config.num_updates} optimizer steps on each rollout (--ppo-epochs x "
                "--rollout-batch-size / --minibatch-size), the last of them far from the policy "
                "that drew it; the paper has 8 (C.4): raise --minibatch-size",
            )
        )
    share = config.ema_decay ** (config.iterations * config.num_updates)
    if share > _MOST_INIT_SHARE:
        found.append(
            Alarm(
                "average",
                f"--ema-decay {config.ema_decay:g} leaves the averaged weights {share:.0%} the "
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
                f"{num_prompts} prompts are fewer than --rollout-batch-size {batch}: each is "
                f"answered {batch / num_prompts:.3g} times in one iteration; lower it, or give "
                "more prompts",
            )
        )
    return found


def room_cautions(sampling: SamplingConfig, prompt: Limit, context_length: int) -> list[Alarm]:
    """Return whether prompts have little of the shortest context."""
    if prompt.tokens >= _LEAST_PROMPT_SHARE * min(context_length, GPT3_CONTEXT_LENGTH):
        return []
    return [
        Alarm(
            "prompt_room",
            f"prompts have at most {prompt}, beside --sampling.max-new-tokens "
            f"{sampling.max_new_tokens} in a context of {context_length}; longer ones are dropped: "
            "lower --sampling.max-new-tokens, or raise --data.max-prompt-tokens",
        )
    ]


def evaluation_cautions(config: PPOConfig, num_held_out: int) -> list[Alarm]:
    """Return whether PPO's held-out prompts are so few that they tell little, or so many that the
    run is spent on them; none is another caution's."""
    found = []
    if 0 < num_held_out < _FEW_HELD_OUT:
        found.append(
            Alarm(
                "few_held_out",
                f"{num_held_out} prompts are held out: their mean reward is known to "
                f"{num_held_out**-0.5:.0%} of its spread, and small changes are noise; give "
                "--data.valid, or raise --data.valid-fraction",
            )
        )
    times = num_evaluations(config.iterations, config.eval_every)
    num_answers = times * num_held_out
    share = num_answers / (num_answers + config.iterations * config.rollout_batch_size)
    if share > _MOST_EVALUATION:
        found.append(
            Alarm(
                "evaluation",
                f"{num_held_out} held-out prompts are answered {times} times: {share:.0%} of the "
                "run's responses, and nothing is learned from them; lower --data.num-valid, or "
                "raise --eval-every",
            )
        )
    return found


def _sampling_cautions(sampling: SamplingConfig) -> list[Alarm]:
    found = []
    if sampling.top_k == 1:
        found.append(
            Alarm(
                "greedy",
                "--sampling.top-k 1 draws the likeliest token each time: PPO has no other answers "
                "to compare; set it to 0",
            )
        )
    elif sampling.top_k or sampling.top_p < 1.0:
        found.append(
            Alarm(
                "cut_distribution",
                f"--sampling.top-k {sampling.top_k} and --sampling.top-p {sampling.top_p:g} draw "
                "from another distribution than the one whose log-probs are scored: the KL comes "
                "out wrong, often below 0; the paper draws from all of it (top_k 0, top_p 1)",
            )
        )
    if sampling.min_new_tokens >= sampling.max_new_tokens:
        found.append(
            Alarm(
                "no_end",
                f"--sampling.min-new-tokens {sampling.min_new_tokens} lets no response end before "
                f"--sampling.max-new-tokens {sampling.max_new_tokens}: none learns to end; lower "
                "it",
            )
        )
    return found
