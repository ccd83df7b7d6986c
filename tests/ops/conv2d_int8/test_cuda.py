"""conv2d_int8's CUDA implementation gives the reference's integers, and refuses what it cannot do.

Without a GPU the calls are led to it with CPU tensors, and its kernels run in the interpreter.
"""

import itertools
from typing import Any

import pytest
import torch
from support import triton_interpreter  # noqa: F401 (mends the interpreter)
from support.conv2d_int8_cases import (
    ACTS,
    CASE,
    CASES,
    ERRORS,
    FLOATS,
    INT8,
    PLAIN,
    Case,
    assert_same,
    call,
    on_device,
    problem,
)
from support.device import DEVICE, needs_gpu, thinned
from support.shapes import LAYOUTS
from torch import Tensor
from triton import knobs

from fastcnn import reference
from fastcnn.functional import conv2d_int8, pack_conv2d_int8
from fastcnn.ops.conv2d_int8 import cuda as launches
from fastcnn.ops.conv2d_int8.arguments import Call

pytestmark = pytest.mark.gpu
OUTPUTS = [
    (out_dtype, residual_dtype, act)
    for out_dtype in (*INT8, *FLOATS)
    for residual_dtype in (None, *INT8, *([out_dtype] if out_dtype in FLOATS else []))
    for act in ACTS
]


@pytest.mark.parametrize(("case", "x_dtype"), thinned(itertools.product(CASES, INT8), 3), ids=str)
def test_packed_and_unpacked(case: Case, x_dtype: torch.dtype) -> None:
    # Fewer options a case than there are; their number shares no factor with the step.
    first = 7 * CASES.index(case)
    for seed in thinned(range(first, first + 4), 4):
        out_dtype, residual_dtype, act = OUTPUTS[seed % len(OUTPUTS)]
        given = problem(case, x_dtype, out_dtype, residual_dtype, act, seed)
        expected = reference.conv2d_int8(**given)
        y = call(**given)
        assert y.is_contiguous(memory_format=torch.channels_last)
        assert_same(y, expected, out_dtype, residual_dtype, act)
        given["weight"] = pack_conv2d_int8(given["weight"].to(DEVICE))
        assert_same(call(**given), expected, out_dtype, residual_dtype, act)


@pytest.mark.parametrize("groups", [1, 2, 8])
def test_every_output(groups: int) -> None:
    case = Case((1, 8, 3, 4), 16, 3, "plain, grouped, depthwise", padding=1, groups=groups)
    for seed, (out_dtype, residual_dtype, act) in thinned(enumerate(OUTPUTS), 13):
        given = problem(case, INT8[seed % 2], out_dtype, residual_dtype, act, seed)
        expected = reference.conv2d_int8(**given)
        assert_same(call(**given), expected, out_dtype, residual_dtype, act)


@pytest.mark.parametrize("case", thinned(CASES, 4), ids=str)
def test_numpy(case: Case) -> None:
    pytest.importorskip("onnx")
    from support.conv2d_int8_numpy import requantised

    for seed, (x_dtype, out_dtype) in enumerate(itertools.product(INT8, INT8)):
        units = torch.randint(-5000, 5000, (case.c_out,)).float()
        given = problem(case, x_dtype, out_dtype, INT8[seed % 2], ACTS[seed % 3], seed, units)
        assert_same(call(**given), requantised(given, units), x_dtype, out_dtype)


def test_one_scale_for_all_channels() -> None:
    for out_dtype, act in itertools.product((torch.int8, torch.bfloat16), ACTS):
        given = problem(PLAIN, out_dtype=out_dtype, act=act)
        vector = {**given, "weight_scale": torch.full((24,), 0.0123)}
        expected = reference.conv2d_int8(**vector)
        assert_same(call(**{**given, "weight_scale": 0.0123}), expected)
        assert_same(conv2d_int8(**{**given, "weight_scale": 0.0123}), expected)


def test_the_largest_biases_and_scales_far_apart() -> None:
    # rne(bias / s) at 2^26, ties among them, products of scales near both ends of float32, and the
    # largest factor of the sums.
    units = torch.tensor([2.0**26, -(2.0**26), 0.5, 1.5, -2.5, 2.0**25 + 1, 3.5, 1e-20])
    for x_scale, out_scale in ((1.0, 2.0**20), (1e-30, 1e-25), (1e30, 1e35), (1.0, 2.0**-96)):
        given = problem(PLAIN._replace(c_out=8), out_dtype=torch.int8)
        given |= {"x_scale": x_scale, "out_scale": out_scale, "weight_scale": torch.ones(8)}
        given["bias"] = units * torch.tensor(x_scale)
        assert_same(call(**given), reference.conv2d_int8(**given), x_scale)


@pytest.mark.parametrize("layout", LAYOUTS)
def test_layouts_strides_and_an_empty_batch(layout: str) -> None:
    given = problem(PLAIN, residual_dtype=torch.int8)
    expected = reference.conv2d_int8(**given)
    for name in ("x", "residual", "weight"):
        given[name] = given[name].clone(memory_format=LAYOUTS[layout])
    for name in ("weight_scale", "bias"):
        given[name] = given[name].repeat_interleave(2)[::2]
    y = call(**given)
    assert_same(y, expected)
    assert y.is_contiguous(memory_format=LAYOUTS[layout])
    y = call(**{**given, "x": given["x"][:0], "residual": given["residual"][:0]})
    assert y.shape == (0, 24, 5, 4)


@pytest.mark.parametrize(("changes", "error", "message"), ERRORS)
def test_errors(changes: dict[str, Any], error: type[Exception], message: str) -> None:
    # Changed on the GPU: a tensor that is moved there becomes dense.
    given = on_device(problem(CASE, torch.uint8, torch.int8, torch.uint8))
    for name, change in changes.items():
        given[name] = change(given[name]) if callable(change) else change
    with pytest.raises(error, match=f"^conv2d_int8: {message}"):
        call(**given)


def test_sizes_beyond_a_kernel_s() -> None:
    def at(sizes: tuple[int, ...], weight: tuple[int, ...], groups: int) -> Call:
        x, w = (torch.empty(s, dtype=torch.int8, device="meta") for s in (sizes, weight))
        zero = {"x_zero_point": 0, "residual_zero_point": None, "out_zero_point": 0}
        return Call(
            x, w, None, None, None, 1.0, residual_scale=None, out_scale=1.0, out_dtype=torch.int8,
            stride=[1, 1], padding=[0, 0], dilation=[1, 1], groups=groups, act=0, **zero,
        )  # fmt: skip

    y = torch.empty(0, 0, 0, 0, device="meta")
    many = at((2**31 - 1, 1, 1, 1), (1, 1, 1, 1), 1)
    with pytest.raises(ValueError, match=r"^conv2d_int8: x: expected at most \d+ pixels in y"):
        launches.launch(many, y, y.new_empty(2**31 - 1, 1, 1, 1))
    grouped = at((1, 2 * 65536, 1, 1), (65536, 2, 1, 1), 65536)
    with pytest.raises(ValueError, match=r"^conv2d_int8: groups: expected at most 65535 on CUDA"):
        launches.launch(grouped, y, y.new_empty(1, 65536, 1, 1))


@needs_gpu
def test_numbers_compile_no_kernel_anew() -> None:
    given = {**problem(PLAIN), "x_zero_point": 7, "out_zero_point": 5}
    call(**given)
    call(**{**given, "x_zero_point": 0})  # whose border is zeros
    compiled: list[Any] = []
    hook = knobs.runtime.jit_post_compile_hook
    knobs.runtime.jit_post_compile_hook = lambda **about: compiled.append(about)
    try:
        for zero, scale in itertools.product((0, 1, 16, 255), (0.01, 0.02)):
            zeros = {"x_zero_point": zero, "out_zero_point": zero}
            now = {**given, **zeros, "x_scale": scale}
            assert_same(call(**now), reference.conv2d_int8(**now))
    finally:
        knobs.runtime.jit_post_compile_hook = hook
    assert not compiled


@needs_gpu
def test_tensors_of_two_devices() -> None:
    given = problem(PLAIN)
    there = {k: t.cuda() if isinstance(t, Tensor) else t for k, t in given.items()}
    for name in ("weight", "weight_scale", "bias"):
        with pytest.raises(ValueError, match=rf"{name}: expected device cuda:0, got cpu"):
            conv2d_int8(**{**there, name: given[name]})
    packed = pack_conv2d_int8(given["weight"])
    assert packed.to("cpu") is packed
    expected = reference.conv2d_int8(**given)
    assert_same(conv2d_int8(**{**there, "weight": packed.to("cuda")}).cpu(), expected)
