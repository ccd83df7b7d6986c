"""The CPU kernels beside memory that must not be touched, at every instruction set.

Each input ends where a page without access begins: a read of one byte too many ends the process.
"""

import itertools
import os
import subprocess
import sys
from pathlib import Path

import pytest
import torch
from support.guarded import guarded
from support.paths import TESTS
from torch import Tensor

from fastcnn import _C

SHAPES = [(1, 1, 1, 1), (2, 3, 5, 7), (3, 20, 3, 3), (1, 257, 1, 1), (5, 16, 9, 9), (2, 64, 7, 7)]


def run_all() -> None:
    """Every operator over every shape, dtype and layout."""
    ops = torch.ops.fastcnn
    for shape in SHAPES:
        for dtype in (torch.float32, torch.bfloat16, torch.float16, torch.float64):
            for layout in (torch.contiguous_format, torch.channels_last):
                acc = torch.float64 if dtype is torch.float64 else torch.float32
                image = torch.randn(shape).to(dtype).contiguous(memory_format=layout)
                x, residual, dy = (guarded(image) for _ in range(3))
                w, b, mean, var = (guarded(torch.rand(shape[1], dtype=acc)) for _ in range(4))
                y, *_ = ops.batch_norm_act_fwd(x, residual, w, b, 1e-5, 1)
                ops.batch_norm_act_apply(x, None, w, b, mean, var, 1e-5, 2)
                ops.batch_norm_act_fwd(x, residual, w, b, 1e-5, 5)
                for saved, act in ((None, 1), (guarded(y), 1), (None, 5), (residual, 5)):
                    ops.batch_norm_act_bwd(dy, x, saved, w, b, mean, var, 1e-5, act, True, True)
                xs = [guarded(t.contiguous(memory_format=layout)) for t in (image[:, :1], image)]
                c, both = 1 + shape[1], torch.cat([image[:, :1], image], 1)
                both = guarded(both.contiguous(memory_format=layout))
                four = [guarded(torch.rand(c, dtype=acc)) for _ in range(4)]
                ops.batch_norm_act_concat_fwd(xs, both, *four[:2], 1e-5, 1)
                ops.batch_norm_act_concat_apply(xs, None, *four, 1e-5, 5)
                for saved, act in ((None, 1), (both, 5)):
                    ops.batch_norm_act_concat_bwd(
                        both, xs, saved, *four, 1e-5, act, True, saved is None
                    )
                ops.batch_norm_act_stats(x)
                ops.batch_norm_act_reduce(dy, x, residual, w, b, mean, var, 1e-5, 1, True)
                ops.batch_norm_act_dx(dy, x, None, w, b, mean, var, w, b, w[-1:], 1e-5, 1, True)
                ops.batch_norm_update_running(mean, var, w, b, None, 0.1, 7)
                ops.batch_norm_update_running(mean, var, w, b, w[-1:], 0.1, 0)
                resize_all(image)
                seed = guarded(torch.tensor([5]))
                for per_channel in (False, True):
                    ops.dropout_apply(x, residual, seed, 0.3, per_channel)
                    ops.dropout_apply_(guarded(image), None, seed, 0.3, per_channel)
                for groups in {1, shape[1]}:
                    _, mean, var = ops.group_norm_act_fwd(x, w, b, groups, 1e-5, 4)
                    ops.group_norm_act_bwd(dy, x, w, b, guarded(mean), guarded(var), 1e-5, 4)
                convolve_all(image)
                squeeze_all(image)
                _, mean, var = ops.pixel_norm_act_fwd(x, w, b, 1e-5, 1)
                ops.pixel_norm_act_bwd(dy, x, w, b, guarded(mean), guarded(var), 1e-5, 1)
    for shape in [(1, 1, 1, 1), (3, 1, 5, 7), (1, 3, 1, 1), (2, 3, 5, 7), (1, 3, 40, 33)]:
        for layout in (torch.contiguous_format, torch.channels_last):
            augment_wildly(shape, layout)
    print("done")


def convolve_all(image: Tensor) -> None:
    """Each channel by itself, by windows with and without loops of their own."""
    ops, x, (_, c, h, w) = torch.ops.fastcnn, guarded(image), image.shape
    acc = torch.float64 if image.dtype is torch.float64 else torch.float32
    last = not image.is_contiguous()
    for kernel, stride, dilation in ((3, 1, 1), (5, 2, 1), (7, 1, 1), (3, 2, 2), (2, 3, 1)):
        window = [stride, stride], [dilation * (kernel // 2)] * 2, [dilation, dilation]
        weight = guarded(torch.rand(c, 1, kernel, kernel, dtype=acc))
        if min(h, w) + 2 * window[1][0] <= dilation * (kernel - 1):
            continue
        y = guarded(
            ops.depthwise_conv2d_fwd(x, weight, guarded(torch.rand(c, dtype=acc)), *window, 1)
        )
        dz = guarded(ops.depthwise_conv2d_bwd_act(y, x, weight, None, *window, 4))
        ops.depthwise_conv2d_bwd_data(dz, weight, h, w, *window, last)
        ops.depthwise_conv2d_bwd_weight(dz, x, kernel, kernel, *window)


def squeeze_all(image: Tensor) -> None:
    """With both products, of few and of many weights, and with one."""
    ops, x, c = torch.ops.fastcnn, guarded(image), image.shape[1]
    acc = torch.float64 if image.dtype is torch.float64 else torch.float32
    for m in (None, 3, 1 + 2**19 // c):
        fc1 = None if m is None else guarded(torch.rand(m, c, 1, 1, dtype=acc))
        bias1 = None if m is None else guarded(torch.rand(m, dtype=acc))
        fc2, bias2 = (torch.rand(c, *size, dtype=acc) for size in ((m or c, 1, 1), ()))
        fcs = fc1, guarded(fc2)
        forward = ops.squeeze_excite_fwd(x, fc1, bias1, fcs[1], guarded(bias2), 4, m is None)
        y, _, z1, z2 = map(guarded, forward)
        ops.squeeze_excite_bwd(y, x, *fcs, z1, z2, 4, m is None)


def resize_all(image: Tensor) -> None:
    """Up, far up and down, by every sampling, beside a skip and into a slice of channels."""
    ops, x = torch.ops.fastcnn, guarded(image)
    n, _, h, w = image.shape
    for layout in (torch.contiguous_format, torch.channels_last):
        if not image.is_contiguous(memory_format=layout):
            continue
        last = layout is torch.channels_last
        for sampling, size in itertools.product(range(4), ((2 * h, 2 * w), (1, 1), (h + 3, 5 * w))):
            skip = guarded(torch.ones(n, 3, *size).to(image.dtype).contiguous(memory_format=layout))
            ops.upsample_fwd(x, None, *size, None, None, sampling, last, False)
            y = guarded(ops.upsample_fwd(x, skip, *size, None, None, sampling, last, False))
            guarded(ops.upsample_fwd(x, skip, *size, None, None, sampling, last, True))
            ops.upsample_bwd(y, h, w, None, None, sampling, last)
            ops.upsample_bwd(y[:, 3:], h, w, None, None, sampling, last)
            if last:
                z = guarded(image.repeat(1, 9, 1, 1).contiguous(memory_format=layout))
                dy = guarded(ops.upsample_taps_fwd(z, *size, None, None, sampling))
                ops.upsample_taps_bwd(dy, h, w, None, None, sampling)


def augment_wildly(shape: tuple[int, ...], layout: torch.memory_format) -> None:
    """Geometry that no parameters make: whatever the numbers, nothing else is read."""
    ops, (n, c, h, w) = torch.ops.fastcnn, shape
    image = torch.randint(256, shape, dtype=torch.uint8).contiguous(memory_format=layout)
    images, masks = guarded(image), guarded(torch.zeros(n, h, w, dtype=torch.int64))
    channels, integers = guarded(torch.ones(c, 4)), guarded(torch.full((n, 5), 3))
    identity = [1.0, 0, w - 1, 1, 0, h - 1, 1, 0, 0, 0, 1, 0, 1, 1, 1, 0, 0]
    everything = [0.5] * 17
    rows = [identity, everything]
    for wild in (float("nan"), float("inf"), -float("inf"), 1e30, -1e30, 2.0**31, -3.0):
        rows += [[wild] * 17, identity[:6] + [wild] * 11]
        rows += [[*identity[:i], wild, *identity[i + 1 :]] for i in range(17)]
    for row in rows:
        reals = guarded(torch.tensor([row] * n, dtype=torch.float32))
        for dtype, last in ((0, False), (1, True)):
            ops.augment(images, reals, integers, channels, h, w, dtype, last)
        ops.augment_mask(masks, reals, h + 2, w + 1, 255)


def in_a_process(statement: str, level: str) -> subprocess.CompletedProcess[str]:
    code = f"import test_guard as t; {statement}"
    path = f"{Path(__file__).parent}{os.pathsep}{TESTS}"
    environment = os.environ | {"FASTCNN_CPU_CAPABILITY": level, "PYTHONPATH": path}
    return subprocess.run(
        [sys.executable, "-c", code], env=environment, capture_output=True, text=True
    )


@pytest.mark.parametrize("level", ["baseline", "avx2", "avx512"])
def test_nothing_beyond_an_input_is_read(level: str) -> None:
    order = _C.cpu_levels.split(",")
    if order.index(level) > order.index(_C.cpu_capability()):
        pytest.skip(f"this processor has no {level}")
    done = in_a_process("t.run_all()", level)
    assert done.stdout == "done\n", done.stderr or f"exit status {done.returncode}"


def test_the_guard_guards() -> None:
    # One element beyond the end: without this, the test above would pass with a guard that is none.
    read = "import ctypes; ctypes.string_at(t.guarded(t.torch.ones(8)).data_ptr(), 33)"
    assert in_a_process(read, "baseline").returncode < 0
