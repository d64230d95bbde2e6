"""How many tokens a run reads: the sizes of InstructGPT's data, and what a batch of them is.

A recipe says how it trains, not how long a user's examples are; the defaults are the paper's.
Imports neither torch nor megatron.
"""

import dataclasses
import math
from dataclasses import dataclass

from engine.settings.checks import check_numbers


@dataclass(frozen=True, kw_only=True)
class Workload:
    """Number and mean length of the examples. Other data: other numbers."""

    demonstrations: int = 12_725
    """Training prompts with a demonstration (InstructGPT, Table 6)."""
    demonstration_prompt_tokens: float = 408.0
    """Mean tokens of their prompts (Table 9)."""
    demonstration_tokens: float = 43.0
    """Mean tokens of a demonstration (Table 11: 38 of 12,845 by contractors, 88 of 1,533)."""
    comparisons: int = 33_207
    """Training prompts with a ranking (Table 6)."""
    comparison_prompt_tokens: float = 199.0
    """Mean tokens of their prompts (Table 9)."""
    completions: float = 6.5
    """Mean answers a ranking, K (section 3.5: 4 to 9)."""
    most_completions: int = 9
    """Most answers a ranking (section 3.5)."""
    prompt_tokens: float = 166.0
    """Mean tokens of PPO's prompts (Table 9)."""
    response_tokens: float = 128.0
    """Mean tokens of a sampled response. Not stated; our assumption: three times the mean
    demonstration."""
    pretraining_tokens: float = 300e9
    """Tokens of the text that a run without demonstrations passes over (GPT-3: 300B)."""

    def __post_init__(self) -> None:
        names = "demonstrations comparisons most_completions"
        means = "demonstration_prompt_tokens demonstration_tokens comparison_prompt_tokens"
        check_numbers(
            self,
            "workload.",
            counts=names,
            positive=f"{means} completions prompt_tokens response_tokens pretraining_tokens",
        )


@dataclass(frozen=True, kw_only=True)
class Batch:
    """Sequences that are packed together, over all data-parallel ranks."""

    count: float
    """Sequences, or groups of sequences that stay in one row."""
    mean_tokens: float
    """Mean tokens of one."""
    limit: float
    """Most tokens of one; equal to mean_tokens where all are of one length."""
    span: float
    """Tokens that attend to each other: the mean length of a sequence."""
    target_share: float = 1.0
    """Share of the tokens that are predicted, which the head computes."""
    sequences: float | None = None
    """Mean sequences of one that share tokens; none: as many as its tokens make, span each."""
    copied_keys: float = 0.0
    """Keys that attention copies for a token, as it does where sequences share tokens."""

    @property
    def tokens(self) -> float:
        """Tokens of all sequences."""
        return self.count * self.mean_tokens

    def padded(self, context: int) -> "Batch":
        """Return the batch with every sequence filled up to the context, and nothing shared."""
        tokens = (self.sequences or self.mean_tokens / self.span) * context
        whole = {"mean_tokens": tokens, "limit": tokens, "span": context}
        return dataclasses.replace(self, **whole, copied_keys=0.0)

    def longest(self) -> float:
        """Return the expected longest: lengths as if drawn from a geometric distribution, which is
        about as wide as Table 9's (standard deviations of 1.1 to 1.7 means)."""
        return min(self.limit, self.mean_tokens * harmonic(self.count))

    def share(self, dp: int) -> float:
        """Return the tokens of the fullest data-parallel rank."""
        if self.mean_tokens == self.limit:
            return math.ceil(self.count / dp) * self.limit
        return max(self.tokens / dp, self.longest())

    def rows(self, dp: int, budget: int, multiple: int = 1) -> tuple[int, float]:
        """Return (number of rows, tokens of the longest) of the fullest data-parallel rank; budget
        and multiple as in engine/data/batches.py."""
        tokens = self.share(dp)
        if self.mean_tokens == self.limit:  # as many whole sequences as the budget takes
            fitting = max(1, int(budget // self.limit))
            rows, longest = math.ceil(tokens / self.limit / fitting), fitting * self.limit
        else:
            rows, longest = math.ceil(tokens / budget), max(budget, self.longest())
        return math.ceil(rows / multiple) * multiple, min(tokens, longest)


def harmonic(count: float) -> float:
    """Return 1 + 1/2 + ... + 1/count: the expected largest of `count` draws of an exponential
    distribution of mean 1."""
    if count < 32:
        return sum(1 / n for n in range(1, max(1, round(count)) + 1))
    return math.log(count) + 0.5772156649 + 1 / (2 * count)
