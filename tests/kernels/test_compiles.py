"""Every kernel compiles for a GPU, on a machine without one: the interpreter checks no types.

Run as a program, with the kernels decorated for the compiler, it calls the public functions on CPU
tensors and compiles each launch for sm_90 in place of running it. What makes a kernel slow shows in
the code: registers that spill, loads of a row by single columns, a loop that waits for its loads.
"""

import importlib
import itertools
import os
import pkgutil
import re
import subprocess
import sys
import tempfile
from collections.abc import Callable
from pathlib import Path

import torch
import triton
from torch import Tensor

import kernels
from kernels import launch

DTYPES = {
    torch.float64: "fp64",
    torch.float32: "fp32",
    torch.bfloat16: "bf16",
    torch.float16: "fp16",
    torch.int64: "i64",
    torch.int32: "i32",
    torch.bool: "i1",
}
READS_ROWS = {
    "kernels.row_state _row_state_kernel",
    "kernels.row_gradient _row_gradient_kernel",
    "kernels.row_pass _row_pass_kernel",
    "kernels.full_kl _kl_state_kernel",
    "kernels.full_kl _kl_gradient_kernel",
}
READS_AHEAD = {
    "kernels.decode_attention _split_kernel",
    "kernels.decode_attention _group_split_kernel",
}
# One 64-bit value, which the assembler of Triton 3.7 puts aside once in some kernels.
MAX_STACK_BYTES = 8
# What a program may take of a multiprocessor's on an A100; 227 KiB on an H100.
MAX_SHARED_BYTES = 163 * 2**10
NUM_SCALARS = 6  # a row's state and gradients, and the logit of its label
CU_SEQLENS = torch.tensor([0, 5, 32], dtype=torch.int32)
COUNT = torch.tensor(9)


def leaf(*shape: int, dtype: torch.dtype = torch.bfloat16) -> Tensor:
    return torch.randn(shape).to(dtype).requires_grad_()


def gae_launches() -> None:
    from kernels.gae import gae

    tokens = [torch.randn(32) for _ in range(3)]
    for kl_coef, kind in ((0.1, "k1"), (torch.tensor(0.1), "k2"), (0.1, "k3")):
        gae(*tokens, torch.randn(2), CU_SEQLENS, tokens[0] > 0, kl_coef=kl_coef, kl_estimator=kind)
    whole = {"kl_coef": 1, "gamma": 1, "lam": 1}  # of another type than the numbers they stand for
    gae(*tokens, torch.randn(2), CU_SEQLENS, tokens[0] > 0, **whole)


def ppo_launches() -> None:
    from kernels.moments import Whitening
    from kernels.policy_loss import policy_metrics, policy_token_losses
    from kernels.value_loss import value_loss

    tokens = [leaf(32, dtype=torch.float32), torch.randn(32), torch.randn(32)]
    mask, rows = tokens[1] > 0, torch.arange(32)
    value_loss(*tokens, mask, COUNT)
    value_loss(*tokens, mask, COUNT, cliprange=1)
    for whitening in (None, Whitening(torch.zeros(()), torch.ones(()))):
        *_, terms = policy_token_losses(tuple(tokens), rows, COUNT, whitening=whitening)
        policy_metrics(terms, mask, COUNT)


def ranking_launches() -> None:
    from kernels.ranking_loss import ranking_loss

    ranking_loss(leaf(32), torch.ones(32, dtype=torch.int64), CU_SEQLENS)


def layer_norm_launches() -> None:
    from kernels.layer_norm import layer_norm

    # The 13B model's 5120 is the widest block there is that holds a row and its two sums.
    for width in (80, 768, 2048, 4096, 5120, 12288):
        weight, bias = leaf(width), leaf(width)
        layer_norm(leaf(4, width), weight, bias, eps=1e-5).sum().backward()
    half, affine = leaf(4, 768, dtype=torch.float16), [leaf(768, dtype=torch.float32)] * 2
    layer_norm(half, *affine, eps=1e-5).sum().backward()


def gated_launches() -> None:
    from kernels.gated import ACTIVATIONS, gated

    for activation in ACTIVATIONS:
        gated(leaf(4, 2 * 11008), activation).sum().backward()
    for dtype in (torch.float16, torch.float32, torch.float64):
        for bias in (None, leaf(2 * 1540, dtype=dtype)):
            gated(leaf(4, 2 * 1540, dtype=dtype), "gelu", bias).sum().backward()


def rotate_launches() -> None:
    from kernels.rotate import rotate

    sizes = ((128, 64), (64, 32), (80, 10), (96, 48))
    for dtype, (dim, half) in itertools.product((torch.bfloat16, torch.float32), sizes):
        angles = torch.rand(4, 1, half).to(dtype)
        qkv = leaf(4, 8, 6, dim, dtype=dtype)  # of a head of keys: 4 of queries, it, and its values
        query, key = rotate(qkv[:, :, :-2], qkv[:, :, -2], angles, angles)
        (query.sum() + key.sum()).backward()


def sample_launches() -> None:
    from kernels.sample import sample

    key = {"sample_index": torch.arange(3), "position": torch.arange(3)}
    for options in ({"temperature": 0.7}, {"temperature": 0.0}, {"temperature": 1.0, "top_k": 3}):
        for seed in (1, torch.tensor(1)):
            sample(leaf(3, 50304).detach(), **key, **options, seed=seed)


def decode_launches() -> None:
    from kernels.append_kv import append_kv
    from kernels.decode_attention import decode_attention

    for dim, dtype in itertools.product((64, 80, 128, 256), (torch.bfloat16, torch.float32)):
        cache = torch.zeros(2, 40, 16, 12, dim, dtype=dtype)
        query = leaf(3, 12, dim, dtype=dtype).detach()
        tables = torch.zeros(3, 20, dtype=torch.int32)
        append_kv(query, query, cache[0], cache[1], torch.arange(3))
        inputs = (query, cache[0], cache[1], tables, tables[:, 0].contiguous())
        decode_attention(*inputs, scale=0.1)
        wide = leaf(3, 84, dim, dtype=dtype).detach()  # groups of 7
        decode_attention(wide, *inputs[1:], scale=0.1)
        if dim > 80:
            decode_attention(*inputs, scale=0.1, window=100)
            decode_attention(wide, *inputs[1:], scale=0.1, window=100)
            cache = torch.zeros(2, 40, 16, 1, dim, dtype=dtype)
            decode_attention(wide, cache[0], cache[1], *inputs[3:], scale=0.1)  # a group of 84


def logprob_launches() -> None:
    from kernels.full_kl import full_kl
    from kernels.linear_logprobs import linear_logprobs
    from kernels.logprobs import logprobs

    labels = torch.arange(4)
    for dtype in (torch.float32, torch.bfloat16):
        for with_entropy in (False, True):
            outputs = logprobs(leaf(4, 50304, dtype=dtype), labels, with_entropy=with_entropy)
            sum(x.sum() for x in outputs if x is not None).backward()
        full_kl(leaf(4, 50304, dtype=dtype), leaf(4, 50304, dtype=dtype)).sum().backward()
    columns = leaf(500, 4)  # rows and columns of its transpose are strided
    logprobs(columns.t(), labels)[0].sum().backward()
    full_kl(columns.t(), leaf(500, 4).t()).sum().backward()
    for dtype in (torch.bfloat16, torch.float16):
        head = leaf(4, 64, dtype=dtype), leaf(500, 64, dtype=dtype)
        linear_logprobs(*head, labels)[0].sum().backward()


def pass_launches() -> None:
    from kernels.row_pass import row_pass
    from kernels.row_state import RowSpec

    labels, slope, logprobs = torch.arange(4), torch.tensor(-0.1), torch.empty(4)
    spec = RowSpec(num_valid_vocab=50257)
    logits = torch.randn(4, 50304)
    dz = logits.view(torch.bfloat16)[:, :50304]
    for out in (dz, torch.empty_like(logits)):
        row_pass(logits, labels, slope, logprobs, spec, out=out)


def merge_launches() -> None:
    from kernels.row_merge import write_merged_results
    from kernels.row_state import RowSpec, empty_results

    for num_shards, with_entropy in ((2, False), (8, True)):
        spec = RowSpec(num_valid_vocab=1, with_entropy=with_entropy)
        states = torch.rand(num_shards, 300, 4)
        results = empty_results(300, states, with_entropy)
        write_merged_results(results, states, torch.zeros(300, dtype=torch.int64), spec)


def compile_launch(kernel: triton.JITFunction, *args: object, **options: object) -> None:
    """Compile a kernel as this launch would: `triton.JITFunction.run` without a device."""
    from triton.backends.compiler import GPUTarget
    from triton.compiler import ASTSource

    names = [parameter.name for parameter in kernel.params]
    values = dict(zip(names, args, strict=False)) | {n: options[n] for n in names if n in options}
    signature, constants, attributes = {}, {}, {}
    for i, parameter in enumerate(kernel.params):
        value = values[parameter.name]
        is_free = not parameter.do_not_specialize
        if (
            parameter.is_constexpr
            or value is None
            or (is_free and type(value) is int and value == 1)
        ):
            signature[parameter.name], constants[(i,)] = "constexpr", value
            continue
        if isinstance(value, Tensor):
            signature[parameter.name] = "*" + DTYPES[value.dtype]
        elif isinstance(value, float):
            signature[parameter.name] = "fp32"
        else:
            signature[parameter.name] = "i32" if value < 2**31 else "i64"
        if isinstance(value, Tensor) or (is_free and isinstance(value, int) and value % 16 == 0):
            attributes[(i,)] = [["tt.divisibility", 16]]
    source = ASTSource(kernel, signature, constants, attributes)
    warps = {"num_warps": options["num_warps"]} if "num_warps" in options else {}
    compiled = triton.compile(source, target=GPUTarget("cuda", 90, 32), options=warps)
    name = f"{kernel.__module__} {kernel.__name__}"
    assert stack_bytes(compiled.asm["cubin"]) <= MAX_STACK_BYTES, f"{name} spills: {values}"
    shared = compiled.metadata.shared
    assert shared <= MAX_SHARED_BYTES, f"{name} takes {shared} bytes of shared memory: {values}"
    narrow = narrow_products(compiled.asm["ttir"])
    assert not narrow, f"{name}: offsets wrap beyond 2^31: {narrow}"
    if name in READS_ROWS and values["num_columns"] % 16 == 0:
        narrow = re.findall(r"ld\.global\.b(?:16|32) ", compiled.asm["ptx"])
        assert "ld.global.v4" in compiled.asm["ptx"], name
        assert len(narrow) <= NUM_SCALARS, f"{name} reads single columns: {values}"
    if name in READS_AHEAD:
        assert "cp.async.cg" in compiled.asm["ptx"], "loads do not run ahead of the loop"
    print(name)


def narrow_products(ttir: str) -> list[str]:
    """Products in 32 bits of two numbers that are no constants: a row or a column times its stride.

    Such an offset wraps in a tensor of more than 2^31 elements.
    """
    constants, found = set(), []
    for line in ttir.splitlines():
        result, _, operation = line.strip().partition(" = ")
        operands = re.findall(r"%[\w.-]+(?:#\d+)?", operation)
        is_shaped = operation.startswith(("tt.splat", "tt.broadcast", "tt.expand_dims"))
        if operation.startswith("arith.constant") or (is_shaped and constants.issuperset(operands)):
            constants.add(result)
        elif re.match(r"arith.muli .*: (tensor<\w+x)?i32\b", operation):
            found += [] if constants.intersection(operands) else [line.strip()]
    return found


def stack_bytes(cubin: bytes) -> int:
    """Bytes of local memory a thread of the compiled kernel takes: registers that spilled."""
    with tempfile.NamedTemporaryFile(suffix=".cubin") as file:
        file.write(cubin)
        file.flush()
        command = [triton.knobs.nvidia.cuobjdump.path, "-res-usage", file.name]
        usage = subprocess.run(command, capture_output=True, text=True, check=True).stdout
    return int(re.search(r"STACK:(\d+)", usage).group(1))


def compile_all() -> None:
    """Make every launch of the public functions a compilation."""
    triton.JITFunction.run = lambda self, *args, grid, warmup, **options: compile_launch(
        self, *args, **options
    )
    launch.interpreting = lambda: True  # CPU tensors take the Triton path
    launch.architecture = lambda device: "sm90"  # and its block sizes
    launches: list[Callable[[], None]] = [
        function for name, function in globals().items() if name.endswith("_launches")
    ]
    for function in launches:
        function()


def test_products_that_wrap_are_seen() -> None:
    ttir = """
    %c2048_i32 = arith.constant 2048 : i32
    %many = tt.splat %c2048_i32 : i32 -> tensor<64xi32>
    %whole = arith.muli %count, %c2048_i32 : i32
    %first = arith.muli %lanes, %many : tensor<64xi32>
    %row = arith.muli %wide, %stride_1 : i64
    %columns = arith.muli %first, %stride_2 : tensor<64xi32>
    %at = arith.muli %loop#1, %stride : i32
    """
    wraps = [line.split(" = ")[0] for line in narrow_products(ttir)]
    assert wraps == ["%columns", "%at"]


def test_every_kernel_compiles_for_sm_90() -> None:
    modules = [
        importlib.import_module(f"kernels.{module.name}")
        for module in pkgutil.iter_modules(kernels.__path__)
    ]
    names = {
        f"{module.__name__} {name}"
        for module in modules
        for name in vars(module)
        if name.endswith("_kernel") and hasattr(vars(module)[name], "fn")
    }
    environment = {name: x for name, x in os.environ.items() if name != "TRITON_INTERPRET"}
    process = subprocess.run(
        [sys.executable, "-W", "ignore", "-m", "tests.kernels.test_compiles"],
        env=environment,
        cwd=Path(__file__).parents[2],
        capture_output=True,
        text=True,
        timeout=600,
    )
    assert process.returncode == 0, process.stderr[-3000:]
    assert set(process.stdout.splitlines()) == names, "a kernel has no case here"


if __name__ == "__main__":
    compile_all()
