"""The sizes of GPT-3 (Brown et al. 2020, Table 2.1), and two small ones for CPUs. Imports neither
torch nor megatron."""

from dataclasses import dataclass
from typing import Literal

GPT3_VOCAB_SIZE = 50257  # GPT-2's byte-pair vocabulary, which GPT-3 keeps
GPT3_CONTEXT_LENGTH = 2048
VOCAB_MULTIPLE = 128  # padding of the vocabulary: any tp that divides 128 then splits it evenly
VOCAB_GROUP = 8  # columns that sampling draws together (kernels/philox.py): shards hold whole ones

Kind = Literal["language", "scalar"]
"""What a network says of a token: its distribution over the next one, or one number."""


@dataclass(frozen=True, kw_only=True)
class GPTSize:
    """The shape of one GPT."""

    num_layers: int
    """Transformer layers."""
    hidden_size: int
    """Width of the residual stream (d_model)."""
    num_heads: int
    """Attention heads; each has hidden_size / num_heads dimensions."""
    vocab_size: int = GPT3_VOCAB_SIZE
    """Entries of the tokenizer; the embedding is padded beyond it, see padded_vocab_size."""
    context_length: int = GPT3_CONTEXT_LENGTH
    """Learned positions: the longest sequence, prompt and response together."""

    def __post_init__(self) -> None:
        if self.hidden_size % self.num_heads:
            raise ValueError(
                f"hidden_size {self.hidden_size} must be a multiple of num_heads {self.num_heads}"
            )

    @property
    def num_kv_heads(self) -> int:
        """Heads of keys and values, each for num_heads / num_kv_heads query heads."""
        return self.num_heads

    @property
    def head_dim(self) -> int:
        """Dimensions of a head."""
        return self.hidden_size // self.num_heads

    @property
    def padded_vocab_size(self) -> int:
        """vocab_size rounded up to a multiple of 128; the columns beyond vocab_size are masked
        everywhere."""
        return -(-self.vocab_size // VOCAB_MULTIPLE) * VOCAB_MULTIPLE

    @property
    def num_parameters(self) -> int:
        """Parameters of the tied language model, without the padding of the vocabulary."""
        hidden = self.hidden_size
        # Per layer: attention 4 h^2 + 4 h, MLP 8 h^2 + 5 h, two layer norms 4 h.
        layer = 12 * hidden * hidden + 13 * hidden
        return self.num_layers * layer + (self.vocab_size + self.context_length + 2) * hidden


# GPT-3's table prints 24 heads for XL and width 5140 for 13B; both are slips: 16 heads of 128 and
# width 5120 reproduce its parameter counts, and Stiennon et al. 2020, Table 3, lists them so.
SIZES = {
    "tiny": GPTSize(
        num_layers=2, hidden_size=192, num_heads=6, vocab_size=2048, context_length=256
    ),
    "small": GPTSize(
        num_layers=4, hidden_size=256, num_heads=8, vocab_size=8192, context_length=512
    ),
    "125m": GPTSize(num_layers=12, hidden_size=768, num_heads=12),
    "350m": GPTSize(num_layers=24, hidden_size=1024, num_heads=16),
    "760m": GPTSize(num_layers=24, hidden_size=1536, num_heads=16),
    "1.3b": GPTSize(num_layers=24, hidden_size=2048, num_heads=16),
    "2.7b": GPTSize(num_layers=32, hidden_size=2560, num_heads=32),
    "6b": GPTSize(num_layers=32, hidden_size=4096, num_heads=32),
    "13b": GPTSize(num_layers=40, hidden_size=5120, num_heads=40),
    "175b": GPTSize(num_layers=96, hidden_size=12288, num_heads=96),
}
