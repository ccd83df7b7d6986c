"""The arguments of conv2d_int8: what is asked of them, and the float32 arithmetic done with them.

The operator itself asks all of it, in eager calls, while tracing and in compiled calls alike: it is
Python on the CPU. value_checks.py checks values, which there are none of while tracing.
"""

import math
import struct
from collections.abc import Sequence
from typing import Any, NamedTuple

import torch
from torch import Tensor

from fastcnn.common.checks import memory_format_of
from fastcnn.common.conv_geometry import output_size, refuse_window

OP = "conv2d_int8"


def float32(value: float) -> float:
    """Return the value as float32 has it; infinity where it is too large."""
    try:
        return struct.unpack("f", struct.pack("f", value))[0]
    except OverflowError:
        return math.inf


def quotient(number: float, out_scale: float | None) -> float:
    """Return float32's number / out_scale, of a y in floating point the number itself.

    float64's quotient of two float32, rounded to float32, is float32's quotient: 53 digits are more
    than twice 24, and 1.
    """
    number = float32(number)
    return number if out_scale is None else float32(number / float32(out_scale))


class Call(NamedTuple):
    """The operator's arguments, in its schema's order."""

    x: Tensor
    weight: Tensor
    weight_scale: Tensor | None
    bias: Tensor | None
    residual: Tensor | None
    x_scale: float
    x_zero_point: int
    residual_scale: float | None
    residual_zero_point: int | None
    out_scale: float | None
    out_zero_point: int | None
    out_dtype: torch.dtype
    stride: Sequence[int]
    padding: Sequence[int]
    dilation: Sequence[int]
    groups: int
    act: int
    weight_scale_number: float | None = None  # of all channels, in place of weight_scale

    def scale(self) -> float:
        """What each channel's weight_scale is multiplied by; without them s itself."""
        number = self.weight_scale_number
        return float32(float32(self.x_scale) * (1.0 if number is None else float32(number)))

    def added_scale(self) -> float:
        """What a residual is multiplied by: in units of y where that is quantised."""
        if self.residual_scale is not None:
            return quotient(self.residual_scale, self.out_scale)
        return 1.0


INT8 = (torch.uint8, torch.int8)
# What makes the two of floats, a scale for each output channel and one for the image.
_QUANTISED_WEIGHT = (
    "quantise it, and pass weight_scale: weight_scale = weight.abs().amax((1, 2, 3)) / 127; "
    "weight = (weight / weight_scale[:, None, None, None]).round().to(torch.int8)"
)
_QUANTISED_IMAGE = (
    "quantise it: x = (x / x_scale + x_zero_point).round().clamp(0, 255).to(torch.uint8)"
)


FLOATS = (torch.float32, torch.bfloat16, torch.float16)


DEVICES = ("cpu", "cuda", "meta")


# So many products of at most 255 * 128, and a bias of MOST_BIAS, stay below 2^29: interface.py.
# U-Net has 13824 of them, 3x3 over 1536 channels.
MOST_TERMS = 14336

# What sums and a residual are multiplied by for a quantised y: float32 then holds all that follows.
MOST_FACTOR = 2.0**96


def check_types(
    tensors: dict[str, Any],
    optional: dict[str, Any],
    reals: dict[str, Any],
    integers: dict[str, Any],
    out_dtype: Any,
) -> None:
    """Check what the dispatcher would refuse in its own words."""
    for name, t in (tensors | {key: t for key, t in optional.items() if t is not None}).items():
        if not isinstance(t, Tensor):
            raise TypeError(f"{OP}: {name}: expected a Tensor, got {type(t).__name__}")
    for name, value in reals.items():
        if not isinstance(value, (int, float)) and not (value is None and name != "x_scale"):
            raise TypeError(f"{OP}: {name}: expected a number, got {type(value).__name__}")
    for name, value in integers.items():
        optional_number = name in ("residual_zero_point", "out_zero_point")
        if not isinstance(value, int) and not (value is None and optional_number):
            raise TypeError(f"{OP}: {name}: expected an integer, got {type(value).__name__}")
    if not isinstance(out_dtype, torch.dtype):
        raise TypeError(f"{OP}: out_dtype: expected a torch.dtype, got {type(out_dtype).__name__}")
    for name, t in tensors.items():
        if t.device.type not in DEVICES:
            raise ValueError(f"{OP}: {name}: expected a CPU or CUDA tensor, got one on {t.device}")


def check_call(call: Call) -> list[int]:
    """Check everything but the data of tensors; return y's sizes."""
    x, weight, residual, out_dtype = call.x, call.weight, call.residual, call.out_dtype
    _check_image("x", x, INT8, "uint8 or int8")
    check_weight_type(OP, weight)
    _check_scale("x_scale", call.x_scale)
    _check_zero_point("x_zero_point", call.x_zero_point, x.dtype)
    if out_dtype in INT8:
        _check_scale("out_scale", call.out_scale)
        _check_zero_point("out_zero_point", call.out_zero_point, out_dtype)
    elif out_dtype not in FLOATS:
        raise ValueError(
            f"{OP}: out_dtype: expected uint8, int8, float32, bfloat16 or float16, got {out_dtype}"
        )
    else:
        outs = {"out_scale": call.out_scale, "out_zero_point": call.out_zero_point}
        _check_none(f"beside {out_dtype}", **outs)
    if not 0 <= call.act <= 2:
        raise ValueError(f"{OP}: act: expected 0, 1 or 2, got {call.act}")
    _check_weight(x, weight, call.groups)
    c_out = weight.shape[0]
    if call.weight_scale is None:
        _check_scale("weight_scale", call.weight_scale_number)
    else:
        _check_none("beside a tensor", weight_scale_number=call.weight_scale_number)
    for name, t in (("weight_scale", call.weight_scale), ("bias", call.bias)):
        if t is not None:
            _check_channels(name, t, c_out, x)
    window, geometry = weight.shape[2:], (call.stride, call.padding, call.dilation)
    sides = output_size(x.shape[2:], window, *geometry) if min(call.stride) > 0 else [0]
    small = min(call.padding) < 0 or min(call.dilation) < 1 or min(x.shape[2:]) < 1
    if small or min(sides) < 1 or max(map(max, geometry)) >= 2**20:
        refuse_window(OP, x.shape, window, *geometry)
    out = [x.shape[0], c_out, *sides]
    if residual is not None:
        _check_residual(residual, out, out_dtype, x)
    if residual is not None and residual.dtype in INT8:
        _check_scale("residual_scale", call.residual_scale)
        _check_zero_point("residual_zero_point", call.residual_zero_point, residual.dtype)
        if call.out_scale is not None and not 0 < call.added_scale() <= MOST_FACTOR:
            raise ValueError(
                f"{OP}: residual_scale: expected a scale above 0 and at most {MOST_FACTOR:g} in "
                f"units of out_scale, got {call.residual_scale} with out_scale {call.out_scale}"
            )
    else:
        what = "without an 8-bit residual"
        numbers = {"residual_scale": call.residual_scale}
        _check_none(what, **numbers, residual_zero_point=call.residual_zero_point)
    return out


def _check_image(name: str, t: Tensor, dtypes: Sequence[torch.dtype], expected: str) -> None:
    if t.dtype not in dtypes:
        way = f"; {_QUANTISED_IMAGE}" if name == "x" and t.is_floating_point() else ""
        raise TypeError(f"{OP}: {name}: expected {expected}, got {t.dtype}{way}")
    if t.layout is not torch.strided or t.dim() != 4:
        raise ValueError(f"{OP}: {name}: expected 4 dimensions [n, c, h, w], got {list(t.shape)}")
    if memory_format_of(t) is None:
        raise ValueError(
            f"{OP}: {name}: expected a dense NCHW or channels_last tensor, got sizes "
            f"{list(t.shape)} with strides {list(t.stride())}; call {name}.contiguous(memory_format"
            f"=torch.channels_last) first"
        )


def check_weight_type(op: str, weight: Tensor) -> None:
    """Check that a weight is quantised."""
    if weight.dtype is not torch.int8:
        way = f"; {_QUANTISED_WEIGHT}" if weight.is_floating_point() else ""
        raise TypeError(f"{op}: weight: expected int8, got {weight.dtype}{way}")


def _check_weight(x: Tensor, weight: Tensor, groups: int) -> None:
    if weight.dim() != 4 or weight.numel() == 0 or weight.layout is not torch.strided:
        raise ValueError(
            f"{OP}: weight: expected 4 dimensions [c_out, c_in / groups, kh, kw], none of them 0, "
            f"got {list(weight.shape)}"
        )
    _check_device("weight", weight, x)
    if groups < 1 or weight.shape[0] % groups != 0:
        raise ValueError(
            f"{OP}: groups: expected a divisor of {weight.shape[0]} output channels, got {groups}"
        )
    if weight.shape[1] * groups != x.shape[1]:
        raise ValueError(
            f"{OP}: x: expected {weight.shape[1] * groups} channels for weight "
            f"{list(weight.shape)} with groups={groups}, got {x.shape[1]}: {list(x.shape)}"
        )
    terms = weight.shape[1] * weight.shape[2] * weight.shape[3]
    if terms > MOST_TERMS:
        raise ValueError(
            f"{OP}: weight: expected at most {MOST_TERMS} products in a sum, since more could "
            f"leave int32's exact range, got {terms} ({list(weight.shape[1:])})"
        )


def _check_channels(name: str, t: Tensor, channels: int, x: Tensor) -> None:
    if t.dtype is not torch.float32:
        raise TypeError(f"{OP}: {name}: expected float32, got {t.dtype}")
    if t.shape != (channels,):
        raise ValueError(
            f"{OP}: {name}: expected {channels} numbers, one for each output channel, got sizes "
            f"{list(t.shape)}"
        )
    _check_device(name, t, x)


def _check_residual(t: Tensor, sizes: list[int], out_dtype: torch.dtype, x: Tensor) -> None:
    floating = out_dtype not in INT8
    expected = f"uint8, int8 or {out_dtype} as out_dtype" if floating else "uint8 or int8"
    _check_image("residual", t, (*INT8, out_dtype), expected)
    if list(t.shape) != sizes:
        raise ValueError(f"{OP}: residual: expected sizes {sizes}, got {list(t.shape)}")
    _check_device("residual", t, x)
    layouts = (torch.contiguous_format, torch.channels_last)
    # What is dense in both layouts is in x's.
    same = memory_format_of(t) is memory_format_of(x)
    same = same or any(all(i.is_contiguous(memory_format=f) for i in (t, x)) for f in layouts)
    if not same:
        raise ValueError(
            f"{OP}: residual: expected x's memory format {memory_format_of(x)}, got strides "
            f"{list(t.stride())}; call residual.contiguous(memory_format={memory_format_of(x)}) "
            f"first"
        )


def _check_device(name: str, t: Tensor, x: Tensor) -> None:
    if t.device != x.device:
        raise ValueError(f"{OP}: {name}: expected device {x.device}, got {t.device}")


def _check_scale(name: str, scale: float | None) -> None:
    if scale is None or not torch.finfo(torch.float32).tiny <= float32(scale) < math.inf:
        raise ValueError(f"{OP}: {name}: expected a finite number above 0, got {scale}")


def _check_none(why: str, **values: float | None) -> None:
    for name, value in values.items():
        if value is not None:
            raise ValueError(f"{OP}: {name}: expected None {why}, got {value}")


def _check_zero_point(name: str, value: int | None, dtype: torch.dtype) -> None:
    info = torch.iinfo(dtype)
    if value is None or not info.min <= value <= info.max:
        raise ValueError(
            f"{OP}: {name}: expected {info.min} to {info.max} beside {dtype}, got {value}"
        )
