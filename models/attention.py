"""Causal attention over packed sequences: flash-attn where installed, else on CUDA cuDNN where all
have one length and torch's varlen flash where not; SDPA on the CPU.

Tokens of all sequences lie in one row [T, heads, dim] with cu_seqlens between them; nothing is
padded on the left, so learned positions start at 0 in every sequence. Keys and values may have
fewer heads: query head h reads key-value head h // (heads / kv_heads) (Ainslie et al. 2023). With a
window a token sees itself and the window - 1 tokens before it (Child et al. 2019). Sequences that
begin alike may share their beginning (models/prefixes.py).
"""

import importlib
from collections.abc import Callable
from inspect import signature
from typing import Any, cast

import torch
import torch.nn.functional as F
from megatron.core.packed_seq_params import PackedSeqParams
from megatron.core.transformer.module import MegatronModule
from torch import Tensor
from torch.nn.attention import SDPBackend, sdpa_kernel

from models.context_parallel import gather_row
from models.packed_sequences import PackedSequences
from models.prefixes import SequenceKeys

_FLASH_ATTENTION = {"flash-attn 4": "flash_attn.cute", "flash-attn 2": "flash_attn"}


def _find_flash_attention() -> tuple[str, Callable[..., Any] | None]:
    """Return what computes attention on a GPU and its function, None for torch's own.

    A package whose parts do not fit one another raises errors of any kind while it is imported:
    flash-attn 4 does so with another CUTLASS DSL than its own. The name then says it.
    """
    broken = ""
    for name, module in _FLASH_ATTENTION.items():
        try:
            return name + broken, importlib.import_module(module).flash_attn_varlen_func
        except Exception as error:
            is_absent = isinstance(error, ModuleNotFoundError) and module.startswith(
                error.name or "?"
            )
            if not is_absent:
                said = " ".join(str(error).split())[:200]
                broken += f"; {name} does not import: {type(error).__name__}: {said}"
    return "torch varlen (FlashAttention 2), cuDNN for equal lengths" + broken, None


_flash_attention, _flash_attn_varlen = _find_flash_attention()
_CUDNN_FIRST = [SDPBackend.CUDNN_ATTENTION, SDPBackend.FLASH_ATTENTION]
_SHORT = 48  # tokens in the mean; 24 to 56 cost a CPU the same in either way
_CUDNN_LENGTHS = 128  # tokens: a tile of its kernels


def attention_backend(device: torch.device, dtype: torch.dtype) -> str:
    """Return the name of what computes attention on that device in that dtype.

    Where flash-attn is installed but does not import, the name says why.
    """
    return _flash_attention if _takes_flash(device.type, dtype) else "torch SDPA"


def _takes_flash(device_type: str, dtype: torch.dtype) -> bool:
    return device_type == "cuda" and dtype in (torch.float16, torch.bfloat16)


class PackedAttention(MegatronModule):
    """megatron's core attention for packed rows; the layer's projections stay megatron's."""

    def __init__(
        self,
        config: Any,
        layer_number: int,
        attn_mask_type: Any,
        attention_type: str,
        softmax_scale: float | None = None,
        **unused: Any,
    ) -> None:
        super().__init__(config=config)
        self.layer_number = layer_number
        form, scale = config.form, softmax_scale or config.kv_channels**-0.5
        self.softmax_scale = scale / layer_number if form.scales_by_layer else scale
        has_window = form.windowed_layers == "all" or layer_number % 2 == 0
        self.window = form.window if form.window and has_window else None
        """How many tokens a token of this layer sees, itself among them; None: all before it."""

    def forward(
        self,
        query: Tensor,
        key: Tensor,
        value: Tensor,
        attention_mask: Tensor | None = None,
        *,
        packed_seq_params: PackedSeqParams,
        **unused: Any,
    ) -> Tensor:
        """Return the attention output [T, heads x dim] of query [T, heads, dim], key and value [T,
        kv_heads, dim]."""
        sequences = cast(PackedSequences, packed_seq_params)
        rotation = getattr(sequences, "rotation", None)
        if rotation is not None:
            query, key = rotation.turn(query, key)
        is_shared = getattr(sequences, "share", None) is not None
        attention = shared_attention if is_shared else packed_attention
        return attention(query, key, value, sequences, self.softmax_scale, self.window).flatten(1)


def shared_attention(
    query: Tensor,
    key: Tensor,
    value: Tensor,
    sequences: PackedSequences,
    scale: float,
    window: int | None = None,
) -> Tensor:
    """Return packed_attention [T / cp, heads, dim] of the tokens that this rank holds; query, key
    and value are of those."""
    assert sequences.share is not None
    keys, values = gather_row(torch.stack([key, value], 1), sequences.share).unbind(1)
    pieces = zip(query.chunk(2), sequences.pieces, strict=True)
    return torch.cat(
        [packed_attention(q, keys[:end], values[:end], s, scale, window) for q, (end, s) in pieces]
    )


def packed_attention(
    query: Tensor,
    key: Tensor,
    value: Tensor,
    sequences: PackedSequences,
    scale: float,
    window: int | None = None,
) -> Tensor:
    """Return causal self-attention [T, heads, dim] within each sequence of the packed row.

    query [T, heads, dim], key and value [T, kv_heads, dim]. Where a sequence has more keys than
    queries (cu_seqlens_kv), its queries are the last of its tokens. window: how many tokens a token
    sees, itself among them; None for all.
    """
    if window is not None and window >= sequences.max_seqlen_kv:
        window = None  # no sequence is longer: the same bits as without
    if (keys := sequences.keys) is not None:
        if not query.is_cuda and keys.is_of_row and keys.suits_groups:
            return _attention_of_groups(query, key, value, keys, scale, window)
        key, value = keys.gather(key, value)
    if _takes_flash(query.device.type, query.dtype):
        is_even = window is None and _suits_cudnn(sequences, len(query))
        if _flash_attn_varlen is None and is_even:
            return _cudnn_attention(query, key, value, sequences.max_seqlen_q, scale)
        return _varlen_attention(query, key, value, sequences, scale, window)
    num_padded = (len(sequences.cu_seqlens_q) - 1) * sequences.max_seqlen_q
    is_whole = sequences.cu_seqlens_kv is sequences.cu_seqlens_q
    # Padding while it wastes little: on a GPU, and on a CPU where sequences are so short that calls
    # cost more. Longer ones of different lengths go one by one: there padding to 1.4 times the
    # tokens took twice the time.
    is_short = len(query) < _SHORT * (len(sequences.cu_seqlens_q) - 1)
    if is_whole and num_padded <= (2 if query.is_cuda or is_short else 1) * len(query):
        return _padded_attention(query, key, value, sequences, scale, window)
    query_lengths = sequences.cu_seqlens_q.diff().tolist()
    key_lengths = sequences.cu_seqlens_kv.diff().tolist()
    outputs = [
        _attention_of_one(q, k, v, scale, window)
        for q, k, v in zip(
            query.split(query_lengths),
            key.split(key_lengths),
            value.split(key_lengths),
            strict=True,
        )
        if len(q)
    ]
    return torch.cat(outputs)


def _attention_of_one(
    query: Tensor, key: Tensor, value: Tensor, scale: float, window: int | None
) -> Tensor:
    """Attention [n, heads, dim] of the last n of a sequence's m tokens; key and value are [m,
    kv_heads, dim]."""
    if window is not None:
        # What the first query's window begins with, or all where it reaches beyond the first key.
        num_seen = len(query) + window - 1
        key, value = key[-num_seen:], value[-num_seen:]
    num_queries, num_keys = len(query), len(key)
    mask = None
    if num_queries < num_keys or (window is not None and window < num_keys):
        mask = _sees(num_queries, num_keys, window, query.device)
    return _sdpa_of_one(query, key, value, mask, scale)


def _attention_of_groups(
    query: Tensor,
    key: Tensor,
    value: Tensor,
    keys: SequenceKeys,
    scale: float,
    window: int | None,
) -> Tensor:
    """packed_attention with one call for all sequences that share a prefix."""
    lengths, sees = keys.groups(window)
    rows = zip(*(x.split(lengths) for x in (query, key, value)), sees, strict=True)
    return torch.cat([_sdpa_of_one(q, k, v, mask, scale) for q, k, v, mask in rows])


def _sees(num_queries: int, num_keys: int, window: int | None, device: torch.device) -> Tensor:
    """[num_queries, num_keys] bool: query i is token num_keys - num_queries + i and sees the keys
    up to itself, the last `window` of them."""
    ahead = num_keys - num_queries
    sees = torch.ones(num_queries, num_keys, dtype=torch.bool, device=device).tril(ahead)
    return sees if window is None else sees.triu(ahead - window + 1)


def _sdpa_of_one(
    query: Tensor, key: Tensor, value: Tensor, mask: Tensor | None, scale: float
) -> Tensor:
    # As a batch of one: without that dimension torch computes the whole matrix of scores.
    q, k, v = (x.transpose(0, 1)[None] for x in (query, key, value))
    return _sdpa(q, k, v, mask, scale)[0].transpose(0, 1)


def _sdpa(query: Tensor, key: Tensor, value: Tensor, mask: Tensor | None, scale: float) -> Tensor:
    """Torch's attention [B, heads, L, dim] of query; key and value are [B, kv_heads, M, dim]. mask
    [L, M] bool; None: causal."""
    group = query.shape[1] // key.shape[1]
    if group > 1 and query.is_cuda and not _takes_flash(query.device.type, query.dtype):
        # No kernel of torch for fp32 on a GPU knows of groups: it would make the whole matrix of
        # scores.
        key, value = (x.repeat_interleave(group, 1) for x in (key, value))
        group = 1
    return F.scaled_dot_product_attention(
        query, key, value, mask, is_causal=mask is None, scale=scale, enable_gqa=group > 1
    )


def _suits_cudnn(sequences: PackedSequences, num_tokens: int) -> bool:
    """True where all sequences have one length, as pretraining's have, and that a round one.

    cuDNN makes a plan for every shape, which takes the host a good part of a second: lengths that
    chance makes equal shall not each cost one.
    """
    longest = sequences.max_seqlen_q
    is_whole = sequences.cu_seqlens_kv is sequences.cu_seqlens_q
    is_even = (len(sequences.cu_seqlens_q) - 1) * longest == num_tokens
    return is_whole and is_even and longest % _CUDNN_LENGTHS == 0


def _cudnn_attention(
    query: Tensor, key: Tensor, value: Tensor, length: int, scale: float
) -> Tensor:
    """Attention [T, heads, dim] within sequences of one length.

    cuDNN's kernels use Hopper's own matrix instructions, FlashAttention 2 those of an A100. Under
    deterministic algorithms, which cuDNN's backward pass is not, torch leaves it out.
    """
    q, k, v = (x.unflatten(0, (-1, length)).transpose(1, 2) for x in (query, key, value))
    with sdpa_kernel(_CUDNN_FIRST, set_priority=True):
        out = _sdpa(q, k, v, None, scale)
    return out.transpose(1, 2).flatten(0, 1)


def _varlen_attention(
    query: Tensor,
    key: Tensor,
    value: Tensor,
    sequences: PackedSequences,
    scale: float,
    window: int | None,
) -> Tensor:
    # All kernels align masks at the ends of queries and keys, and take fewer heads of keys. A
    # window counts the tokens to the left of a token, and on the right.
    q_bounds, k_bounds = sequences.cu_seqlens_q, sequences.cu_seqlens_kv
    q_longest, k_longest = sequences.max_seqlen_q, sequences.max_seqlen_kv
    if _flash_attn_varlen is not None:
        out = _flash_attn_varlen(
            query,
            key,
            value,
            cu_seqlens_q=q_bounds,
            cu_seqlens_k=k_bounds,
            max_seqlen_q=q_longest,
            max_seqlen_k=k_longest,
            softmax_scale=scale,
            causal=True,
            # Else the backward pass adds up a query's gradient in the order in which blocks finish.
            deterministic=torch.are_deterministic_algorithms_enabled(),
            **({} if window is None else {"window_size": (window - 1, 0)}),
        )
        return out[0] if isinstance(out, tuple) else out  # flash-attn-4 also returns the logsumexp
    from torch.nn.attention.varlen import varlen_attn

    bounds = (q_bounds, k_bounds, q_longest, k_longest)
    left = -1 if window is None else window - 1
    options: dict[str, Any] = {"scale": scale, "window_size": (left, 0)}
    # torch 2.12 wants to be asked for groups; before it took them so.
    if query.shape[1] != key.shape[1] and "enable_gqa" in signature(varlen_attn).parameters:
        options["enable_gqa"] = True
    return cast(Tensor, varlen_attn(query, key, value, *bounds, **options))


def _padded_attention(
    query: Tensor,
    key: Tensor,
    value: Tensor,
    sequences: PackedSequences,
    scale: float,
    window: int | None,
) -> Tensor:
    num_sequences, longest = len(sequences.cu_seqlens_q) - 1, sequences.max_seqlen_q
    mask = None if window is None else _sees(longest, longest, window, query.device)
    if len(query) == num_sequences * longest:  # all of one length: as they lie
        q, k, v = (x.unflatten(0, (-1, longest)).transpose(1, 2) for x in (query, key, value))
        return _sdpa(q, k, v, mask, scale).transpose(1, 2).flatten(0, 1)
    gather, scatter = sequences.padding
    # [T, heads, dim] -> [B, heads, L, dim]
    q, k, v = (x[gather].transpose(1, 2) for x in (query, key, value))
    return _sdpa(q, k, v, mask, scale).transpose(1, 2).flatten(0, 1)[scatter]
