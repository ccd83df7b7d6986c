"""Lead launches of the kernels through Triton's JIT, up to code for a GPU that is not there.

    python -m support.triton_jit [more]

A line of JSON a compilation: kernel, Triton, the launch's name. `more` also runs the launches of
MORE. Runs where the interpreter is off; no kernel runs, tensors lie on the CPU.

triton_compile.py writes the signatures by hand. Here they are what the JIT makes of the
launches' arguments: a 1 becomes a constant, a tuple one of its members' types, numbers and pointers
divisible by 16 others than those that are not.
"""

import json
import math
import sys
from collections.abc import Callable
from functools import partial
from typing import Any

import torch
import triton
from support.kernel_cases import TRITON, image
from triton.backends.compiler import GPUTarget
from triton.compiler import ASTSource

from fastcnn.common.batch_norm_params import Norm
from fastcnn.common.conv_epilogue import Epilogue
from fastcnn.common.conv_geometry import ConvGeometry
from fastcnn.functional import conv2d_int8
from fastcnn.ops.conv2d import fused_cuda as operators
from fastcnn.ops.conv2d.fused import conv2d_fused
from fastcnn.ops.conv2d_int8 import interface as int8
from fastcnn.triton import conv2d_fwd as conv2d

# A H200's.
PROCESSORS, MOST_THREADS, MOST_SHARED = 132, 1024, 227 * 2**10
LARGEST_GRID = (2**31 - 1, 65535, 65535)
launch = ""  # the name of the one that is led


class Launcher:
    """In place of the launcher of a compiled kernel: checks what CUDA would refuse, or not run."""

    def __init__(self, src: ASTSource, metadata: Any) -> None:
        # The launches give no allocator for scratch memory.
        scratch = metadata.global_scratch_size, metadata.profile_scratch_size
        assert scratch == (0, 0), f"{src.fn.__name__}: {scratch} bytes of scratch memory"
        row = {"kernel": src.fn.__name__, "triton": triton.__version__, "launch": launch}
        print(json.dumps(row), flush=True)

    def __call__(self, *args: Any) -> None:
        grid = args[:3]
        assert all(0 < n <= most for n, most in zip(grid, LARGEST_GRID, strict=True)), grid
        # Triton's launcher multiplies them as int, and runs nothing where that is not above 0.
        assert math.prod(grid) < 2**31, grid


class Utils:
    """What a driver is asked between the compilation and the first launch."""

    @staticmethod
    def get_device_properties(device: int) -> dict[str, int]:
        return {"max_shared_mem": MOST_SHARED}

    @staticmethod
    def load_binary(name: str, kernel: bytes, shared: int, device: int) -> tuple[int, ...]:
        """Module, function, registers, spills, most threads; Triton has compared shared memory."""
        assert kernel.startswith(b"\x7fELF"), name
        return 1, 1, 0, 0, MOST_THREADS

    @staticmethod
    def unload_module(module: int) -> None:
        pass


class Driver:
    """Triton's driver of a H200 that is not there."""

    utils = Utils
    launcher_cls = Launcher

    @staticmethod
    def get_current_target() -> GPUTarget:
        return GPUTarget("cuda", 90, 32)

    @staticmethod
    def get_current_device() -> int:
        return 0

    @staticmethod
    def get_current_stream(device: int) -> int:
        return 0


def convolution(
    sizes: tuple[int, ...],
    c_out: int,
    window: int,
    stride: int = 1,
    groups: int = 1,
    *,
    dtype: torch.dtype = torch.bfloat16,
    norm: bool = True,
    affine: bool = True,
    training: bool = True,
) -> None:
    """A batch norm is behind, else an activation alone.

    training: with the norm's statistics, else with the norm, whose statistics are fixed, and a
    residual.
    """
    n, c_in, *sides = sizes
    pair, padding = (stride, stride), (window // 2, window // 2)
    g = ConvGeometry(pair, padding, (1, 1), groups)
    outside = [(side + 2 * (window // 2) - window) // stride + 1 for side in sides]
    x = image(*sizes, layout="channels_last", dtype=dtype).detach()
    residual = image(n, c_out, *outside, layout="channels_last", dtype=dtype).detach()
    weight = torch.randn(c_out, c_in // groups, window, window).to(dtype)
    behind = Epilogue(act=1)
    if norm:
        behind = Epilogue(_norm(c_out, affine), residual, act=1)
    if norm and training:
        behind = Epilogue(statistics=True)
    conv2d_fused(x, weight, g, behind)


def _norm(c: int, affine: bool) -> Norm:
    rest = (torch.randn(c), torch.randn(c)) if affine else (None, None)
    return Norm(torch.randn(c), torch.ones(c), *rest)


def convolution_int8(
    sizes: tuple[int, ...], c_out: int, window: int, groups: int = 1, *, quantised: bool = True
) -> None:
    """Without bias and residual, with weights of one scale."""
    weight = torch.randint(-127, 128, (c_out, sizes[1] // groups, window, window))
    x = torch.randint(0, 256, sizes, dtype=torch.uint8)
    out: dict[str, Any] = {"out_dtype": torch.bfloat16}
    if quantised:
        out = {"out_scale": 0.05, "out_zero_point": 1}
    conv2d_int8(
        x.contiguous(memory_format=torch.channels_last), weight.to(torch.int8), x_scale=0.02,
        x_zero_point=1, weight_scale=0.01, padding=window // 2, groups=groups, **out,
    )  # fmt: skip


# Run by the older Triton alone: half a second a compilation.
LARGE, ONE = (8, 256, 56, 56), (1, 1, 1, 1)
MORE: dict[str, Callable[[], None]] = {
    # What BatchNorm2d(affine=False) brings.
    "1x1, no affine": partial(convolution, (2, 32, 9, 7), 32, 1, affine=False, training=False),
    "groups, stride 2, no affine": partial(
        convolution, (2, 64, 9, 7), 64, 3, stride=2, groups=4, affine=False, training=False
    ),
    "1x1, fixed statistics": partial(convolution, (2, 32, 9, 7), 32, 1, training=False),
    "1x1, plain": partial(convolution, (2, 32, 9, 7), 32, 1, norm=False),
    # The largest tiles.
    "large 1x1": partial(convolution, LARGE, 256, 1),
    "large 3x3, float32": partial(convolution, LARGE, 256, 3, norm=False, dtype=torch.float32),
    "the stem": partial(
        convolution, (2, 3, 32, 32), 64, 7, stride=2, norm=False, dtype=torch.float16
    ),
    "1x1, stride 2": partial(convolution, (2, 32, 9, 7), 32, 1, stride=2, norm=False),
    # Sizes that are 1 are constants for the JIT.
    "one pixel": partial(convolution, ONE, 1, 3),
    "one pixel, 1x1": partial(convolution, (1, 16, 1, 1), 16, 1),
    "one pixel, depthwise, no affine": partial(
        convolution, (1, 2, 1, 1), 4, 3, groups=2, affine=False, training=False
    ),
    "int8, large": partial(convolution_int8, LARGE, 256, 3),
    "int8, one pixel": partial(convolution_int8, ONE, 1, 3, quantised=False),
    "int8, one pixel, depthwise": partial(convolution_int8, (1, 2, 1, 1), 2, 3, groups=2),
}


def emulate_h200() -> torch.library.Library:
    """Where the launches ask for a GPU, tell them of a H200; undone with the object returned."""
    triton.runtime.driver.set_active(Driver)
    operators.interpreted = lambda: True
    conv2d.multiprocessors = lambda x: PROCESSORS
    library = torch.library.Library("fastcnn", "IMPL")
    library.impl("conv2d_int8", int8._cuda, "CPU", allow_override=True)
    return library


if __name__ == "__main__":
    library = emulate_h200()
    for launch, lead in {**TRITON, **(MORE if "more" in sys.argv else {})}.items():
        try:
            lead()
        except Exception as error:
            raise RuntimeError(launch) from error
