"""A job checked before it is launched: layouts, shapes, batches, checkpoints and the plan, on one
process and without a GPU, data or a tokenizer. Of the models that are there it reads the sizes.

`recipes/ppo_175b.py --dry-run 512` builds every distinct rank that 512 GPUs would have
(engine/dry_run/distinct_ranks.py); without a number, those of the recipe's launch. It ends with
the plan of the run, or with the first thing that is wrong; where that is the layout, with those
that fit.
"""

import dataclasses
import math
import time

from engine.dry_run.distinct_ranks import Model, Rank, build_ranks, check_checkpoint, check_rank
from engine.errors import UserError
from engine.planning.hardware import Cluster, named_cluster
from engine.planning.plan import plan
from engine.planning.search import proposal_lines, search_layouts
from engine.planning.sizes import NetworkSize, Sizes, StageConfig, sizes_at
from engine.printable import say
from engine.settings.adam import AdamConfig
from engine.settings.ppo import PPOConfig
from engine.settings.rm import RMConfig
from engine.settings.sft import SFTConfig
from models.sizes import GPTSize, Kind

GPU_NAME = "h100"  # what the plan is made for; recipes/plan.py makes it for others


def dry_run(config: StageConfig, num_gpus: int | None = None, *, usual: int | None = None) -> None:
    """Check a stage on `num_gpus` GPUs and print its plan; raises UserError for what is wrong.

    Without a number it says which it takes: `usual`, the GPUs of the recipe's launch, where the
    layouts divide them, else the fewest.
    """
    start = time.monotonic()
    sizes = sizes_at(config)
    models = models_of(config, sizes)
    if num_gpus is None:
        num_gpus, reason = chosen_gpus(config, usual)
        name = "GPU" if num_gpus == 1 else "GPUs"
        say(f"checked on {num_gpus} {name}, {reason}\n")
    cluster = named_cluster(GPU_NAME, num_gpus)
    for model in models:
        try:
            model.layout.dp(num_gpus)
            model.layout.check(model.size)
        except UserError as error:
            raise UserError(f"{model}: {error}\n{_proposals(config, cluster, sizes)}") from None
    say("\n".join(check_batches(config, sizes, num_gpus)))
    ranks: dict[Model, list[Rank]] = {model: [] for model in models}
    for model, rank in build_ranks(models, num_gpus):
        check_rank(model, rank)
        ranks[model].append(rank)
    for model in models:
        check_checkpoint(model, ranks[model])
        say(_summary(model, ranks[model], num_gpus))
    say(f"every check passed, {time.monotonic() - start:.0f} s\n")
    planned = plan(config, cluster, sizes=sizes)
    say("\n".join(planned.lines()))
    if not planned.fits:
        raise UserError(
            f"the run does not fit {num_gpus} x {GPU_NAME}; recipes/plan.py plans for other GPUs\n"
            f"{_proposals(config, cluster, sizes)}"
        )


def chosen_gpus(config: StageConfig, usual: int | None) -> tuple[int, str]:
    """Return the GPUs that a dry run without a number checks on, and why, in words."""
    layouts = [config.layout]
    if isinstance(config, PPOConfig):
        layouts += [x for x in (config.critic_layout, config.generation_layout) if x is not None]
    fewest = math.lcm(*(layout.num_model_ranks for layout in layouts))
    if usual is not None and usual % fewest == 0:
        return (
            usual,
            "those of the launch in the recipe's first lines; --dry-run N for another number",
        )
    return fewest, "the fewest that its layouts take; --dry-run N for more"


def models_of(config: StageConfig, sizes: Sizes) -> list[Model]:
    """Return the networks of a stage, roles of one shape and layout as one; PPO's policy first."""
    if isinstance(config, SFTConfig):
        return [_model(config, "language", ("policy",), sizes.policy, config.adam)]
    if isinstance(config, RMConfig):
        return [_model(config, "scalar", ("reward model",), sizes.reward_model, config.adam)]
    scalar = ("critic", "reward model")
    models = [_model(config, "scalar", scalar, sizes.reward_model, config.critic_adam)]
    if sizes.reference is None:
        alike = ("policy", "reference")
        models.insert(0, _model(config, "language", alike, sizes.policy, config.adam))
    else:
        models.insert(0, _model(config, "language", ("policy",), sizes.policy, config.adam))
        models.append(_model(config, "language", ("reference",), sizes.reference, None))
    if config.generation_layout is not None:
        config.check_generation_layout()
        copy = dataclasses.replace(
            models[0], roles=("generation",), layout=config.generation_layout, adam=None
        )
        models.append(copy)
    return models


def check_batches(config: StageConfig, sizes: Sizes, num_gpus: int) -> list[str]:
    """Return how a step's batch falls on the ranks, in words; raises UserError where it does not.

    A run is laxer: it deals uneven batches, gives a long sequence a micro-batch of its own and
    drops long prompts. On many GPUs each of these is more likely a slip. A limit above the context
    of a model that is there is none: sizes of all kinds have the same recipe.
    """
    dp = config.layout.dp(num_gpus)
    if isinstance(config, PPOConfig):
        return _check_ppo_batches(config, sizes, num_gpus)
    data, trained = config.data, sizes.trained_network
    notes = _check_fits("--data.max-tokens", data.max_tokens, trained)
    if isinstance(config, SFTConfig) and config.data.pretraining_fraction > 0:
        notes += _check_fits("--data.pretraining-tokens", config.data.pretraining_tokens, trained)
    if data.max_prompt_tokens >= data.max_tokens:
        raise UserError(
            f"--data.max-prompt-tokens {data.max_prompt_tokens} leaves no room for a response in "
            f"--data.max-tokens {data.max_tokens}"
        )
    _check_shares("--batch-size", config.batch_size, dp)
    _check_budget(config.micro_batch_tokens, min(data.max_tokens, trained.size.context_length))
    items = "prompts with all their answers" if isinstance(config, RMConfig) else "sequences"
    return [
        f"batch: {config.batch_size} {items} a step, {config.batch_size // dp} a rank (dp {dp})",
        *notes,
    ]


def _proposals(config: StageConfig, cluster: Cluster, sizes: Sizes) -> str:
    """Return the layouts that fit, as options of the recipe."""
    found = search_layouts(config, cluster, sizes=sizes)
    head = f"what fits {cluster.num_gpus} x {cluster.gpu_name} by the plan, fastest first:"
    return "\n".join(
        [head, *proposal_lines(found, config)] if found else proposal_lines([], config)
    )


def _check_ppo_batches(config: PPOConfig, sizes: Sizes, num_gpus: int) -> list[str]:
    dp = config.layout.dp(num_gpus)
    config.sampling.check()
    longest = config.data.max_prompt_tokens + config.sampling.max_new_tokens
    readers = [each for each in (sizes.policy, sizes.reward_model, sizes.reference) if each]
    shortest = min(readers, key=lambda found: found.size.context_length)
    context, notes = shortest.size.context_length, []
    if longest > context and shortest.is_found and config.sampling.max_new_tokens < context:
        room = context - config.sampling.max_new_tokens
        notes.append(f"prompts over {room} tokens are dropped: the context has {context}")
        longest = context
    elif longest > context:
        raise UserError(
            f"--data.max-prompt-tokens {config.data.max_prompt_tokens} + --sampling.max-new-tokens "
            f"{config.sampling.max_new_tokens} = {longest} exceed the context of {context} tokens: "
            "lower one of them"
        )
    _check_shares("--minibatch-size", config.minibatch_size, dp)
    if config.critic_layout is not None:
        critic_dp = config.critic_layout.dp(num_gpus)
        _check_shares("--minibatch-size", config.minibatch_size, critic_dp, "the critic's dp")
    lines = [
        f"batch: {config.rollout_batch_size} episodes an iteration in {config.num_updates} updates "
        f"of {config.minibatch_size}, {config.minibatch_size // dp} a rank (dp {dp})"
    ]
    if config.ptx_coef > 0:
        notes += _check_fits(
            "--data.pretraining-tokens", config.data.pretraining_tokens, sizes.trained_network
        )
        longest = max(longest, min(config.data.pretraining_tokens, context))
        num_examples = config.ptx_examples_per_episode * config.minibatch_size
        lines.append(
            f"ptx: {num_examples} sequences of {config.data.pretraining_tokens} tokens an update, "
            f"{num_examples // dp} a rank"
        )
    _check_budget(config.micro_batch_tokens, longest)
    return lines + notes


def _check_shares(name: str, count: int, dp: int, dp_name: str = "dp") -> None:
    if count % dp:
        raise UserError(
            f"{name} {count} must be a multiple of {dp_name} {dp}: "
            "the data-parallel ranks' shares would be uneven"
        )


def _check_budget(micro_batch_tokens: int, longest: int) -> None:
    if micro_batch_tokens < longest:
        raise UserError(
            f"--micro-batch-tokens {micro_batch_tokens} must be at least {longest}, "
            "the tokens of the longest sequence"
        )


def _check_fits(name: str, num_tokens: int, found: NetworkSize) -> list[str]:
    """Return what is to be said of a number of tokens and the context, which a model that is there
    has as it is; raises UserError where the context was chosen too."""
    said = f"{name} {num_tokens} is more than the context of {found.size.context_length} tokens"
    if num_tokens <= found.size.context_length:
        return []
    if not found.is_found:
        raise UserError(said)
    return [f"{said}, which counts"]


def _model(
    config: StageConfig,
    kind: Kind,
    roles: tuple[str, ...],
    found: NetworkSize | None,
    adam: AdamConfig | None,
) -> Model:
    layout = config.layout
    if isinstance(config, PPOConfig) and kind == "scalar":
        layout = config.critic_layout or layout
    return Model(
        roles=roles,
        kind=kind,
        size=_size_of(found),
        layout=layout,
        numerics=config.numerics,
        adam=adam,
    )


def _size_of(found: NetworkSize | None) -> GPTSize:
    assert found is not None  # of every stage that has the network
    return found.size


def _summary(model: Model, ranks: list[Rank], num_gpus: int) -> str:
    """Say what was built of a model, in a line."""
    layout = model.layout
    counts = [rank.num_parameters for rank in ranks]
    return (
        f"{model}: {model.size.num_layers} layers of {model.size.hidden_size}; "
        f"{layout.described(layout.dp(num_gpus))}; "
        f"{len(ranks)} distinct ranks built, {max(counts) / 1e9:.3f} B parameters on the fullest"
    )
