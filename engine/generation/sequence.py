"""What is asked for and what comes back: settings, a sequence under way, a finished response."""

from dataclasses import dataclass, field

import numpy as np


@dataclass(frozen=True, kw_only=True, eq=False)
class Response:
    """One finished response."""

    sample_index: int
    """The number its draws were keyed by: the caller's, unique in the run."""
    tokens: np.ndarray
    """[n] int64: what was generated, with the stop token if it ended with one."""
    logprobs: np.ndarray
    """[n] fp32 log-prob of each token under softmax(logits / temperature), of the whole vocabulary:
    before top_k, top_p and min_new_tokens. At temperature 0 under softmax(logits)."""
    has_eos: bool
    """Whether it ended by itself, with the end of text or another stop token, not at its limit."""


@dataclass(kw_only=True, eq=False)
class LiveSequence:
    """A prompt and what has been generated for it so far, on the host."""

    sample_index: int
    tokens: list[int]
    """Prompt and response."""
    prompt_length: int
    max_length: int
    """Prompt and response never get longer than this."""
    logprobs: list[float] = field(default_factory=list)
    blocks: list[int] = field(default_factory=list)
    """Cache blocks, in order; they hold the keys and values of tokens[:num_cached]."""
    num_cached: int = 0
    digests: list[bytes] = field(default_factory=list)
    """Names of the full blocks of the tokens it was admitted with; see block_manager."""
    is_finished: bool = False

    @property
    def num_pending(self) -> int:
        """Tokens to feed before the next can be sampled: 1 while decoding, more for a prompt."""
        return len(self.tokens) - self.num_cached

    def extend(self, tokens: list[int], logprobs: list[float], stop_ids: frozenset[int]) -> None:
        """Append sampled tokens, of which only the last can be a stop token or the limit."""
        self.tokens.extend(tokens)
        self.logprobs.extend(logprobs)
        self.is_finished = tokens[-1] in stop_ids or len(self.tokens) >= self.max_length

    def response(self, stop_ids: frozenset[int]) -> Response:
        """Return the response of a finished sequence."""
        return Response(
            sample_index=self.sample_index,
            tokens=np.array(self.tokens[self.prompt_length :], dtype=np.int64),
            logprobs=np.array(self.logprobs, dtype=np.float32),
            has_eos=self.tokens[-1] in stop_ids,
        )
