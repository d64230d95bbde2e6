"""How the next token is drawn from logits that tensor-parallel ranks share."""

from dataclasses import dataclass

import torch
import torch.distributed as dist
from torch import Tensor

from engine.generation.step_tensors import IDLE_TOKEN, StepTensors
from engine.ranks.parallel import Parallel
from engine.settings.sampling import SamplingConfig
from models.sizes import GPTSize
from models.vocab_parallel import vocab_parallel_sample


@dataclass(frozen=True, kw_only=True)
class DrawSettings:
    """What is drawn by, as far as a CUDA graph holds it."""

    temperature: float
    top_k: int
    top_p: float
    suppresses_stops: bool
    """Whether some responses may not end yet (min_new_tokens); from where on is in the step."""
    stop_ids: tuple[int, ...]
    """Sorted."""
    absent_ids: tuple[int, ...] = ()
    """Of the model's ids those that are no token, and are never drawn."""

    @staticmethod
    def of(
        config: SamplingConfig, stop_ids: frozenset[int], absent_ids: tuple[int, ...] = ()
    ) -> "DrawSettings":
        """Return those of a sampling configuration."""
        return DrawSettings(
            temperature=config.temperature,
            top_k=config.top_k,
            top_p=config.top_p,
            suppresses_stops=config.min_new_tokens > 0,
            stop_ids=tuple(sorted(stop_ids)),
            absent_ids=absent_ids,
        )


class Draws:
    """Draws tokens by fixed settings and by a seed that may change: CUDA graphs read it."""

    def __init__(self, settings: DrawSettings, size: GPTSize, parallel: Parallel) -> None:
        self.settings = settings
        self._num_valid_vocab = size.vocab_size
        self._group = parallel.tp_group
        device, stop_ids = parallel.device, settings.stop_ids
        self.seed = torch.zeros((), dtype=torch.int64, device=device)
        self.stop_tokens = torch.tensor(stop_ids, device=device)  # [S]
        self._tp = (parallel.tp_rank, parallel.layout.tp)
        # Which of them this rank's columns of the logits hold, and where.
        num_columns = size.padded_vocab_size // parallel.layout.tp
        held, columns = _held(stop_ids, parallel.tp_rank * num_columns, num_columns)
        self._held_stops = torch.tensor(held, dtype=torch.int64, device=device)
        self._stop_columns = torch.tensor(columns, dtype=torch.int64, device=device)
        _, columns = _held(settings.absent_ids, parallel.tp_rank * num_columns, num_columns)
        self._absent_columns = torch.tensor(columns, dtype=torch.int64, device=device)

    def __call__(self, logits: Tensor, tensors: StepTensors, sampled: Tensor) -> None:
        """Draw a token a row from this rank's columns of the logits [R, V / tp] into [2, R] int32:
        tokens, IDLE_TOKEN in idle rows, and the bits of their fp32 log-probs."""
        settings = self.settings
        position = tensors.positions[tensors.rows] + 1  # of the token that is drawn
        is_early = position < tensors.first_stop
        absent_mass = self._suppress_absent(logits) if settings.absent_ids else None
        stop_mass = self._suppress_stops(logits, is_early) if settings.suppresses_stops else None
        draw = vocab_parallel_sample(
            logits,
            group=self._group,
            temperature=settings.temperature,
            top_k=settings.top_k,
            top_p=settings.top_p,
            seed=self.seed,
            sample_index=tensors.sample_index,
            position=position,
            num_valid_vocab=self._num_valid_vocab,
        )
        # Under the full softmax, which the policy is trained by: log p = z - log(sum of e^z), with
        # what was suppressed.
        logprobs, everything = draw.logprobs, draw.logsumexp
        if stop_mass is not None:
            everything = torch.where(is_early, torch.logaddexp(everything, stop_mass), everything)
        if absent_mass is not None:
            everything = torch.logaddexp(everything, absent_mass)
        if everything is not draw.logsumexp:
            changed = everything != draw.logsumexp
            logprobs = torch.where(changed, logprobs + draw.logsumexp - everything, logprobs)
        sampled[0] = draw.tokens.masked_fill(tensors.is_idle, IDLE_TOKEN)
        sampled[1] = logprobs.contiguous().view(torch.int32)

    def _suppress_absent(self, logits: Tensor) -> Tensor:
        """Put to -inf the logits of ids that are no token; return their logsumexp [R]."""
        held = logits[:, self._absent_columns].float() / (self.settings.temperature or 1.0)
        logits[:, self._absent_columns] = -torch.inf
        rank, tp = self._tp
        masses = held.new_full((len(logits), tp), -torch.inf)
        masses[:, rank] = held.logsumexp(1)
        dist.all_reduce(masses, op=dist.ReduceOp.MAX, group=self._group)
        return masses.logsumexp(1)

    def _suppress_stops(self, logits: Tensor, is_early: Tensor) -> Tensor:
        """Put stop tokens' logits to -inf in rows that are early; return their logsumexp [R]."""
        held = logits[:, self._stop_columns]
        logits[:, self._stop_columns] = held.masked_fill(is_early[:, None], -torch.inf)
        stops = logits.new_full((len(logits), len(self.stop_tokens)), -torch.inf)
        stops[:, self._held_stops] = held
        dist.all_reduce(stops, op=dist.ReduceOp.MAX, group=self._group)
        return (stops / (self.settings.temperature or 1.0)).logsumexp(1)


def _held(ids: tuple[int, ...], first: int, num_columns: int) -> tuple[list[int], list[int]]:
    """Return which of the ids, by their places, a rank's columns from `first` on hold, and in
    which columns."""
    columns = [token - first for token in ids]
    held = [n for n, column in enumerate(columns) if 0 <= column < num_columns]
    return held, [columns[n] for n in held]
