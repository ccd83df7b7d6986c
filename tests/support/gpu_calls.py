"""One call of each op, as data: what streams, graphs and devices must do to all of them alike.

Sizes are small, but on a GPU they reach both paths of the norms (one-pass and multi-pass), more
shared memory than 48 KiB, and convolutions by cuDNN and by Triton.
"""

import math
from collections.abc import Callable, Sequence
from functools import partial
from typing import Any, NamedTuple

import torch
from support.device import DEVICE
from support.gpu_plans import planned_by, wherever_it_can
from support.gpu_tensors import Maker
from support.seeds import seeded
from torch import Tensor

from fastcnn import functional
from fastcnn.augment import Augment
from fastcnn.functional import ConvBnActStep
from fastcnn.ops.augment.pack import pack
from fastcnn.ops.batch_norm_act.sync import merged_statistics
from fastcnn.ops.group_norm_act import pixel_norm_act
from fastcnn.ops.instance_norm_act import instance_norm_act

LAST = torch.channels_last


class Call(NamedTuple):
    """run(*late, *constant) -> outputs and gradients, new tensors each time.

    make: from a generator on the CPU, the tensors that may get other values and those that may not,
    since their values were looked at (conv2d_int8's scales).
    """

    make: Callable[[torch.Generator], tuple[list[Tensor], list[Tensor]]]
    run: Callable[..., list[Tensor]]


def inputs(
    name: str, seed: int, device: torch.device = DEVICE
) -> tuple[list[Tensor], list[Tensor]]:
    """The tensors of a call, of values by the seed, on a device."""
    made = CALLS[name].make(seeded(seed))
    late, constant = ([t.to(device) for t in tensors] for tensors in made)
    return late, constant


def run(name: str, late: Sequence[Tensor], constant: Sequence[Tensor]) -> list[Tensor]:
    return CALLS[name].run(*late, *constant)


def assert_equal(found: Sequence[Tensor], expected: Sequence[Tensor]) -> None:
    """Bitwise, as fastcnn promises of one GPU; NaN is what memory was filled with."""
    assert len(found) == len(expected)
    for i, (a, b) in enumerate(zip(found, expected, strict=True)):
        assert not (b.is_floating_point() and b.isnan().any())
        assert torch.equal(a.cpu(), b.cpu()), f"result {i}"


def differentiated(fn: Callable[..., Tensor], dy: Tensor, *leaves: Tensor) -> list[Tensor]:
    """fn's result and the gradients of all leaves."""
    given = [t.detach().requires_grad_() for t in leaves]
    with torch.enable_grad():
        y = fn(*given)
        return [y.detach(), *torch.autograd.grad(y, given, dy)]


# ---- batch norm ----------------------------------------------------------------------------------


def _batch_norm_inputs(
    sizes: tuple[int, int, int, int], dtype: torch.dtype, layout: torch.memory_format, g: Any
) -> tuple[list[Tensor], list[Tensor]]:
    make, c = Maker(g), sizes[1]
    images = [make.image(*sizes, dtype=dtype, layout=layout) for _ in range(3)]
    return [*images, *(make.vector(c) for _ in range(4))], []


def _batch_norm(training: bool, *args: Tensor) -> list[Tensor]:
    x, residual, dy, weight, bias, mean, var = args
    running = mean.clone(), var.clone()

    def forward(x: Tensor, residual: Tensor, weight: Tensor, bias: Tensor) -> Tensor:
        return functional.batch_norm_act(
            x, *running, weight, bias, training, residual=residual, act="relu"
        )

    return [*differentiated(forward, dy, x, residual, weight, bias), *running]


def _shared_batch_norm(*args: Tensor) -> list[Tensor]:
    # The operators of synchronised statistics, whose collectives are PyTorch's.
    x, residual, dy, weight, bias, *_ = args
    ops = torch.ops.fastcnn
    mean, var, total = merged_statistics(x, None)
    y = ops.batch_norm_act_apply(x, residual, weight, bias, mean, var, 1e-5, 1)
    sums = ops.batch_norm_act_reduce(dy, x, y, weight, bias, mean, var, 1e-5, 1, True)
    dz, dweight, dbias = sums
    dx = ops.batch_norm_act_dx(
        dz, x, None, weight, bias, mean, var, dweight, dbias, total, 1e-5, 0, True
    )
    return [y, dz, dweight, dbias, dx, mean, var, total]


# ---- convolutions --------------------------------------------------------------------------------


def _chain_inputs(dtype: torch.dtype, g: Any) -> tuple[list[Tensor], list[Tensor]]:
    make = Maker(g)
    image = partial(make.image, dtype=dtype, layout=LAST)
    weights = [image(16, 16, 3, 3), image(32, 16, 1, 1), image(32, 16, 1, 1)]
    weights = [w / math.sqrt(w[0].numel()) for w in weights]
    vectors = [make.vector(c) for c in (16, 16, 32, 32, 32, 32)]
    return [image(1, 16, 5, 6), image(1, 32, 3, 3), *weights, *vectors], []


def _steps(training: bool, w: Sequence[Tensor], v: Sequence[Tensor]) -> list[ConvBnActStep]:
    # Running statistics are the vectors of gamma and beta, copied: any numbers above 0 do.
    running = [t.detach().clone() for t in v]
    strides = (2, 1, 2)
    return [
        ConvBnActStep(
            w[i], None, strides[i], w[i].shape[2] // 2, 1, 1, running[2 * i], running[2 * i + 1],
            v[2 * i], v[2 * i + 1], training, act="none" if i == 2 else "silu",
        )
        for i in range(3)
    ]  # fmt: skip


def _chain(plan: str, *args: Tensor) -> list[Tensor]:
    """Two steps and a projection beside them, trained."""
    x, dy, *leaves = args

    def forward(x: Tensor, *leaves: Tensor) -> Tensor:
        first, second, projection = _steps(True, leaves[:3], leaves[3:])
        return functional.conv_bn_act(x, [first, second], [projection])

    with planned_by(partial(wherever_it_can, plan)):
        return differentiated(forward, dy, x, *leaves)


def _inference(plan: str, *args: Tensor) -> list[Tensor]:
    x, _, *leaves = args
    first, second, projection = _steps(False, leaves[:3], leaves[3:])
    with torch.no_grad(), planned_by(partial(wherever_it_can, plan)):
        return [functional.conv_bn_act(x, [first, second], [projection])]


def _int8_inputs(groups: int, g: Any) -> tuple[list[Tensor], list[Tensor]]:
    make = Maker(g)
    late = [
        make.integers(torch.uint8, 2, 32, 9, 8),
        make.integers(torch.int8, 32, 32 // groups, 3, 3),
        make.integers(torch.int8, 2, 32, 9, 8),
    ]
    fixed = Maker(seeded(7))
    return late, [fixed.vector(32) * 1e-3, fixed.vector(32)]


def _int8(groups: int, *args: Tensor) -> list[Tensor]:
    x, weight, residual, scale, bias = args
    y = functional.conv2d_int8(
        x, weight, weight_scale=scale, x_scale=0.02, x_zero_point=128, bias=bias, padding=1,
        groups=groups, residual=residual, residual_scale=0.03, residual_zero_point=0, act="relu",
        out_dtype=torch.uint8, out_scale=0.04, out_zero_point=3,
    )  # fmt: skip
    return [y]


# ---- the others ----------------------------------------------------------------------------------


def _norm_inputs(
    sizes: tuple[int, int, int, int], dtype: torch.dtype, layout: torch.memory_format, g: Any
) -> tuple[list[Tensor], list[Tensor]]:
    make = Maker(g)
    image = partial(make.image, *sizes, dtype=dtype, layout=layout)
    return [image(), image(), make.vector(sizes[1]), make.vector(sizes[1])], []


def _group_norm(groups: int, x: Tensor, dy: Tensor, weight: Tensor, bias: Tensor) -> list[Tensor]:
    def forward(x: Tensor, weight: Tensor, bias: Tensor) -> Tensor:
        return functional.group_norm_act(x, groups, weight, bias, act="silu")

    return differentiated(forward, dy, x, weight, bias)


def _pixel_norm(x: Tensor, dy: Tensor, weight: Tensor, bias: Tensor) -> list[Tensor]:
    def forward(x: Tensor, weight: Tensor, bias: Tensor) -> Tensor:
        return pixel_norm_act("LayerNorm2d", x, x.shape[1], weight, bias, 1e-6, "gelu")

    return differentiated(forward, dy, x, weight, bias)


def _instance_norm(x: Tensor, dy: Tensor, weight: Tensor, bias: Tensor) -> list[Tensor]:
    running = weight.clone(), bias.clone()

    def forward(x: Tensor, weight: Tensor, bias: Tensor) -> Tensor:
        return instance_norm_act(
            "InstanceNorm2d", x, *running, weight, bias, True, 0.1, 1e-5, "relu6"
        )

    return [*differentiated(forward, dy, x, weight, bias), *running]


def _images(*sizes: tuple[int, ...], **how: Any) -> Callable[[Any], Any]:
    return lambda g: ([Maker(g).image(*size, **how) for size in sizes], [])


def _dropout(per_channel: bool, x: Tensor, residual: Tensor, dy: Tensor) -> list[Tensor]:
    def forward(x: Tensor, residual: Tensor) -> Tensor:
        return functional.dropout(x, 0.4, residual=residual, per_channel=per_channel)

    return differentiated(forward, dy, x, residual)


def _depthwise(x: Tensor, weight: Tensor, dy: Tensor) -> list[Tensor]:
    def forward(x: Tensor, weight: Tensor) -> Tensor:
        return functional.depthwise_conv2d(x, weight, None, 2, 1, act="silu")

    return differentiated(forward, dy, x, weight)


def _squeeze_excite(x: Tensor, fc1: Tensor, fc2: Tensor, dy: Tensor) -> list[Tensor]:
    def forward(x: Tensor, fc1: Tensor, fc2: Tensor) -> Tensor:
        return functional.squeeze_excite(x, fc1, None, fc2, act="silu")

    return differentiated(forward, dy, x, fc1, fc2)


def _linear_act(x: Tensor, weight: Tensor, bias: Tensor, dy: Tensor) -> list[Tensor]:
    def forward(x: Tensor, weight: Tensor, bias: Tensor) -> Tensor:
        return functional.linear_act(x, weight, bias, act="gelu")

    return differentiated(forward, dy, x, weight, bias)


def _dropout_in_place(x: Tensor) -> list[Tensor]:
    return [functional.dropout(x.clone(), 0.3, inplace=True)]


def _interpolate(how: dict[str, Any], x: Tensor, skip: Tensor, dy: Tensor) -> list[Tensor]:
    def forward(x: Tensor, skip: Tensor) -> Tensor:
        return functional.interpolate(x, scale_factor=2, concat=skip, **how)

    return differentiated(forward, dy, x, skip)


def _augment_inputs(g: Any) -> tuple[list[Tensor], list[Tensor]]:
    module = Augment((12, 10), degrees=30, brightness=0.3, contrast=0.4, hue=0.1, noise=0.1)
    reals, integers = pack(module.draw(3, (16, 14), g), (16, 14), (12, 10))
    make = Maker(g)
    images, masks = make.integers(torch.uint8, 3, 3, 16, 14), make.integers(torch.uint8, 3, 16, 14)
    return [images, masks, reals, integers, torch.rand(3, 4, generator=g) + 0.5], []


def _augment(images: Tensor, masks: Tensor, reals: Tensor, *rows: Tensor) -> list[Tensor]:
    ops = torch.ops.fastcnn
    y = ops.augment(images, reals, *rows, 12, 10, 1, False)
    return [y, ops.augment_mask(masks, reals, 12, 10, 255)]


_BF16, _FP16, _FP32 = torch.bfloat16, torch.float16, torch.float32
_NCHW = torch.contiguous_format
_CAT = (2, 8, 5, 7), (2, 4, 10, 14), (2, 12, 10, 14)

CALLS = {
    "batch_norm_act, one-pass": Call(
        partial(_batch_norm_inputs, (4, 16, 7, 7), _FP32, LAST), partial(_batch_norm, True)
    ),
    "batch_norm_act, multi-pass": Call(
        partial(_batch_norm_inputs, (16, 64, 28, 28), _BF16, LAST), partial(_batch_norm, True)
    ),
    "batch_norm_act, fixed": Call(
        partial(_batch_norm_inputs, (4, 16, 7, 7), _FP16, _NCHW), partial(_batch_norm, False)
    ),
    "batch_norm_act, shared": Call(
        partial(_batch_norm_inputs, (4, 16, 7, 7), _FP32, _NCHW), _shared_batch_norm
    ),
    "conv_bn_act by cuDNN": Call(partial(_chain_inputs, _FP32), partial(_chain, "cudnn")),
    "conv_bn_act by Triton": Call(partial(_chain_inputs, _BF16), partial(_chain, "triton")),
    "inference by cuDNN": Call(partial(_chain_inputs, _BF16), partial(_inference, "cudnn")),
    "inference by Triton": Call(partial(_chain_inputs, _FP32), partial(_inference, "triton")),
    "conv2d_int8": Call(partial(_int8_inputs, 1), partial(_int8, 1)),
    "conv2d_int8, depthwise": Call(partial(_int8_inputs, 32), partial(_int8, 32)),
    # 64 KiB a group, for half the processors of a GPU and more: held in shared memory.
    "group_norm_act, 64 KiB": Call(
        partial(_norm_inputs, (5, 256, 32, 32), _FP32, _NCHW), partial(_group_norm, 16)
    ),
    "group_norm_act, multi-pass": Call(
        partial(_norm_inputs, (2, 32, 64, 60), _BF16, LAST), partial(_group_norm, 2)
    ),
    "LayerNorm2d": Call(partial(_norm_inputs, (2, 48, 6, 5), _FP16, LAST), _pixel_norm),
    "InstanceNorm2d": Call(partial(_norm_inputs, (3, 8, 9, 7), _FP32, _NCHW), _instance_norm),
    "depthwise_conv2d": Call(_images((2, 16, 9, 7), (16, 1, 3, 3), (2, 16, 5, 4)), _depthwise),
    "squeeze_excite": Call(
        _images((2, 16, 9, 7), (6, 16, 1, 1), (16, 6, 1, 1), (2, 16, 9, 7)), _squeeze_excite
    ),
    "linear_act": Call(_images((2, 9, 16), (24, 16), (24,), (2, 9, 24)), _linear_act),
    "dropout": Call(
        _images(*[(3, 8, 9, 7)] * 3, dtype=_BF16, layout=LAST), partial(_dropout, False)
    ),
    "dropout of channels": Call(_images(*[(3, 8, 9, 7)] * 3), partial(_dropout, True)),
    "dropout in place": Call(_images((5, 77)), _dropout_in_place),
    "interpolate, bilinear": Call(
        _images(*_CAT), partial(_interpolate, {"mode": "bilinear", "align_corners": False})
    ),
    "interpolate, nearest": Call(
        _images(*_CAT, dtype=_FP16, layout=LAST), partial(_interpolate, {"mode": "nearest"})
    ),
    "augment": Call(_augment_inputs, _augment),
}
