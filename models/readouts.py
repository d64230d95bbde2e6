"""What a last stage is asked for: log-probs, losses of tokens, logits, or a number a token.

A readout reads the final hidden states of a packed row of T tokens through the network's head. The
language model takes Logprobs, TokenLosses and Logits, the scalar network Readings.
"""

from collections.abc import Callable
from dataclasses import dataclass
from typing import Any

import torch
import torch.nn.functional as F
from megatron.core.tensor_parallel.mappings import gather_from_sequence_parallel_region
from torch import Tensor
from torch.distributed import ProcessGroup

from kernels.linear_logprobs import ProportionalLoss, TokenLoss
from kernels.row_state import IGNORE_INDEX
from models.packed_sequences import PackedSequences
from models.vocab_parallel import (
    vocab_parallel_linear_logprobs,
    vocab_parallel_linear_logprobs_loss,
)


@dataclass(frozen=True, kw_only=True)
class LanguageHead:
    """The head of a language model, cut among the ranks of its tensor-parallel group."""

    weight: Tensor
    """[V / tp, width of the embedding]: this rank's part of the vocabulary."""
    group: ProcessGroup
    sequence_parallel: bool
    """Hidden states come as [T / tp, width], each rank's own; else as [T, width], the same on
    all."""
    num_valid_vocab: int
    """Tokens of the vocabulary; what pads it beyond them takes no part."""


@dataclass(frozen=True)
class Logprobs:
    """The log-prob of each token given those before it in its sequence."""

    mask: Tensor
    """[T] bool: the tokens that have one."""
    targets: Tensor | None = None
    """[R] int64: their indices in the row, which spare the head the other tokens."""
    temperature: float = 1.0

    def read(
        self, head: LanguageHead, hidden: Tensor, tokens: Tensor, sequences: PackedSequences
    ) -> Tensor:
        """Return fp32 log-probs [T]: that of token t, predicted from t - 1; 0 outside of mask."""
        labels = self.labels(tokens, sequences)
        arguments = self.arguments(head, sequences)
        logprobs, _ = vocab_parallel_linear_logprobs(hidden, head.weight, labels, **arguments)
        return shift_right(sequences.join(logprobs))

    def labels(self, tokens: Tensor, sequences: PackedSequences) -> Tensor:
        """Return what the hidden states on this rank predict: [T], or [T / cp] of those it holds.

        The state after token t - 1 predicts token t: labels move one to the left.
        """
        if sequences.keys is not None:
            raise ValueError("log-probs need whole sequences: a prefix's end predicts several")
        labels = tokens.masked_fill(~self.mask, IGNORE_INDEX).roll(-1)
        labels[-1] = IGNORE_INDEX
        return sequences.held(labels)

    def arguments(self, head: LanguageHead, sequences: PackedSequences) -> dict[str, Any]:
        """Return how the head is read, for models/vocab_parallel.py."""
        # How many targets a rank holds is not known on the host: it computes all of its tokens.
        is_known = self.targets is not None and sequences.share is None
        return {
            "group": head.group,
            "sequence_parallel": head.sequence_parallel,
            "temperature": self.temperature,
            "num_valid_vocab": head.num_valid_vocab,
            "row_index": self.targets - 1 if is_known else None,  # type: ignore[operator]
        }


@dataclass(frozen=True)
class TokenLosses:
    """The sum of a loss of each token's log-prob, gradients made in the head's only pass."""

    logprobs: Logprobs
    token_loss: TokenLoss
    """(log-probs [n], their tokens' indices in the row [n]) to losses [n], and what goes with them;
    see kernels/linear_logprobs.py."""

    def read(
        self, head: LanguageHead, hidden: Tensor, tokens: Tensor, sequences: PackedSequences
    ) -> tuple[Tensor, Tensor]:
        """Return (loss [], log-probs [T], or the token loss's terms [k, T], without gradient).

        Under context parallelism the loss is of the tokens that this rank holds, the others are of
        all.
        """

        def at_tokens(values: Tensor, numbers: Tensor) -> Tensor | tuple[Tensor, ...]:
            # The last state predicts nothing. Its loss is discarded, yet must look at some token.
            predicted = sequences.in_row(numbers) + 1
            return self.token_loss(values, predicted.clamp(max=len(tokens) - 1))

        is_same_everywhere = isinstance(self.token_loss, ProportionalLoss)
        loss, terms = vocab_parallel_linear_logprobs_loss(
            hidden,
            head.weight,
            self.logprobs.labels(tokens, sequences),
            self.token_loss if is_same_everywhere else at_tokens,
            **self.logprobs.arguments(head, sequences),
        )
        return loss, shift_right(sequences.join(terms))


@dataclass(frozen=True)
class Logits:
    """The logits of what follows some of the row's tokens."""

    after: Tensor
    """[R] int64: the indices of these tokens in the row."""

    def read(
        self, head: LanguageHead, hidden: Tensor, tokens: Tensor, sequences: PackedSequences
    ) -> Tensor:
        """Return this rank's part of the vocabulary [R, V / tp], fp32; not for context
        parallelism."""
        if head.sequence_parallel:
            hidden = gather_from_sequence_parallel_region(hidden, group=head.group)
        return _logits(hidden[self.after], head.weight)


def _logits(hidden: Tensor, weight: Tensor) -> Tensor:
    """[R, V / tp] fp32 logits, summed in fp32 as the kernels of the log-probs do.

    On a GPU from the weights as they are: an fp32 copy of the head would cost every decoding step
    more than reading it.
    """
    if hidden.is_cuda and hidden.dtype != torch.float32:
        return torch.mm(hidden, weight.T, out_dtype=torch.float32)
    return hidden.float() @ weight.float().T


@dataclass(frozen=True)
class Readings:
    """A scalar network's number after every token."""

    def read(
        self,
        head: Callable[[Tensor], Tensor],
        hidden: Tensor,
        tokens: Tensor,
        sequences: PackedSequences,
    ) -> Tensor:
        """Return fp32 readings [T], reading t after token t; head: a scalar network's."""
        return sequences.join(head(hidden))


LanguageReadout = Logprobs | TokenLosses | Logits
Readout = LanguageReadout | Readings


def shift_right(readings: Tensor) -> Tensor:
    """Move what was read after token t-1 to token t, which it is about; token 0 gets 0.

    readings: [..., T].
    """
    return F.pad(readings[..., :-1], (1, 0))
