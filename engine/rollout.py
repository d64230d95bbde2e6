"""Phase 2 of PPO, rollout: one response to each of a batch of prompts.

Index convention, everywhere in Trident: position t of log-probs, values, rewards, advantages,
returns and response_mask belongs to the token at t, which was chosen in the state before it.
"""

from collections.abc import Callable, Mapping, Sequence
from dataclasses import dataclass, replace

import numpy as np
import torch
import torch.distributed as dist
from torch import Tensor

from engine.alarms import Alarm
from engine.cautions.of_data import held_out_cautions, overlap_cautions, reading_cautions
from engine.cautions.of_prompts import prompt_cautions
from engine.cautions.of_settings import evaluation_cautions, room_cautions
from engine.data.batches import deal, spread
from engine.data.examples import Example, LengthReport
from engine.data.limits import prompt_limits
from engine.data.prompt_format import Prompt
from engine.data.prompts import hold_out_prompts, prompt_examples, read_prompts
from engine.data.renderer import Renderer
from engine.data.tokenizer import Tokenizer
from engine.generation.generate import Response, generate
from engine.run import Run
from engine.settings.ppo import PPOConfig
from engine.settings.sampling import SamplingConfig
from engine.shapes.fields import reading_options
from engine.training.network import Network


@dataclass(frozen=True, kw_only=True, eq=False)
class Rollout:
    """One iteration's responses of all data-parallel ranks, in prompt order, the same on every
    rank.

    B responses, T tokens of prompts and responses together, packed. Tokens are on the host, where
    batches are packed from them; tensors are on the rank's device. All of an iteration is a few
    megabytes, so every rank holds it: global statistics need no further collective, and any rank
    can train on any response.
    """

    examples: list[Example]
    """[B] on the host: prompt and response, what batches are packed from."""
    cu_seqlens: Tensor
    """[B+1] int32."""
    response_mask: Tensor
    """[T] bool: the token was sampled."""
    sampled_logprobs: Tensor
    """[T] of the sampler, 0 in prompts."""
    has_eos: Tensor
    """[B] bool: the response ended by itself and not at the length limit."""
    spread: float = 1.0
    """How unevenly the replicas shared the generated tokens: the most over the mean; 1 is even."""

    def __len__(self) -> int:
        return len(self.examples)

    @property
    def num_tokens(self) -> int:
        """T."""
        return len(self.response_mask)

    @property
    def response_lengths(self) -> list[int]:
        """Tokens of every response."""
        return [len(e.tokens) - e.prompt_length for e in self.examples]

    def carrying(self, columns: Mapping[str, Tensor]) -> list[Example]:
        """Return the responses as examples that carry columns [T], each its own tokens' numbers."""
        arrays = {name: column.cpu().numpy() for name, column in columns.items()}  # sync
        bounds = np.cumsum([0] + [len(e.tokens) for e in self.examples])
        return [
            replace(example, fields={name: array[start:end] for name, array in arrays.items()})
            for example, start, end in zip(self.examples, bounds[:-1], bounds[1:], strict=True)
        ]

    def prompts(self, tokenizer: Tokenizer, count: int | None = None) -> list[str]:
        """Return the first `count` prompts as text; None: all."""
        return [
            tokenizer.decode(e.tokens[: e.prompt_length].tolist()) for e in self.examples[:count]
        ]

    def responses(self, tokenizer: Tokenizer, count: int | None = None) -> list[str]:
        """Return the first `count` responses as text; None: all."""
        return [
            tokenizer.decode(e.tokens[e.prompt_length :].tolist()) for e in self.examples[:count]
        ]

    def metrics(self, seconds: float) -> dict[str, float]:
        """Return the phase's numbers over the global batch; seconds: of the phase."""
        count = float(self.response_mask.sum())  # sync
        return {
            "rollout/tokens_per_s": count / seconds,
            "rollout/response_tokens": count / len(self),
            "rollout/prompt_tokens": sum(e.prompt_length for e in self.examples) / len(self),
            "rollout/eos_rate": float(self.has_eos.double().mean()),
            "rollout/length_spread": self.spread,
        }


@dataclass(frozen=True, kw_only=True)
class Prompts:
    """The prompts of a run that leave room for a whole response."""

    train: list[Example]
    valid: list[Example]
    """Held out: no two of one text, and none of a training prompt's unless a file has it."""
    notes: list[str]
    """What reading the files is to be told about."""
    cautions: list[Alarm]
    """What is amiss with what was read."""


def load_prompts(
    config: PPOConfig, run: Run, renderer: Renderer, contexts: Mapping[str, int]
) -> Prompts:
    """Read the training prompts and the held-out ones.

    contexts: tokens by network, each of which reads prompts and responses. Raises UserError where
    no training prompt is left.
    """
    data = config.data
    limits = prompt_limits(
        contexts, config.sampling.max_new_tokens, max_prompt_tokens=data.max_prompt_tokens
    )
    options = reading_options(data)
    asked, report = read_prompts(data.prompts, renderer, **options)
    run.count("data.prompts", report)
    notes, num_read = report.notes(data.prompts), len(asked)
    if data.valid is None:
        asked, held_out = hold_out_prompts(
            asked, data.valid_fraction, config.seed, most=data.num_valid
        )
    else:
        read, valid_report = read_prompts(data.valid, renderer, **options)
        run.count("data.valid", valid_report)
        held_out = _distinct(read, data.num_valid, run)
        notes += valid_report.notes(data.valid, f", {len(held_out)} to be answered")

    def encode(name: str, chosen: list[Prompt]) -> tuple[list[Example], LengthReport]:
        examples, lengths = prompt_examples(
            chosen, run.tokenizer, max_prompt_length=limits.prompt.tokens, too_long=data.too_long
        )
        if chosen:
            file = "data.valid" if name == "valid" and data.valid else "data.prompts"
            run.count(file, lengths, part=name, limits=limits)
            notes.append(f"prompts ({name}): {limits.described(lengths)}")
        return examples, lengths

    prompts, lengths = encode("train", asked)
    limits.check(lengths, f"--data.prompts {data.prompts}")
    valid, valid_lengths = encode("valid", held_out)
    renderer.note(asked)
    cautions = [
        *reading_cautions("prompts", report, lengths, limits),
        *room_cautions(config.sampling, limits.prompt, min(contexts.values())),
        *held_out_cautions(
            "prompts",
            len(valid),
            valid_lengths.num_dropped,
            path=data.valid,
            fraction=data.valid_fraction,
            num_all=num_read,
        ),
        *overlap_cautions("examples", [p.key for p in held_out], {p.key for p in asked}),
        *prompt_cautions(renderer, asked),
        *evaluation_cautions(config, len(valid)),
    ]
    return Prompts(train=prompts, valid=valid, notes=notes, cautions=cautions)


def _distinct(prompts: list[Prompt], most: int, run: Run) -> list[Prompt]:
    """Return the first distinct prompts of a file of held-out ones, and note what is left out."""
    distinct = list(dict.fromkeys(prompts))
    run.account.leave_out("data.valid", len(prompts) - len(distinct), "the same prompt again")
    run.account.leave_out("data.valid", len(distinct) - most, "beyond --data.num-valid")
    return distinct[:most]


def generate_rollout(  # noqa: PLR0913 - what a draw is keyed by, each named
    policy: Network,
    prompts: Sequence[Example],
    sampling: SamplingConfig,
    *,
    eos_id: int,
    seed: int,
    first_sample_index: int,
    tokenizer: Tokenizer | None = None,
    on_response: Callable[[], None] | None = None,
) -> Rollout:
    """Sample one response to each prompt, data-parallel ranks sharing the prompts, and gather all
    of them.

    Draw i is keyed by (seed, first_sample_index + i, position): a resume or another layout samples
    the same. tokenizer as in generate(). on_response() hears of each response that this rank has
    finished. FloatingPointError, on all ranks alike, where logits of any are not finite.
    """
    parallel = policy.parallel
    # Generation has whole sequences on a rank: those that share rows in training take prompts each.
    lengths = [len(p.tokens) for p in prompts]
    mine = deal(lengths, parallel.num_replicas)[parallel.replica_rank]
    responses: list[Response] = []
    broken = ""
    try:
        for response in generate(
            policy,
            [prompts[i].tokens for i in mine],
            sampling,
            eos_id=eos_id,
            tokenizer=tokenizer,
            seed=seed,
            sample_indices=[first_sample_index + i for i in mine],
        ):
            responses.append(response)
            if on_response is not None:
                on_response()
    except FloatingPointError as error:  # which the other replicas are to hear of
        broken = str(error)
    told: list[tuple[str, list[Response]]] = [("", [])] * parallel.num_replicas
    dist.all_gather_object(told, (broken, responses), group=parallel.replica_group)
    if any(message for message, _ in told):
        raise FloatingPointError(next(message for message, _ in told if message))
    gathered = [part for _, part in told]
    by_index = {r.sample_index - first_sample_index: r for part in gathered for r in part}
    return join_responses(
        prompts,
        [by_index[i] for i in range(len(prompts))],
        parallel.device,
        spread=spread([sum(len(r.tokens) for r in part) for part in gathered]),
    )


def join_responses(
    prompts: Sequence[Example],
    responses: Sequence[Response],
    device: torch.device,
    *,
    spread: float = 1.0,
) -> Rollout:
    """Return the rollout of prompts and their responses, laid end to end on the device."""
    examples = [
        Example(
            tokens=np.concatenate([prompt.tokens, response.tokens]),
            prompt_length=len(prompt.tokens),
        )
        for prompt, response in zip(prompts, responses, strict=True)
    ]
    lengths = np.array([len(e.tokens) for e in examples])
    prompt_lengths = np.array([e.prompt_length for e in examples])
    positions = np.concatenate([np.arange(n) for n in lengths])
    response_mask = positions >= np.repeat(prompt_lengths, lengths)
    sampled = np.zeros(len(positions), dtype=np.float32)
    sampled[response_mask] = np.concatenate([r.logprobs for r in responses])
    cu_seqlens = np.concatenate([[0], np.cumsum(lengths)]).astype(np.int32)
    return Rollout(
        examples=examples,
        cu_seqlens=torch.from_numpy(cu_seqlens).to(device),
        response_mask=torch.from_numpy(response_mask).to(device),
        sampled_logprobs=torch.from_numpy(sampled).to(device),
        has_eos=torch.tensor([r.has_eos for r in responses], device=device),
        spread=spread,
    )
