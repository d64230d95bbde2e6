"""The sizes of GPT-3 (Brown et al. 2020, Table 2.1), and two small ones for CPUs. Imports neither
torch nor megatron."""

from collections.abc import Mapping
from dataclasses import dataclass
from typing import Any, Literal

from models.form import GPT3_FORM, Form, fields_that_differ, form_of

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
    """The longest sequence, prompt and response together; learned positions, where it has them."""
    query_groups: int = 0
    """Heads of keys and values, each read by num_heads / query_groups heads of queries (Ainslie et
    al. 2023); 0: as many as num_heads."""
    head_width: int = 0
    """Dimensions of a head; 0: hidden_size / num_heads."""
    inner_width: int = 0
    """Width of the MLP; 0: 4 x hidden_size."""
    embedding_width: int = 0
    """Width of the tokens' embedding and of what the head reads; 0: hidden_size. One of another
    width is projected in and out (OPT-350m: 512, layers of 1024)."""
    form: Form = GPT3_FORM
    """How a layer is put together."""

    def __post_init__(self) -> None:
        if not self.head_width and self.hidden_size % self.num_heads:
            raise ValueError(
                f"hidden_size {self.hidden_size} must be a multiple of num_heads {self.num_heads}"
            )
        # One size has one description.
        for name, usual in (
            ("query_groups", self.num_heads),
            ("head_width", self.hidden_size / self.num_heads),
            ("inner_width", 4 * self.hidden_size),
            ("embedding_width", self.hidden_size),
        ):
            if getattr(self, name) == usual:
                object.__setattr__(self, name, 0)
        if self.num_heads % self.num_kv_heads:
            raise ValueError(
                f"num_heads {self.num_heads} must be a multiple of query_groups {self.query_groups}"
            )

    @property
    def num_kv_heads(self) -> int:
        """Heads of keys and values."""
        return self.query_groups or self.num_heads

    @property
    def head_dim(self) -> int:
        """Dimensions of a head."""
        return self.head_width or self.hidden_size // self.num_heads

    @property
    def qkv_width(self) -> int:
        """Outputs of the matrix of queries, keys and values."""
        return (self.num_heads + 2 * self.num_kv_heads) * self.head_dim

    @property
    def ffn_size(self) -> int:
        """Width of the MLP."""
        return self.inner_width or 4 * self.hidden_size

    @property
    def fc1_width(self) -> int:
        """Outputs of the MLP's first matrix: a gated one has two for each it hands on."""
        return self.ffn_size * (2 if self.form.is_gated else 1)

    @property
    def embedding_dim(self) -> int:
        """Width of the tokens' embedding and of what the head reads."""
        return self.embedding_width or self.hidden_size

    @property
    def padded_vocab_size(self) -> int:
        """vocab_size rounded up to a multiple of 128; the columns beyond vocab_size are masked
        everywhere."""
        return -(-self.vocab_size // VOCAB_MULTIPLE) * VOCAB_MULTIPLE

    @property
    def num_parameters(self) -> int:
        """Parameters of the language model, without the padding of the vocabulary."""
        hidden, form = self.hidden_size, self.form
        norm = hidden * (2 if form.norm == "layer" else 1)
        layer = hidden * (self.qkv_width + self.num_heads * self.head_dim)
        layer += hidden * (self.fc1_width + self.ffn_size) + 2 * norm
        layer += self.qkv_width if form.has_bias("qkv") else 0
        layer += hidden if form.has_bias("attention") else 0
        layer += hidden + self.fc1_width if form.has_bias("mlp") else 0
        layer += 2 * self.head_dim * norm // hidden if form.norms_heads else 0
        ends = self.vocab_size * self.embedding_dim * (1 if form.is_tied else 2)
        ends += 0 if form.rotary else self.context_length * hidden
        ends += 2 * self.embedding_width * hidden  # the projections
        ends += norm if not form.is_post_norm else 0
        return self.num_layers * layer + ends


_REQUIRED = ("num_layers", "hidden_size", "num_heads", "vocab_size", "context_length")
_OPTIONAL = ("query_groups", "head_width", "inner_width", "embedding_width")
_LARGEST = 1 << 31  # of any number of a size; our choice


def size_as_json(size: GPTSize) -> dict[str, Any]:
    """Return a size as JSON has it: of what GPT-3's sizes do not have, what differs."""
    found: dict[str, Any] = {name: getattr(size, name) for name in _REQUIRED}
    found |= {name: value for name in _OPTIONAL if (value := getattr(size, name))}
    return found | ({"form": form} if (form := fields_that_differ(size.form)) else {})


def size_of_json(stored: Any) -> GPTSize:
    """Return the size that size_as_json wrote; raises ValueError for anything else."""
    if not isinstance(stored, Mapping) or not set(_REQUIRED) <= stored.keys():
        raise ValueError(f"a size has {', '.join(_REQUIRED)}")
    numbers = {name: number for name, number in stored.items() if name != "form"}
    for name, number in numbers.items():
        if name not in (*_REQUIRED, *_OPTIONAL):
            raise ValueError(f"{name!r:.60} is no field of a size")
        if type(number) is not int or not 0 < number < _LARGEST:
            raise ValueError(f"{name} is {number!r:.60}")
    return GPTSize(**numbers, form=form_of(stored.get("form", {})))


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
