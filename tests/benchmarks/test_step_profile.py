"""Idle time is what nothing covers, and a kernel's name says what it is for."""

import pytest
import torch

from benchmarks.step_profile import kind_of, profile_call, profile_of, profile_of_operators


def test_idle_is_what_no_kernel_covers():
    # Two that overlap, a gap of 2 ms, one more: 0 to 6 and 8 to 10 ms.
    spans = [(8, 10, "gelu"), (0, 4, "sm90_xmma_gemm"), (2, 6, "Memcpy DtoH"), (3, 4, "gelu")]
    found = profile_of([(10**6 * start, 10**6 * end, name) for start, end, name in spans])
    assert found.wall_ms == 10
    assert found.idle_ms == 2
    assert found.by_kind == {"gemm": 4, "copy": 4, "elementwise": 3}
    assert found.kernels[2] == ("gelu", 3.0, 2)
    assert found.table().splitlines()[0] == "10.000 ms, 2.000 ms of it idle"


def test_operators_own_time_is_without_those_they_call():
    # 0 to 10 in all: linear 1 to 5 calls mm 2 to 4, which begins as its view does; then Python's
    # own function 6 to 9 calls exp 7 to 8, and an engine's step is nobody's operator.
    spans = [(0, 10, "phase"), (1, 5, "aten::linear"), (2, 4, "aten::mm"), (2, 3, "aten::view")]
    spans += [(6, 9, "_Loss"), (7, 8, "aten::exp"), (9, 10, "autograd::engine::evaluate: X")]
    found = profile_of_operators([(10**6 * start, 10**6 * end, name) for start, end, name in spans])
    assert found.wall_ms == 10
    assert found.by_kind == {"gemm": 3, "view": 1, "elementwise": 1}
    assert found.idle_ms == 5
    assert ("aten::mm", 1.0, 1) in found.kernels


@pytest.mark.parametrize(
    ("name", "kind"),
    [
        ("nvjet_hsh_128x256_64x4_1x2_h_bz_coopA_NNT", "gemm"),
        ("void cutlass::Kernel2<cutlass_80_wmma_tensorop_bf16_s161616gemm>", "gemm"),
        ("void pytorch_flash::flash_bwd_dq_dk_dv_loop_seqk_parallel_kernel<cutlass>", "attention"),
        ("_row_gradient_kernel", "head"),
        ("_backward_kernel", "norm"),
        ("void at::native::layer_norm_grad_input_kernel_vectorized", "norm"),
        ("void at::native::multi_tensor_apply_kernel<FusedAdamMathFunctor>", "optimizer"),
        ("void at::native::vectorized_elementwise_kernel<4, GeluBackward>", "elementwise"),
        ("triton_poi_fused_add_0", "elementwise"),
        ("Memset (Device)", "copy"),
        ("ncclDevKernel_AllReduce", "collective"),
        ("void at::native::(anonymous namespace)::indexSelectLargeIndex<float>", "gather"),
        ("aten::mm", "gemm"),
        ("aten::mul", "elementwise"),
        ("aten::_scaled_dot_product_flash_attention_for_cpu_backward", "attention"),
        ("aten::index_select", "gather"),
        ("aten::copy_", "copy"),
        ("aten::_unsafe_view", "view"),
        ("aten::_fused_adamw_", "optimizer"),
        ("mystery", "other"),
    ],
)
def test_kind_of_a_kernel(name, kind):
    assert kind_of(name) == kind


def test_a_call_on_a_cpu_is_its_operators():
    a = torch.randn(300, 300)
    found = profile_call(lambda: (a @ a).exp(), torch.device("cpu"))
    assert found.by_kind["gemm"] > 0
    assert sum(found.by_kind.values()) + found.idle_ms == pytest.approx(found.wall_ms, rel=0.05)
