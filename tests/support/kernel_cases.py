"""One small call of each CUDA kernel: what compute-sanitizer looks at.

    python -m support.kernel_cases [--launched] [cuda|triton ...]

--launched, on a GPU, prints the names of the kernels that ran.

Sizes are the smallest at which an H200's 132 SMs take the path that is meant, ragged where that is
possible. tests/kernels/test_kernel_cases.py checks that no kernel of csrc/cuda is left out.
"""

import sys
import traceback
from collections.abc import Callable
from functools import partial

import torch
from support.device import DEVICE, HAS_GPU
from support.seeds import seed_all
from support.shapes import LAYOUTS
from torch import Tensor

from fastcnn.augment import Augment
from fastcnn.common.batch_norm_params import Norm
from fastcnn.common.conv_epilogue import Epilogue
from fastcnn.common.conv_geometry import ConvGeometry
from fastcnn.functional import (
    batch_norm_act,
    conv2d_int8,
    depthwise_conv2d,
    dropout,
    group_norm_act,
    interpolate,
    squeeze_excite,
)
from fastcnn.nn import LayerNorm2d
from fastcnn.ops.conv2d.fused import conv2d_fused

ops = torch.ops.fastcnn
SIZES = {
    # ResNet-50's last stage, where a block's channels fit into shared memory, at their smallest.
    "one-pass": (2, 24, 5, 7),
    # More than 32 words of 16 bytes a thread: three launches over the whole GPU.
    "multi-pass": (9, 16, 64, 65),
}
DTYPES = (torch.float32, torch.bfloat16)


def image(*sizes: int, layout: str, dtype: torch.dtype = torch.float32) -> Tensor:
    x = torch.randn(sizes, device=DEVICE).to(dtype, memory_format=LAYOUTS[layout])
    return x.requires_grad_()


def back(y: Tensor) -> None:
    y.backward(torch.randn_like(y))


def batch_norm(path: str, layout: str, dtype: torch.dtype) -> None:
    x, residual = (image(*SIZES[path], layout=layout, dtype=dtype) for _ in range(2))
    mean, weight, bias = torch.randn(3, x.shape[1], device=DEVICE)
    var = torch.ones_like(mean)
    weight, bias = weight.requires_grad_(), bias.requires_grad_()
    for training in (True, False):
        norm = (mean, var, weight, bias)
        back(batch_norm_act(x, *norm, training=training, residual=residual, act="relu"))


def batch_norm_of_several_processes() -> None:
    """What SyncBatchNorm runs between its gathers."""
    x, dy = (image(*SIZES["one-pass"], layout="nchw").detach() for _ in range(2))
    weight, bias = torch.randn(2, x.shape[1], device=DEVICE)
    local = ops.batch_norm_act_stats(x)
    mean, var, total = ops.batch_norm_join_stats(torch.stack([local, local]))
    rest = (dy, x, None, weight, bias, mean, var)
    _, dweight, dbias = ops.batch_norm_act_reduce(*rest, 1e-5, 1, False)
    ops.batch_norm_act_dx(*rest, dweight, dbias, total, 1e-5, 1, True)
    ops.batch_norm_update_running(mean.clone(), var.clone(), mean, var, total, 0.1, 1)


def group_norm(groups: int, sizes: tuple[int, ...], layout: str, dtype: torch.dtype) -> None:
    x = image(*sizes, layout=layout, dtype=dtype)
    weight, bias = torch.randn(2, sizes[1], device=DEVICE)
    weight, bias = weight.requires_grad_(), bias.requires_grad_()
    back(group_norm_act(x, groups, weight, bias, act="silu"))


def layer_norm(layout: str, dtype: torch.dtype) -> None:
    back(LayerNorm2d(20, device=DEVICE)(image(3, 20, 5, 7, layout=layout, dtype=dtype)))


def dropped(per_channel: bool, layout: str, dtype: torch.dtype) -> None:
    x, residual = (image(3, 16, 5, 8, layout=layout, dtype=dtype) for _ in range(2))
    back(dropout(x, 0.3, per_channel=per_channel))
    back(dropout(x, 0.3, per_channel=per_channel, residual=residual))


def depthwise(kernel: int, layout: str, dtype: torch.dtype) -> None:
    x = image(2, 16, 9, 7, layout=layout, dtype=dtype)
    weight, bias = torch.randn(16, kernel**2 + 1, device=DEVICE).split([kernel**2, 1], 1)
    weight = weight.reshape(16, 1, kernel, kernel).requires_grad_()
    bias = bias.flatten().requires_grad_()
    for stride, act in ((1, "silu"), (2, "none"), (3, "relu")):
        back(depthwise_conv2d(x, weight, bias, stride, kernel // 2, act=act))  # type: ignore[arg-type]


def squeezed(sizes: tuple[int, ...], layout: str, dtype: torch.dtype) -> None:
    x = image(*sizes, layout=layout, dtype=dtype)
    fc1, fc2 = (torch.randn(*size, 1, 1, device=DEVICE) for size in ((6, 16), (16, 6)))
    fc1, fc2 = fc1.requires_grad_(), fc2.requires_grad_()
    bias1, bias2 = torch.randn(6, device=DEVICE), torch.randn(16, device=DEVICE)
    back(squeeze_excite(x, fc1, bias1, fc2, bias2, act="silu"))
    back(squeeze_excite(x, torch.randn(16, 16, 1, 1, device=DEVICE), gate="hardsigmoid"))


def upsampled(mode: str, layout: str, dtype: torch.dtype) -> None:
    x = image(2, 8, 5, 7, layout=layout, dtype=dtype)
    skip = image(2, 8, 10, 14, layout=layout, dtype=dtype)
    back(interpolate(x, size=(11, 9), mode=mode))  # type: ignore[arg-type]
    back(interpolate(x, scale_factor=2, mode=mode, concat=skip))  # type: ignore[arg-type]


def augmented(channels: int, layout: str) -> None:
    images = torch.randint(256, (3, channels, 19, 23), dtype=torch.uint8, device=DEVICE)
    images = images.contiguous(memory_format=LAYOUTS[layout])
    for dtype in (torch.uint8, torch.int64):
        masks = torch.randint(5, (3, 19, 23), device=DEVICE).to(dtype)
        ranges = {"degrees": 15, "brightness": 0.4, "noise": 0.05, "erasing": 0.5}
        color = {"contrast": 0.4, "saturation": 0.4, "hue": 0.1} if channels == 3 else {}
        Augment((17, 16), memory_format=LAYOUTS[layout], **ranges, **color)(images, masks)


CUDA: dict[str, Callable[[], None]] = {
    **{
        f"{name} {layout} {dtype}": partial(run, layout, dtype)
        for layout in LAYOUTS
        for dtype in DTYPES
        for name, run in {
            "batch norm, one-pass": partial(batch_norm, "one-pass"),
            "batch norm, multi-pass": partial(batch_norm, "multi-pass"),
            "group norm, one-pass": partial(group_norm, 4, SIZES["one-pass"]),
            # Two groups of 32 x 65 x 64 elements: too few tiles for half of the SMs, and too large.
            "group norm, multi-pass": partial(group_norm, 2, (1, 16, 65, 64)),
            "layer norm": layer_norm,
            "dropout": partial(dropped, False),
            "dropout by channel": partial(dropped, True),
            "depthwise 3x3": partial(depthwise, 3),
            "depthwise 4x4": partial(depthwise, 4),
            "squeeze-and-excitation": partial(squeezed, (2, 16, 5, 24)),
            "squeeze-and-excitation, split": partial(squeezed, (1, 16, 65, 64)),
            "bilinear": partial(upsampled, "bilinear"),
            "nearest": partial(upsampled, "nearest"),
        }.items()
    },
    "batch norm of several processes": batch_norm_of_several_processes,
    **{
        f"augment {channels} {layout}": partial(augmented, channels, layout)
        for channels in (1, 3)
        for layout in LAYOUTS
    },
}


def convolution(kernel: int, groups: int) -> None:
    """With statistics, and with a batch norm and a residual."""
    x, residual = (
        image(2, 32, 9, 7, layout="channels_last", dtype=torch.bfloat16).detach() for _ in range(2)
    )
    weight = torch.randn(32, 32 // groups, kernel, kernel, device=DEVICE).bfloat16()
    mean, bn_weight, bias = torch.randn(3, 32, device=DEVICE)
    norm = Norm(mean, torch.ones_like(mean), bn_weight, bias, 1e-5)
    g = ConvGeometry(padding=(kernel // 2, kernel // 2), groups=groups)
    conv2d_fused(x, weight, g, Epilogue(statistics=True))
    conv2d_fused(x, weight, g, Epilogue(norm, residual, act=1))


def convolution_int8(groups: int) -> None:
    x, residual = (torch.randint(0, 256, (2, 32, 9, 7), device=DEVICE).byte() for _ in range(2))
    weight = torch.randint(-127, 128, (32, 32 // groups, 3, 3), device=DEVICE).to(torch.int8)
    weight_scale, bias = torch.rand(2, 32, device=DEVICE)
    conv2d_int8(
        x, weight, x_scale=0.02, x_zero_point=3, weight_scale=weight_scale, bias=bias, padding=1,
        groups=groups, residual=residual, residual_scale=0.02, residual_zero_point=5,
        act="relu", out_scale=0.05, out_zero_point=7,
    )  # fmt: skip


TRITON: dict[str, Callable[[], None]] = {
    **{
        f"convolution {kernel}x{kernel}, {groups} groups": partial(convolution, kernel, groups)
        for kernel, groups in ((1, 1), (3, 1), (3, 32))
    },
    **{f"int8, {groups} groups": partial(convolution_int8, groups) for groups in (1, 32)},
}
CASES = {"cuda": CUDA, "triton": TRITON}


def run(kinds: list[str]) -> int:
    """Run the cases of some kinds, and wait for the GPU after each; return how many raised."""
    seed_all(0)
    raised = 0
    for kind in kinds:
        for name, case in CASES[kind].items():
            print(name, flush=True)
            try:
                case()
                if HAS_GPU:
                    torch.cuda.synchronize()
            except Exception:
                raised += 1
                traceback.print_exc()
    return raised


def run_and_print_launched(kinds: list[str]) -> int:
    """Run them likewise, and print what the GPU ran."""
    with torch.profiler.profile(activities=[torch.profiler.ProfilerActivity.CUDA]) as profile:
        raised = run(kinds)
    on_gpu = torch.autograd.DeviceType.CUDA
    for name in sorted({e.name for e in profile.events() if e.device_type is on_gpu}):
        print(f"launched: {name}")
    return raised


if __name__ == "__main__":
    arguments = [one for one in sys.argv[1:] if one != "--launched"] or [*CASES]
    sys.exit((run_and_print_launched if "--launched" in sys.argv else run)(arguments) > 0)
