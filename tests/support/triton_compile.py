"""Compile the Triton kernels ahead of time, for GPUs that are not there; print what came out.

    python -m support.triton_compile 80,90,100             all kernels
    python -m support.triton_compile 90 1x1 "dx of 1x1"    these

A line of JSON a kernel and GPU: name, arch, which matrix instructions, whether of 8-bit integers,
whether tiles are copied by the TMA unit, registers and bytes of local memory a thread. Runs where
the interpreter is off.
"""

import json
import re
import subprocess
import sys
import tempfile
from collections.abc import Iterator
from pathlib import Path
from typing import Any

import torch
import triton
from triton.backends.compiler import GPUTarget
from triton.compiler import ASTSource

from fastcnn.common.activation import ACT_NUMBER
from fastcnn.common.batch_norm_params import Norm
from fastcnn.common.conv_operands import Sums
from fastcnn.ops.conv2d_int8.cuda import default_tile as default_int8_tile
from fastcnn.triton import (
    conv2d_bwd_kernels,
    conv2d_int8_kernels,
    conv2d_kernels,
    depthwise_kernels,
    pointwise_bwd_kernels,
)
from fastcnn.triton.tiles import (
    Tile,
    blocks,
    default_tile,
    depthwise_blocks,
    depthwise_tile,
    half_steps,
    is_lean,
    weight_tile,
)

MATRIX = {"mma.sync": "mma.sync", "wgmma": "wgmma.mma_async", "tcgen05": "tcgen05.mma"}
RELU = ACT_NUMBER["relu"]
BY_DESCRIPTORS = (
    conv2d_kernels.pointwise_kernel,
    pointwise_bwd_kernels.pointwise_bwd_input_kernel,
    pointwise_bwd_kernels.pointwise_bwd_weight_kernel,
)
POINTWISE = {"ACT": RELU, "PRE_ACT": RELU, "DY_ACT": RELU, "GROUP_M": 8}
# Of floating point convolutions; the others are images.
NUMBERS = {"bias_ptr", "mean_ptr", "square_ptr", "sum_ptr", "sum_xhat_ptr", "parts_ptr"}
NUMBERS |= {"means_ptr", "squares_ptr"}
NORM: Any = Norm(*["*fp32"] * 4, "fp32")  # type: ignore[arg-type]
STRUCTS = {"pre_norm": NORM, "norm": NORM, "dy_norm": NORM, "dy_sums": Sums(*["*fp32"] * 2)}
SCALARS = {"share", "residual_scale", "six", "x_scale", "out_scale"}


def window(size: int, stride: int) -> dict[str, int]:
    """The constants of a convolution's geometry."""
    sides = {
        "KERNEL": size,
        "STRIDE": stride,
        "PADDING": size // 2,
        "DILATION": 1,
        "GCD": 1,
    }
    return {f"{name}_{side}": value for name, value in sides.items() for side in "HW"}


def cases() -> Iterator[tuple[str, Any, dict[str, Any], set[str]]]:
    """A name, a kernel, its constants, and what is None. Most have every epilogue."""
    stem, three = {**window(7, 2), "FLAT": True}, {**window(3, 1), "FLAT": False}
    forward, bwd = conv2d_kernels, conv2d_bwd_kernels
    bias, statistics = {"bias_ptr"}, {"mean_ptr", "square_ptr"}
    yield "stem", forward.conv2d_kernel, stem, {"pre_norm", *bias}
    for name, kernel, constants in (
        ("3x3", forward.conv2d_kernel, three),
        ("1x1", forward.pointwise_kernel, {}),
    ):
        yield name, kernel, constants, bias
        yield f"{name} in evaluation", kernel, constants, {"pre_norm", *bias, *statistics}
        yield f"{name} in training", kernel, constants, {"norm", "residual_ptr", *bias}
    yield "dx of 3x3", bwd.conv2d_bwd_input_kernel, three, set()
    yield "dx of 1x1, stride 2", bwd.conv2d_bwd_input_kernel, window(1, 2), set()
    int8 = {**three, "ACT": 1, "QUANTISED": True, "LEAST": -128, "MOST": 127}
    yield "int8 3x3", conv2d_int8_kernels.conv2d_int8_kernel, int8, set()
    yield "depthwise", depthwise_kernels.depthwise_kernel, {**three, "MULTIPLIER": 1}, bias
    pointwise = pointwise_bwd_kernels
    behind, before = {"raw_ptr", "norm", "sum_ptr", "sum_xhat_ptr"}, {"dy_norm", "dy_sums", "share"}
    for name, kernel, absent in (
        ("dx of 1x1", pointwise.pointwise_bwd_input_kernel, behind),
        ("dw of 1x1", pointwise.pointwise_bwd_weight_kernel, {"pre_norm"}),
    ):
        yield name, kernel, {}, set()
        yield f"{name}, one norm", kernel, {}, absent
        yield f"{name}, no norm", kernel, {}, {"dy_raw_matrix", *before, *absent}
    merged = {"ROWS": 128, "BLOCK_T": 1024, "BLOCK_C": 8}
    yield "merge of statistics", forward.merge_statistics_kernel, merged, set()
    yield "sums of tiles", bwd.sum_tiles_kernel, {"BLOCK_T": 1024, "BLOCK_C": 8}, set()
    yield "stem in float32", forward.conv2d_kernel, stem, {"pre_norm", *bias}
    yield "3x3 in training, float32", forward.conv2d_kernel, three, {"norm", "residual_ptr", *bias}
    yield "dw of 3x3", bwd.conv2d_bwd_weight_kernel, three, set()
    yield "dw of the stem", bwd.conv2d_bwd_weight_kernel, stem, {"pre_norm"}


def compile_one(
    kernel: Any, constants: dict[str, Any], absent: set[str], arch: int, half: str
) -> dict[str, Any]:
    """Compile for one GPU: bfloat16 or float16 images, float32 numbers per channel."""
    # As the launches choose.
    lean = "sum_ptr" not in set(kernel.arg_names) - absent
    if "residual_ptr" in kernel.arg_names:
        given = {"pre_norm", "residual_ptr"} - absent
        by_descriptors = kernel is conv2d_kernels.pointwise_kernel
        lean = is_lean("pre_norm" in given, "residual_ptr" in given, by_descriptors, arch)
    int8, depthwise = "QUANTISED" in constants, "MULTIPLIER" in constants
    if int8:
        tile = default_int8_tile(256 * 56 * 56, 256)
    elif "parts_ptr" in kernel.arg_names:
        both = not {"pre_norm", "dy_norm"} & absent
        tile = weight_tile(2048, 2048, 256 * 56 * 56, torch.bfloat16, both)
    else:
        dtype = torch.float32 if half == "fp32" else torch.bfloat16
        tile = default_tile(256 * 56 * 56, 256, 256, dtype, lean)
        if kernel is pointwise_bwd_kernels.pointwise_bwd_input_kernel and "dy_norm" not in absent:
            tile = half_steps(tile)
    tile = depthwise_tile(256) if depthwise else tile
    options = depthwise_blocks(tile) if depthwise else blocks(tile)
    known = {**options, **POINTWISE, **constants}
    signature, values, divisible = {}, {}, {}
    for place, name in enumerate(kernel.arg_names):
        if name in absent or name in known:
            signature[name], values[name] = "constexpr", known.get(name)
        elif name.endswith("_matrix"):
            rows, columns = block(kernel, name, tile)
            signature[name] = f"tensordesc<{half}[{rows}, {columns}]>"
        elif name in STRUCTS:
            signature[name] = STRUCTS[name]
            for i, field in enumerate(STRUCTS[name]):
                if field.startswith("*"):
                    divisible[(place, i)] = [["tt.divisibility", 16]]
        elif name in SCALARS:
            signature[name] = "fp32"
        else:
            signature[name] = _pointer(name, half, int8) if name.endswith("_ptr") else "i32"
            if not kernel.params[place].do_not_specialize:
                divisible[(place,)] = [["tt.divisibility", 16]]
    source = ASTSource(kernel, signature=signature, constexprs=values, attrs=divisible)
    options = {k: v for k, v in options.items() if k not in values and k.islower()}
    if "BLOCK_T" in constants:
        options["num_warps"] = 8
    made = triton.compile(source, target=GPUTarget("cuda", arch, 32), options=options)
    ptx = made.asm["ptx"]
    return {
        "arch": arch,
        "matrix": [name for name, word in MATRIX.items() if word in ptx],
        "int8": ".s8.s8" in ptx or "kind::i8" in ptx,
        "tma": "cp.async.bulk.tensor" in ptx,
        "shared": made.metadata.shared,
        **resources(made.asm["cubin"]),
    }


def block(kernel: Any, name: str, tile: Tile) -> tuple[int, int]:
    """The block of a matrix that a step reads."""
    forward, bwd_input, _ = BY_DESCRIPTORS
    if kernel is forward:
        return (tile.m if name == "x_matrix" else tile.n), tile.k
    if kernel is bwd_input:
        return (tile.k, tile.n) if name == "w_matrix" else (tile.m, tile.k)
    return tile.k, (tile.n if name == "x_matrix" else tile.m)


def _pointer(name: str, half: str, int8: bool) -> str:
    if int8:
        vectors = {"sum_ptr": "*i32", "weight_scale_ptr": "*fp32", "bias_ptr": "*fp32"}
        return vectors.get(name, "*i8")
    return "*fp32" if name in NUMBERS else f"*{half}"


def resources(cubin: bytes) -> dict[str, int]:
    """Registers and local memory of a thread, as the GPU's code states them."""
    tool = Path(triton.__file__).parent / "backends/nvidia/bin/cuobjdump"
    with tempfile.NamedTemporaryFile(suffix=".cubin") as file:
        file.write(cubin)
        file.flush()
        said = subprocess.run(
            [tool, "--dump-resource-usage", file.name], capture_output=True, text=True, check=True
        ).stdout
    found = re.search(r"REG:(\d+) STACK:(\d+) SHARED:\d+ LOCAL:(\d+)", said)
    assert found is not None, said
    return {"registers": int(found[1]), "stack": int(found[2]), "local": int(found[3])}


if __name__ == "__main__":
    _, archs, *names = sys.argv
    for name, kernel, constants, absent in cases():
        if names and name not in names:
            continue
        for arch in map(int, archs.split(",")):
            if arch < 90 and kernel in BY_DESCRIPTORS:
                continue  # no TMA: the other kernel runs there
            half = "fp16" if "stem" in name else "bf16"
            half = "fp32" if "float32" in name else half
            row = compile_one(kernel, constants, absent, arch, half)
            print(json.dumps({"name": name, "triton": triton.__version__, **row}), flush=True)
