"""generate(): responses of a language model to prompts, in the order in which they finish."""

import math
from collections import deque
from collections.abc import Callable, Iterator, Sequence

import numpy as np

from engine.data.tokenizer import Tokenizer
from engine.errors import UserError
from engine.generation.block_manager import BlockManager, Blocks
from engine.generation.cache import CacheShape, choose_cache
from engine.generation.decoding import decoding_of, lasting_decoding
from engine.generation.extents import ExtentManager
from engine.generation.runner import Flight, Runner
from engine.generation.scheduler import Counts, Scheduler
from engine.generation.sequence import LiveSequence, Response
from engine.ranks.device import choices_for
from engine.ranks.signs import come_further
from engine.settings.sampling import SamplingConfig
from engine.training.network import Network
from kernels.sample import check_sampling

TokenListener = Callable[[int, list[int]], None]


def generate(  # noqa: PLR0913 - the options of a call, each named
    network: Network,
    prompts: Sequence[np.ndarray],
    config: SamplingConfig,
    *,
    eos_id: int,
    seed: int,
    tokenizer: Tokenizer | None = None,
    sample_indices: Sequence[int] | None = None,
    max_new_tokens: Sequence[int] | None = None,
    on_tokens: TokenListener | None = None,
    counts: Counts | None = None,
) -> Iterator[Response]:
    """Yield one finished response to every prompt [n] of token ids, as they finish.

    The ranks of a replica (tp x pp) make the same call and get the same responses; each
    data-parallel replica has prompts of its own. A prompt that is repeated is computed once. A draw
    is keyed by (seed, sample index, position of the token in prompt and response): neither batch
    nor layout changes a response, up to rounding.
    tokenizer: its other ends stop a response too, and ids that it lacks are not drawn.
    sample_indices: unique in the run, 0 onwards by default. max_new_tokens: each prompt's own.
    on_tokens(sample index, tokens) hears of what is drawn. counts is added to. The network is in
    eval mode until the iterator ends.
    Raises UserError for a prompt that is empty or leaves no room in the context; RuntimeError for
    stale weights; FloatingPointError for logits that are not finite.
    """
    config.check()
    check_sampling(config.temperature, config.top_k, config.top_p, seed)
    if network.kind != "language":
        raise ValueError(f"a {network.kind} network generates nothing; it takes a language model")
    network.check_fresh()
    network.settle()
    limits = [config.max_new_tokens] * len(prompts) if max_new_tokens is None else max_new_tokens
    indices = range(len(prompts)) if sample_indices is None else sample_indices
    sequences = _live_sequences(prompts, indices, limits, network.size.context_length)
    if not sequences:
        return iter(())
    # As many cohorts in flight as there are stages, and none empty while there are sequences.
    num_cohorts = network.parallel.layout.pp
    slots_per_cohort = math.ceil(min(config.num_slots, len(sequences)) / num_cohorts)
    shape = choose_cache(
        network,
        config,
        num_sequences=slots_per_cohort * num_cohorts,
        max_length=max(sequence.max_length for sequence in sequences),
        granularity=decoding_of(network).memory.granularity,
    )
    stop_ids, absent_ids = _said_by(tokenizer, network, (eos_id, *config.stop_token_ids))
    scheduler = Scheduler(
        waiting=deque(sequences),
        blocks=_blocks_of(shape),
        slots_per_cohort=slots_per_cohort,
        prefill_tokens=config.prefill_tokens,
        steps_per_sync=_steps_per_sync(network, config),
        stop_ids=stop_ids,
        num_cohorts=num_cohorts,
        counts=counts or Counts(),
    )
    runner = Runner(network, config, shape, stop_ids=stop_ids, seed=seed, absent_ids=absent_ids)
    return _run(runner, scheduler, on_tokens or _nobody)


def _said_by(
    tokenizer: Tokenizer | None, network: Network, stop_ids: tuple[int, ...]
) -> tuple[frozenset[int], tuple[int, ...]]:
    """Return which ids stop a response, with these, and which are no token."""
    if tokenizer is None:
        return frozenset(stop_ids), ()
    stops = frozenset((*stop_ids, *tokenizer.also_stops))
    return stops, tokenizer.absent_ids(network.size.vocab_size)


def _blocks_of(shape: CacheShape) -> Blocks:
    """Return who gives out a cache's blocks."""
    if shape.extent_blocks:
        num_extents = shape.num_blocks // shape.extent_blocks
        return ExtentManager(num_extents, shape.extent_blocks, shape.block_size)
    return BlockManager(shape.num_blocks, shape.block_size)


def _steps_per_sync(network: Network, config: SamplingConfig) -> int:
    """Return how many decoding steps run before the host looks at what they drew."""
    if network.parallel.layout.pp > 1:  # a step's tokens travel between ranks before the next
        return 1
    return config.steps_per_sync or choices_for(network.parallel.device).steps_per_sync


def _nobody(sample_index: int, tokens: list[int]) -> None:
    """Hear of tokens where the caller did not ask to."""


def _live_sequences(
    prompts: Sequence[np.ndarray],
    sample_indices: Sequence[int],
    limits: Sequence[int],
    context_length: int,
) -> list[LiveSequence]:
    """Return the sequences in the order in which they are admitted."""
    if len(set(sample_indices)) != len(prompts):
        raise ValueError(f"{len(prompts)} prompts need as many different sample indices")
    sequences = [
        _live_sequence(index, prompt, limit, context_length)
        for index, prompt, limit in zip(sample_indices, prompts, limits, strict=True)
    ]
    # Long prompts first, for a short tail; equal ones side by side, to share their blocks.
    sequences.sort(key=lambda s: (-len(s.tokens), s.tokens, s.sample_index))
    return sequences


def _live_sequence(
    sample_index: int, prompt: np.ndarray, limit: int, context_length: int
) -> LiveSequence:
    if len(prompt) == 0:
        raise UserError(f"the prompt of sample {sample_index} is empty: nothing to continue")
    if len(prompt) >= context_length:
        raise UserError(
            f"the prompt of sample {sample_index} has {len(prompt)} tokens and leaves no room for "
            f"a response in the model's context of {context_length}: shorten or drop it"
        )
    if limit < 1:
        raise UserError(f"max_new_tokens of sample {sample_index} must be at least 1, got {limit}")
    return LiveSequence(
        sample_index=int(sample_index),
        tokens=[int(token) for token in prompt],
        prompt_length=len(prompt),
        max_length=min(len(prompt) + limit, context_length),
    )


def _run(runner: Runner, scheduler: Scheduler, on_tokens: TokenListener) -> Iterator[Response]:
    """Run rounds until every sequence has finished.

    A round takes one step of every cohort through all virtual stages. With as many cohorts as
    stages, a cohort's tokens are back at the first stage just when its turn comes again.
    """
    network = runner.network
    flights: list[Flight | None] = [None] * scheduler.num_cohorts
    kept = lasting_decoding(network)
    kept.enter(network)
    try:
        runner.open()
        while scheduler.has_work:
            come_further()
            for cohort, flight in enumerate(flights):
                if flight is not None:
                    try:
                        yield from _finish(flight, cohort, runner, scheduler, on_tokens)
                    except BaseException:  # the reader leaves, or logits were not finite
                        # What this round has launched goes its way to the end: the next stage has
                        # been sent its hidden states, and would find them in its next messages.
                        _proceed(flights[:cohort], runner)
                        raise
                step = scheduler.next_step(cohort)
                flights[cohort] = None if step is None else runner.launch(step)
            _proceed(flights, runner)
    finally:
        try:
            runner.drain(flights)
        finally:
            flights.clear()
            runner.close()
            kept.leave()


def _proceed(flights: Sequence[Flight | None], runner: Runner) -> None:
    """Take launched steps through the virtual stages behind the first."""
    for virtual_stage in range(1, len(runner.network.modules)):
        for flight in flights:
            if flight is not None:
                runner.proceed(flight, virtual_stage)


def _finish(
    flight: Flight,
    cohort: int,
    runner: Runner,
    scheduler: Scheduler,
    on_tokens: TokenListener,
) -> Iterator[Response]:
    """Wait for a step, and yield the responses that it has finished."""
    sampled = runner.collect(flight)
    for sequence, (tokens, _) in zip(flight.step.sampled, sampled, strict=True):
        on_tokens(sequence.sample_index, tokens)
    for sequence in scheduler.finish_step(cohort, flight.step, sampled):
        yield sequence.response(scheduler.stop_ids)
