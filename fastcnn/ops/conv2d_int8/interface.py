"""conv2d_int8: a convolution of 8-bit integers, with everything up to the next one's input.

x [n, c, h, w] uint8 or int8, w [o, c / groups, kh, kw] int8, y [n, o, h_out, w_out]. fl is a
rounding to float32, rne one to an integer, both to nearest even. Every operation is written down,
so that each backend gives the same integers; none is fused with the next, none is in float64:

    acc   = sum of (x - x_zero_point) * w                 int32; padding is x_zero_point: it adds 0
    s[o]  = fl(x_scale * weight_scale[o])                 float32, as every scale

y quantised, uint8 or int8:

    b[o]  = rne(fl(bias[o] / s[o]))                       int32
    m[o]  = fl(s[o] / out_scale)                          a division: no product with a reciprocal
    z     = fl(fl(acc + b[o]) * m[o])
    z     = fl(z + fl((r - residual_zero_point) * fl(residual_scale / out_scale)))
    z     = max(z, 0), min(z, fl(6 / out_scale))          relu; relu6
    y     = saturate(rne(z) + out_zero_point)             an addition of integers

y in floating point:

    z     = fl(fl(fl(acc) * s[o]) + bias[o])
    z     = fl(z + r),  fl(z + fl((r - residual_zero_point) * residual_scale))
    y     = z, max(z, 0), min(max(z, 0), 6), rounded once to y's dtype; NaN comes through

A sum has at most 14336 terms and |b| is at most 2^26, so that |acc + b| < 2^29 is exact in int32.
It may be more than 2^24, up to which float32 has all integers: fl(acc + b) then rounds to nearest
even. b is a float32 as it is made, so that one float32 addition to an acc that float32 holds gives
the same. m and the residual's factor are at most 2^96: nothing becomes infinite, or NaN.

Rounding is monotonic and the zero point an integer. So the bounds of relu, relu6 and y's type may
stand before the rounding as after it: z between two integers, then rounded, is the rounded z
between them. The zero point is added behind the rounding: of a tie the even z is taken.

Without a residual y is what onnxruntime computes in QLinearConv: 1.32 gave the same 9.8 million
integers, from random scales. onnx.reference, in float64 and with the zero point added before the
rounding, gave 19 others, and 39 where its way was taken with a residual.

On the CPU oneDNN makes the sums (onednn.py), a few images at a time, so that they stay in
the caches for csrc/cpu/conv2d_int8.cpp, which does the rest. int8 x are made uint8 by flipping a
bit. On CUDA one Triton kernel does all (fastcnn/triton/conv2d_int8_kernels.py); it is given the sum
of each output channel's weights, which a packed weight keeps. Both compute in channels_last: an
NCHW x, residual or y is copied. Bytes: x + w + r + y.
"""

from typing import Any

import torch
from torch import Tensor

from fastcnn.common.activation import ACT_NUMBER
from fastcnn.common.checks import check_choice, check_storage
from fastcnn.common.conv_geometry import pair
from fastcnn.common.library import declare, implement
from fastcnn.ops.conv2d_int8.arguments import OP, Call, check_call, check_types, float32, quotient
from fastcnn.ops.conv2d_int8.packed_weight import (
    PackedConv2dInt8,
    accumulator,
    channel_sums,
    packed_of,
)
from fastcnn.ops.conv2d_int8.value_checks import check_data, check_grad

# Sums of so many images at a time stay in the last-level cache. On a 2-core AMD EPYC with 32 MiB of
# it, 16 images of 256x56x56: 2.66 ms by 3 MB, 2.22 by 13, 2.55 by 26.
_CHUNK_BYTES = 16 << 20


def is_channels_last(x: Tensor) -> bool:
    """Whether y is channels_last: what is dense in both layouts counts as what its strides say."""
    if not x.is_contiguous():
        return True
    _, c, h, w = x.shape
    return x.stride(1) == 1 and x.stride(3) == c and (c > 1 or h * w > 1)


def _new_output(call: Call, sizes: list[int], channels_last: bool) -> Tensor:
    format = torch.channels_last if channels_last else torch.contiguous_format
    return torch.empty(sizes, dtype=call.out_dtype, device=call.x.device, memory_format=format)


def _fake(*args: Any) -> Tensor:
    call = Call(*args)
    return _new_output(call, check_call(call), is_channels_last(call.x))


def _checked(*args: Any) -> tuple[Call, Tensor]:
    """Return the arguments, and y to be filled, in channels_last."""
    call = Call(*args)
    sizes = check_call(call)
    check_storage(
        OP,
        x=call.x,
        weight=call.weight,
        weight_scale=call.weight_scale,
        bias=call.bias,
        residual=call.residual,
    )
    check_data(call)
    return call, _new_output(call, sizes, channels_last=True)


def _cpu(*args: Any) -> Tensor:
    call, y = _checked(*args)
    x, bias, multiplier = call.x, call.bias, call.weight_scale
    if multiplier is None:
        number = call.weight_scale_number or 1.0
        multiplier = torch.full((y.shape[1],), number, dtype=torch.float32, device=x.device)
    multiplier = multiplier.contiguous() * float32(call.x_scale)
    if bias is not None:
        bias = bias.contiguous()
    if call.out_scale is not None:
        bias = None if bias is None else torch.round(bias / multiplier).int()
        # Divided by a tensor: divided by a number it would be a product with the reciprocal.
        multiplier = multiplier / torch.tensor(call.out_scale, dtype=torch.float32, device=x.device)
    if y.numel() > 0:
        added_scale, cap = call.added_scale(), quotient(6.0, call.out_scale)
        parts = min(len(x), -(-4 * y.numel() // _CHUNK_BYTES))
        step = -(-len(x) // parts)
        sums = accumulator(
            x, call.x_zero_point, call.weight, call.stride, call.padding, call.dilation, call.groups
        )
        for first in range(0, len(x), step):
            part = slice(first, first + step)
            added = call.residual
            if added is not None:
                added = added[part].contiguous(memory_format=torch.channels_last)
            torch.ops.fastcnn.conv2d_int8_epilogue(
                y[part], sums(x[part]), multiplier, bias, added, added_scale,
                call.residual_zero_point or 0, call.act, cap, call.out_zero_point or 0,
            )  # fmt: skip
    return y if is_channels_last(x) else y.contiguous()


def _cuda(*args: Any) -> Tensor:
    from fastcnn.ops.conv2d_int8.cuda import launch  # Triton, where it is needed
    from fastcnn.triton.device import current_device

    with current_device(args[0]):
        call, y = _checked(*args)
        known = packed_of(call.weight)
        launch(call, channel_sums(call.weight) if known is None else known.sums(), y)
        return y if is_channels_last(call.x) else y.contiguous()


declare(
    "conv2d_int8(Tensor x, Tensor weight, Tensor? weight_scale, Tensor? bias, Tensor? residual, "
    "float x_scale, int x_zero_point, float? residual_scale, int? residual_zero_point, "
    "float? out_scale, int? out_zero_point, ScalarType out_dtype, int[2] stride, int[2] padding, "
    "int[2] dilation, int groups, int act, float? weight_scale_number=None) -> Tensor",
    _fake,
)
implement("conv2d_int8", "cpu", _cpu)
implement("conv2d_int8", "cuda", _cuda)
declare(
    "conv2d_int8_epilogue(Tensor(a!) y, Tensor acc, Tensor multiplier, Tensor? bias, "
    "Tensor? residual, float residual_scale, int residual_zero_point, int act, float cap, "
    "int zero_point) -> ()",
    lambda *_: None,
)


def conv2d_int8(
    x: Tensor,
    weight: Tensor | PackedConv2dInt8,
    weight_scale: Tensor | float,
    x_scale: float,
    x_zero_point: int,
    bias: Tensor | None,
    stride: int | tuple[int, int],
    padding: int | tuple[int, int],
    dilation: int | tuple[int, int],
    groups: int,
    residual: Tensor | None,
    residual_scale: float | None,
    residual_zero_point: int | None,
    act: str,
    out_dtype: torch.dtype,
    out_scale: float | None,
    out_zero_point: int | None,
) -> Tensor:
    """Check and apply: see fastcnn.functional.conv2d_int8."""
    if isinstance(weight, PackedConv2dInt8):
        weight = weight.found_by_address()
    tensors = {"x": x, "weight": weight}
    if isinstance(weight_scale, (int, float)):
        scale, number = None, weight_scale
    else:
        scale, number = weight_scale, None
        tensors["weight_scale"] = weight_scale
    check_types(
        tensors,
        {"bias": bias, "residual": residual},
        {"x_scale": x_scale, "residual_scale": residual_scale, "out_scale": out_scale},
        {
            "x_zero_point": x_zero_point,
            "groups": groups,
            "residual_zero_point": residual_zero_point,
            "out_zero_point": out_zero_point,
        },
        out_dtype,
    )
    check_grad({"weight_scale": scale, "bias": bias, "residual": residual})
    check_choice(OP, "act", act, ("none", "relu", "relu6"))
    geometry = [
        pair(OP, *item)
        for item in (("stride", stride), ("padding", padding), ("dilation", dilation))
    ]
    arguments = (
        weight, scale, bias, residual, x_scale, x_zero_point, residual_scale,
        residual_zero_point, out_scale, out_zero_point, out_dtype, *geometry, groups,
        ACT_NUMBER[act], number,
    )  # fmt: skip
    return torch.ops.fastcnn.conv2d_int8.default(x, *arguments)
