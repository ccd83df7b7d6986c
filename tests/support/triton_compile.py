"""Compile the Triton kernels ahead of time, for GPUs that are not there; print what came out.

    python -m support.triton_compile 80,90,100             all kernels
    python -m support.triton_compile 90 1x1 "int8 3x3"     these
    python -m support.triton_compile 90 --tiles            float convolutions at every tile

A line of JSON a kernel and GPU: name, arch, which matrix instructions, whether of 8-bit integers,
whether there is float64, or a fused multiply-add of float32, whether tiles are copied by the TMA
unit, whether a wgmma takes its left operand from registers, whether ptxas had to serialise them,
registers and bytes of local memory a thread. Runs where the interpreter is off.
"""

import itertools
import json
import re
import subprocess
import sys
import tempfile
from collections.abc import Iterator
from pathlib import Path
from typing import Any, NamedTuple

import torch
import triton
from triton.backends.compiler import GPUTarget
from triton.backends.nvidia.compiler import get_ptxas
from triton.compiler import ASTSource

from fastcnn.common.activation import ACT_NUMBER
from fastcnn.common.batch_norm_params import Norm
from fastcnn.ops.conv2d_int8.cuda import default_tile as default_int8_tile
from fastcnn.triton.conv2d_int8_kernels import conv2d_int8_kernel
from fastcnn.triton.conv2d_kernels import conv2d_kernel, merge_statistics_kernel, pointwise_kernel
from fastcnn.triton.depthwise_kernels import depthwise_kernel
from fastcnn.triton.tiles import (
    Tile,
    blocks,
    default_tile,
    depthwise_blocks,
    depthwise_tile,
    is_lean,
)

MATRIX = {"mma.sync": "mma.sync", "wgmma": "wgmma.mma_async", "tcgen05": "tcgen05.mma"}
# wgmma.mma_async.sync.aligned.shape.types {accumulators}, left operand, ...: a descriptor of shared
# memory, or a list of registers.
FROM_REGISTERS = re.compile(r"wgmma\.mma_async\S+\s*\{[^}]*\}\s*,\s*\{")
SERIALISED = "C7515"  # ptxas: wgmma.mma_async instructions are serialized
# Of floating point convolutions; the others are images.
NUMBERS = {"mean_ptr", "square_ptr", "means_ptr", "squares_ptr"}
NORM: Any = Norm(*["*fp32"] * 4, "fp32")  # type: ignore[arg-type]
SCALARS = {"residual_scale", "six", "x_scale", "out_scale"}
HALVES = {"fp32": torch.float32, "bf16": torch.bfloat16, "fp16": torch.float16}


class Case(NamedTuple):
    """A kernel, its constants, what is None, and the sizes that its tile is chosen by.

    dtype: of x, and but for u8 of the other images.
    """

    kernel: Any
    constants: dict[str, Any]
    absent: set[str]
    dtype: str = "bf16"
    pixels: int = 256 * 56 * 56
    c_out: int = 256
    c_in: int = 256


def window(size: int, stride: int) -> dict[str, Any]:
    """The constants of a convolution's geometry."""
    sides = {"KERNEL": size, "STRIDE": stride, "PADDING": size // 2, "DILATION": 1}
    return {f"{name}_{side}": value for name, value in sides.items() for side in "HW"}


STEM, THREE = {**window(7, 2), "FLAT": True}, {**window(3, 1), "FLAT": False}
KERNELS: dict[str, tuple[Any, dict[str, Any]]] = {
    "1x1": (pointwise_kernel, {}),
    "1x1, stride 2": (conv2d_kernel, {**window(1, 2), "FLAT": False}),
    "3x3": (conv2d_kernel, THREE),
    "3x3, stride 2": (conv2d_kernel, {**window(3, 2), "FLAT": False}),
    "stem": (conv2d_kernel, STEM),
}
# The activation, and what is absent.
RELU = {"ACT": ACT_NUMBER["relu"]}
BEHIND: dict[str, tuple[dict[str, int], set[str]]] = {
    "in training": ({"ACT": 0}, {"norm", "residual_ptr"}),
    "in evaluation": (RELU, {"mean_ptr", "square_ptr"}),
    "with everything": (RELU, set()),
}


def cases() -> Iterator[tuple[str, Case]]:
    """Every kernel, the convolutions at their largest tiles with every epilogue."""
    for name, behind in itertools.product(KERNELS, BEHIND):
        yield f"{name} {behind}", convolution(name, behind, "fp16" if name == "stem" else "bf16")
    for name in ("1x1", "3x3", "stem"):
        yield f"{name} in training, float32", convolution(name, "in training", "fp32")
    int8 = {**THREE, "ACT": 1, "QUANTISED": True, "LEAST": -128, "MOST": 127, "ZERO_FILL": True}
    for name, constants, c_in in (
        ("3x3", int8, 256),
        ("3x3 with a border", int8 | {"ZERO_FILL": False}, 256),
        ("1x1", int8 | window(1, 1), 256),
        ("stem", int8 | STEM, 3),
    ):
        for dtype in ("i8", "u8"):
            case = Case(conv2d_int8_kernel, constants, set(), dtype, c_in=c_in)
            yield f"int8 {name} of {dtype}", case
    depthwise = {**THREE, **RELU, "MULTIPLIER": 1}
    yield "depthwise", Case(depthwise_kernel, depthwise, set())
    merged = {"ROWS": 128, "BLOCK_T": 1024, "BLOCK_C": 8}
    yield "merge of statistics", Case(merge_statistics_kernel, merged, set())


def tiled_cases() -> Iterator[tuple[str, Case]]:
    """The float convolutions in training: every dtype, high and low, wide and narrow tiles."""
    sizes = [(49, *pair) for pair in itertools.product((16, 64, 256), (16, 64))]
    sizes += [(256 * 56 * 56, *pair) for pair in ((64, 64), (256, 16), (256, 64))]
    for name, dtype, (pixels, c_out, c_in) in itertools.product(KERNELS, HALVES, sizes):
        case = convolution(name, "in training", dtype, pixels, c_out, c_in)
        yield f"{name}, {dtype}, {pixels} pixels, {c_in} to {c_out}", case


def convolution(name: str, behind: str, *sizes: Any) -> Case:
    """One of KERNELS with one of BEHIND; sizes: of Case, from dtype on."""
    (kernel, constants), (act, absent) = KERNELS[name], BEHIND[behind]
    return Case(kernel, {**constants, **act}, absent, *sizes)


def tile_of(case: Case, arch: int) -> Tile:
    """The tile that the launch chooses."""
    if "QUANTISED" in case.constants:
        return default_int8_tile(case.pixels, case.c_out, case.c_in)
    if "MULTIPLIER" in case.constants:
        return depthwise_tile(case.c_out)
    residual = "residual_ptr" not in case.absent
    lean = is_lean(residual, case.kernel is pointwise_kernel, arch)
    return default_tile(case.pixels, case.c_out, case.c_in, HALVES[case.dtype], lean)


def compiled(case: Case, arch: int) -> Any:
    """Compile for one GPU: images of a case's dtype, float32 numbers per channel."""
    kernel, constants, absent, half = case[:4]
    int8, tile = "QUANTISED" in constants, tile_of(case, arch)
    options = depthwise_blocks(tile) if "MULTIPLIER" in constants else blocks(tile)
    known = {**options, "GROUP_M": 8, **constants}
    signature, values, divisible = {}, {}, {}
    for place, name in enumerate(kernel.arg_names):
        if name in absent or name in known:
            signature[name], values[name] = "constexpr", known.get(name)
        elif name.endswith("_matrix"):
            rows = tile.m if name == "x_matrix" else tile.n
            signature[name] = f"tensordesc<{half}[{rows}, {tile.k}]>"
        elif name == "norm":
            signature[name] = NORM
            for i, field in enumerate(NORM):
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
    if int8:
        options["enable_fp_fusion"] = False
    if "BLOCK_T" in constants:
        options["num_warps"] = 8
    return triton.compile(source, target=GPUTarget("cuda", arch, 32), options=options)


def described(made: Any, arch: int) -> dict[str, Any]:
    """What a test asks of compiled code."""
    ptx = made.asm["ptx"]
    return {
        "arch": arch,
        "matrix": [name for name, word in MATRIX.items() if word in ptx],
        "int8": ".s8.s8" in ptx or "kind::i8" in ptx,
        "float64": ".f64" in ptx,
        "fused": "fma.rn.f32" in ptx,
        "tma": "cp.async.bulk.tensor" in ptx,
        "from_registers": FROM_REGISTERS.search(ptx) is not None,
        "serialised": "wgmma" in ptx and SERIALISED in assembled(ptx, arch),
        "shared": made.metadata.shared,
        **resources(made.asm["cubin"]),
    }


def assembled(ptx: str, arch: int) -> str:
    """What Triton's ptxas says of the code; Triton itself keeps it to itself."""
    with tempfile.NamedTemporaryFile("w", suffix=".ptx") as file:
        file.write(ptx)
        file.flush()
        command = [
            get_ptxas(arch).path,
            "-v",
            f"--gpu-name=sm_{arch}a",
            file.name,
            "-o",
            "/dev/null",
        ]
        return subprocess.run(command, capture_output=True, text=True, check=True).stderr


def _pointer(name: str, half: str, int8: bool) -> str:
    if int8:
        vectors = {"sum_ptr": "*i32", "weight_scale_ptr": "*fp32", "bias_ptr": "*fp32"}
        return {**vectors, "x_ptr": f"*{half}"}.get(name, "*i8")
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
    for name, case in tiled_cases() if names == ["--tiles"] else cases():
        if names not in ([], ["--tiles"]) and name not in names:
            continue
        for arch in map(int, archs.split(",")):
            if arch < 90 and case.kernel is pointwise_kernel:
                continue  # no TMA: the other kernel runs there
            row = described(compiled(case, arch), arch)
            print(json.dumps({"name": name, "triton": triton.__version__, **row}), flush=True)
