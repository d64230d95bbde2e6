"""How responses are drawn. Imports neither torch nor megatron."""

import dataclasses
from collections.abc import Callable
from dataclasses import dataclass

from engine.errors import UserError
from engine.settings.checks import option_of

GPU_STEPS_PER_SYNC = 8
"""steps_per_sync where it is left open on a GPU, where a look waits for all it was given: our
choice."""
_COUNTS = "max_new_tokens num_slots prefill_tokens block_size"
_NOT_NEGATIVE = "temperature top_k min_new_tokens cache_gib steps_per_sync"


@dataclass(frozen=True, kw_only=True)
class SamplingConfig:
    """How responses are drawn, and what a rank spends on drawing them."""

    temperature: float = 1.0
    """Divides the logits; 0 is greedy (paper: PPO samples at 1)."""
    top_k: int = 0
    """Draw among the k likeliest tokens; 0 keeps all."""
    top_p: float = 1.0
    """Draw among the likeliest tokens that hold this much probability; 1 keeps all."""
    max_new_tokens: int = 64
    """Longest response, in tokens; shorter where prompt and response fill the model's context."""
    min_new_tokens: int = 0
    """Tokens of a response before one of its stop tokens may be drawn."""
    stop_token_ids: tuple[int, ...] = ()
    """Tokens that end a response, besides the end of text."""
    num_slots: int = 64
    """Sequences decoded together on a rank; a finished one's slot is refilled at once."""
    prefill_tokens: int = 1024
    """Prompt tokens that a step computes next to the decoding ones; longer prompts take several."""
    block_size: int = 16
    """Tokens of one block of the key-value cache; our choice: as in vLLM."""
    cache_fraction: float = 0.85
    """Share of the free memory for the key-value cache, which takes what its slots can use."""
    cache_gib: float = 0.0
    """Most that the cache takes on a rank instead, in GiB; 0 goes by cache_fraction."""
    steps_per_sync: int = 0
    """Decoding steps between two looks of the host at who has finished; 0: 1 on the CPU, 8 on a
    GPU. With pipeline parallelism it is always 1."""
    cuda_graphs: bool = True
    """Replay decoding steps from CUDA graphs, on a GPU; they are recorded once a shape and serve
    all rollouts whose weights stay where they are."""

    def check(self) -> None:
        """Raise UserError for a value that means nothing."""
        rules: list[tuple[str, Callable[[float], bool], str]] = [
            (_COUNTS, lambda value: value >= 1, "be at least 1"),
            (_NOT_NEGATIVE, lambda value: value >= 0, "not be negative"),  # NaN is neither
            ("top_p cache_fraction", lambda value: 0 < value <= 1, "lie in (0, 1]"),
        ]
        for names, holds, wanted in rules:
            for name in names.split():
                if not holds(value := getattr(self, name)):
                    raise UserError(f"{option_of(f'sampling.{name}')} must {wanted}, got {value}")
        if self.min_new_tokens > self.max_new_tokens:
            raise UserError(
                f"--sampling.min-new-tokens {self.min_new_tokens} is more than "
                f"--sampling.max-new-tokens {self.max_new_tokens}"
            )

    def greedy(self) -> "SamplingConfig":
        """Return these settings with the likeliest token taken each time."""
        return dataclasses.replace(self, temperature=0.0, top_k=0, top_p=1.0)
