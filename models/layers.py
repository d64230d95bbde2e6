"""What a transformer layer is made of: megatron's linear layers, our norms, MLP and attention."""

from dataclasses import dataclass
from types import SimpleNamespace
from typing import Any, Literal

import torch
import torch.nn.functional as F
from megatron.core.fusions.fused_bias_dropout import get_bias_dropout_add
from megatron.core.tensor_parallel import layers as megatron_layers
from megatron.core.tensor_parallel.layers import ColumnParallelLinear, RowParallelLinear
from megatron.core.transformer.attention import SelfAttention, SelfAttentionSubmodules
from megatron.core.transformer.enums import AttnMaskType
from megatron.core.transformer.identity_op import IdentityOp
from megatron.core.transformer.spec_utils import ModuleSpec
from megatron.core.transformer.transformer_block import (
    TransformerBlockSubmodules,
    get_num_layers_to_build,
)
from megatron.core.transformer.transformer_config import TransformerConfig
from megatron.core.transformer.transformer_layer import (
    TransformerLayer,
    TransformerLayerSubmodules,
)
from megatron.core.utils import make_viewless_tensor
from torch import Tensor

from kernels.layer_norm import layer_norm
from kernels.linear_chunks import add_matmul
from kernels.rms_norm import rms_norm
from models.attention import PackedAttention
from models.form import GPT3_FORM, Form
from models.mlp import MLP
from models.sizes import GPTSize

Recompute = Literal["none", "selective", "full"]

_RECOMPUTE: dict[Recompute, dict[str, Any]] = {
    "none": {},
    "selective": {"recompute_granularity": "selective"},
    "full": {
        "recompute_granularity": "full",
        "recompute_method": "uniform",
        "recompute_num_layers": 1,
    },
}

# Variants of an operation that torch compiles before it runs what is new in eager mode, for good. A
# PPO run with a critic of another width takes 10 of bias + dropout + addition. They differ in
# width, in which tensors have gradients, in gradients on, off or inference, and in one length or
# any. Stages that follow in the same process add theirs: 15 were seen. torch's own limit is 8.
COMPILED_VARIANTS = 64


@dataclass(frozen=True, kw_only=True)
class Degrees:
    """How many ranks the layers of a network are spread over, and how."""

    tp: int = 1
    pp: int = 1
    virtual_pp: int = 1
    sequence_parallel: bool = False


@dataclass(frozen=True, kw_only=True)
class Arithmetic:
    """How the layers of a network are computed; a fusion changes rounding, nothing else."""

    dtype: torch.dtype = torch.float32
    recompute: Recompute = "none"
    fuses_elementwise: bool = False
    fuses_gradient_accumulation: bool = False
    deterministic: bool = False


@dataclass
class LayerConfig(TransformerConfig):
    """megatron's configuration, and the form of the layers."""

    form: Form = GPT3_FORM


def transformer_config(
    size: GPTSize, degrees: Degrees, arithmetic: Arithmetic, *, dropout: float
) -> LayerConfig:
    """Return megatron's configuration of a GPT of that size.

    Initialisation is GPT-2's, which GPT-3 keeps: normal with std 0.02, and 0.02 / sqrt(2 x layers)
    for the matrices that write to the residual stream (Radford et al. 2019, section 2.3).
    """
    fuses_elementwise, dtype, form = arithmetic.fuses_elementwise, arithmetic.dtype, size.form
    has_fused_gelu = (form.activation, form.is_gated, form.bias) == ("gelu_tanh", False, "all")
    if fuses_elementwise:
        _allow_variants()
    if arithmetic.fuses_gradient_accumulation:
        _provide_gradient_fusion()
    return LayerConfig(
        form=form,
        num_layers=size.num_layers,
        hidden_size=size.hidden_size,
        num_attention_heads=size.num_heads,
        num_query_groups=size.num_kv_heads,
        kv_channels=size.head_dim,
        ffn_hidden_size=size.ffn_size,
        add_bias_linear=form.has_bias("attention"),
        add_qkv_bias=form.has_bias("qkv"),
        qk_layernorm=form.norms_heads,
        normalization="LayerNorm" if form.norm == "layer" else "RMSNorm",
        hidden_dropout=dropout,
        attention_dropout=0.0,
        layernorm_epsilon=form.norm_epsilon,
        # megatron's fused bias + GELU is the tanh approximation, and goes by F.gelu's name.
        activation_func=F.gelu,
        bias_activation_fusion=fuses_elementwise and has_fused_gelu,
        # Its gradient of the bias is a sum, whose order may follow from the first length that its
        # compiler meets: a resumed run meets another one first. Suspected; not seen by itself.
        bias_dropout_fusion=fuses_elementwise and not arithmetic.deterministic,
        masked_softmax_fusion=False,
        init_method_std=0.02,
        tensor_model_parallel_size=degrees.tp,
        pipeline_model_parallel_size=degrees.pp,
        virtual_pipeline_model_parallel_size=degrees.virtual_pp if degrees.virtual_pp > 1 else None,
        sequence_parallel=degrees.sequence_parallel,
        params_dtype=dtype,
        pipeline_dtype=dtype,
        fp16=dtype is torch.float16,
        bf16=dtype is torch.bfloat16,
        calculate_per_token_loss=True,  # losses are sums over global counts: nothing to average
        deallocate_pipeline_outputs=True,
        gradient_accumulation_fusion=arithmetic.fuses_gradient_accumulation,
        deterministic_mode=arithmetic.deterministic,
        # Each message by itself. In a batch those of two stages with virtual ones match in another
        # order than they are meant in, activations for gradients: each stage is both neighbours of
        # the other. And megatron waits for the whole device after every batch.
        batch_p2p_comm=False,
        **_RECOMPUTE[arithmetic.recompute],
    )


def _allow_variants() -> None:
    config: Any = torch._dynamo.config
    config.recompile_limit = max(config.recompile_limit, COMPILED_VARIANTS)


def _provide_gradient_fusion() -> None:
    """Give megatron's linear layers their fused weight gradient: apex's kernel where it is
    installed, else the matrix product of torch that adds to an fp32 sum."""
    if not megatron_layers._grad_accum_fusion_available:
        megatron_layers.fused_weight_gradient_mlp_cuda = SimpleNamespace(
            wgrad_gemm_accum_fp32=_add_weight_gradient
        )
        megatron_layers._grad_accum_fusion_available = True


def _add_weight_gradient(inputs: Tensor, grad_output: Tensor, main_grad: Tensor) -> None:
    """main_grad [out, in] += grad_output [T, out]^T inputs [T, in], in fp32."""
    add_matmul(main_grad, grad_output.t(), inputs)


class LayerNorm(torch.nn.Module):
    """Layer norm whose parameters tell megatron when their gradients are partial (sequence
    parallel)."""

    def __init__(
        self, config: TransformerConfig, hidden_size: int, eps: float = 1e-5, **unused: Any
    ) -> None:
        super().__init__()
        self.eps = eps
        device = torch.cuda.current_device()
        self.weight = torch.nn.Parameter(
            torch.ones(hidden_size, device=device, dtype=config.params_dtype)
        )
        self.bias = torch.nn.Parameter(
            torch.zeros(hidden_size, device=device, dtype=config.params_dtype)
        )
        _tell_of_sequence_parallel(self, config)

    def forward(self, x: Tensor) -> Tensor:
        """Return the normalised x, shape [..., hidden]."""
        return layer_norm(x, self.weight, self.bias, eps=self.eps)


class RMSNorm(torch.nn.Module):
    """x / sqrt(mean(x^2) + eps) * weight, in fp32 within (Zhang and Sennrich 2019); its weight
    tells megatron what LayerNorm's does."""

    def __init__(
        self, config: TransformerConfig, hidden_size: int, eps: float, **unused: Any
    ) -> None:
        super().__init__()
        self.eps = eps
        device = torch.cuda.current_device()
        self.weight = torch.nn.Parameter(
            torch.ones(hidden_size, device=device, dtype=config.params_dtype)
        )
        _tell_of_sequence_parallel(self, config)

    def forward(self, x: Tensor) -> Tensor:
        """Return the normalised x, shape [..., hidden]."""
        return rms_norm(x, self.weight, eps=self.eps)


_NORMS = {"layer": LayerNorm, "rms": RMSNorm}


def _tell_of_sequence_parallel(norm: torch.nn.Module, config: TransformerConfig) -> None:
    for parameter in norm.parameters():
        parameter.sequence_parallel = config.sequence_parallel  # type: ignore[attr-defined]


class ParallelLayer(TransformerLayer):
    """x + attention(norm(x)) + MLP(norm'(x)): both read the same (Wang and Komatsuzaki 2021)."""

    def forward(self, hidden_states: Tensor, **rest: Any) -> tuple[Tensor, Tensor | None]:  # type: ignore[override]
        """Return what the next layer reads, [T, 1, H]."""
        attended, context = self._forward_attention(hidden_states, **rest)
        out = self.mlp(self.pre_mlp_layernorm(hidden_states))
        return _added(self, self.mlp_bda, out, attended), context


class PostNormLayer(TransformerLayer):
    """y = norm(x + attention(x)), norm'(y + MLP(y)): the first Transformer's (Vaswani et al.
    2017)."""

    def forward(  # type: ignore[override]
        self,
        hidden_states: Tensor,
        attention_mask: Tensor | None = None,
        *,
        packed_seq_params: Any = None,
        **unused: Any,
    ) -> tuple[Tensor, Tensor | None]:
        """Return what the next layer reads, [T, 1, H]."""
        out = self.self_attention(
            hidden_states, attention_mask=attention_mask, packed_seq_params=packed_seq_params
        )
        attended = self.input_layernorm(_added(self, self.self_attn_bda, out, hidden_states))
        out = _added(self, self.mlp_bda, self.mlp(attended), attended)
        return _viewless(self.pre_mlp_layernorm(out)), None


def _added(layer: TransformerLayer, bda: Any, branch: Any, residual: Tensor) -> Tensor:
    """A branch's output with its bias and dropout, added to what the layer read."""
    add = bda(layer.training, layer.config.bias_dropout_fusion)
    with layer.bias_dropout_add_exec_handler():
        out: Tensor = add(branch, residual, layer.hidden_dropout)
    return _viewless(out)


def _viewless(hidden: Tensor) -> Tensor:
    """A pipeline frees what it has sent, which no view of another tensor may be."""
    out: Tensor = make_viewless_tensor(hidden, hidden.requires_grad, keep_graph=True)
    return out


class _OrderedEmbedding(torch.nn.Embedding):
    """An embedding whose gradient is added up in a fixed order, where torch is asked for that."""

    def forward(self, numbers: Tensor) -> Tensor:
        return self.weight[numbers]


def position_type(form: Form) -> Literal["learned_absolute", "none"]:
    """Return megatron's word for what is added to the tokens' embeddings; our attention rotates."""
    return "learned_absolute" if form.rotary is None else "none"


def order_positions(embedding: Any, config: TransformerConfig) -> None:
    """In the deterministic mode, have the gradient of megatron's learned positions added up in a
    fixed order, as megatron has that of the tokens.

    The backward pass of torch's own embedding has a race, rare but without a mode that closes it
    (pytorch pull request 187687).
    """
    if config.deterministic_mode and embedding.add_position_embedding:
        embedding.position_embeddings = _OrderedEmbedding.from_pretrained(
            embedding.position_embeddings.weight, freeze=False
        )


def block_spec(config: LayerConfig, vp_stage: int | None) -> TransformerBlockSubmodules:
    """Return the layers of this pipeline stage: attention, MLP, their norms, and the final one."""
    norm = _NORMS[config.form.norm]
    norm_of_heads = norm if config.form.norms_heads else IdentityOp
    is_after = config.form.is_post_norm
    layer = ModuleSpec(
        module=PostNormLayer
        if is_after
        else (ParallelLayer if config.form.is_parallel else TransformerLayer),
        submodules=TransformerLayerSubmodules(
            input_layernorm=norm,
            self_attention=ModuleSpec(
                module=SelfAttention,
                params={"attn_mask_type": AttnMaskType.causal},
                submodules=SelfAttentionSubmodules(
                    linear_qkv=ColumnParallelLinear,
                    core_attention=PackedAttention,
                    linear_proj=RowParallelLinear,
                    q_layernorm=norm_of_heads,
                    k_layernorm=norm_of_heads,
                ),
            ),
            self_attn_bda=get_bias_dropout_add,
            pre_mlp_layernorm=norm,
            mlp=MLP,
            mlp_bda=get_bias_dropout_add,
        ),
    )
    num_layers = get_num_layers_to_build(config, vp_stage=vp_stage)
    return TransformerBlockSubmodules(
        layer_specs=[layer] * num_layers, layer_norm=None if is_after else norm
    )
