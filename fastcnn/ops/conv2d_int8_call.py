"""The arguments of conv2d_int8, and the float32 arithmetic that its formula does with numbers."""

import math
import struct
from collections.abc import Sequence
from typing import NamedTuple

import torch
from torch import Tensor

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
