"""The sums of conv2d_int8 on the CPU, by oneDNN through PyTorch's onednn operators, exactly.

With all scales 1 those return acc as float32, which is acc itself up to 2^24. A weight that could
give more is cut into parts, w = 16 * high + low, each of which cannot: a convolution more. The
rest is exact as it is, zero points, borders, groups, strides and dilations, except for some
convolutions of one channel a group, which accumulator goes around.

Without VNNI oneDNN adds products in pairs, which saturate at 16 bits. Whether it does is tried once
a process; every weight beyond 64 is then cut into parts, and fastcnn.info says so.
"""

import functools
from collections.abc import Sequence

import torch
import torch.nn.functional as F
from torch import Tensor

_EXACT = 1 << 24  # of float32
_qconv = torch.ops.onednn.qconv2d_pointwise.default
_prepack = torch.ops.onednn.qconv_prepack.default


def high_and_low(weight: Tensor, most: int = 128, shift: int = 4) -> list[tuple[Tensor, int]]:
    """Return int8 weights of at most `most`, and factors, that add up to a weight.

    float32 holds the sums of each: they are at most 255 times the sum of a filter's positive
    weights, or of its negative ones.
    """
    rows = weight.int().flatten(1)
    largest = torch.maximum(rows.clamp(min=0).sum(1), -rows.clamp(max=0).sum(1)).max()
    if 255 * int(largest) <= _EXACT and int(rows.abs().max()) <= most:
        return [(weight.to(torch.int8), 1)]
    high = (weight.int() + (1 << (shift - 1))) >> shift
    low = weight.int() - (high << shift)
    parts = [(part, factor << shift) for part, factor in high_and_low(high, most, shift // 2)]
    return parts + high_and_low(low, most, shift // 2)


def prepack(
    weight: Tensor,
    size: tuple[int, int],
    stride: Sequence[int],
    padding: Sequence[int],
    dilation: Sequence[int],
    groups: int,
) -> list[tuple[Tensor, int]]:
    """Return a weight's parts as oneDNN wants them for images of a size, with their factors."""
    ones = torch.ones(weight.shape[0], device="cpu")
    shape = [1, weight.shape[1] * groups, *size]  # the batch makes no difference
    most = 64 if pairs_saturate() else 128  # 2 * 255 * 64 < 2^15
    return [
        (_prepack(part, ones, 1.0, 0, stride, padding, dilation, groups, shape), factor)
        for part, factor in high_and_low(weight.contiguous(), most)
    ]


@functools.cache
def pairs_saturate() -> bool:
    """Whether oneDNN's sums of two products saturate on this processor, tried with the largest."""
    x = torch.full((1, 32, 4, 4), 255, dtype=torch.uint8, device="cpu")
    x = x.contiguous(memory_format=torch.channels_last)
    plain = ((1, 1), (0, 0), (1, 1), 1)
    ones = torch.ones(16, device="cpu")
    for value in (-128, 127):
        weight = torch.full((16, 32, 3, 3), value, dtype=torch.int8, device="cpu")
        part = _prepack(weight, ones, 1.0, 0, *plain, [1, 32, 4, 4])
        if not (by_onednn(x, 0, [(part, 1)], 16, *plain) == 32 * 9 * 255 * value).all():
            return True
    return False


def by_onednn(
    x: Tensor,
    zero_point: int,
    parts: list[tuple[Tensor, int]],
    c_out: int,
    stride: Sequence[int],
    padding: Sequence[int],
    dilation: Sequence[int],
    groups: int,
) -> Tensor:
    """Return the sums of uint8 images, channels_last: float32, or int32 of several parts."""
    ones = torch.ones(c_out, device="cpu")
    zeros = torch.zeros(c_out, dtype=torch.int8, device="cpu")

    def convolve(part: Tensor) -> Tensor:
        return _qconv(
            x, 1.0, zero_point, part, ones, zeros, None, stride, padding, dilation, groups,
            1.0, 0, torch.float32, "none", [], "",
        )  # fmt: skip

    if len(parts) == 1:
        return convolve(parts[0][0])
    sums = convolve(parts[0][0]).int().mul_(parts[0][1])
    for part, factor in parts[1:]:
        sums.add_(convolve(part).int(), alpha=factor)
    return sums


def by_float64(
    x: Tensor,
    zero_point: int,
    weight: Tensor,
    stride: Sequence[int],
    padding: Sequence[int],
    dilation: Sequence[int],
    groups: int,
) -> Tensor:
    """Return the sums as int32, channels_last."""
    sums = F.conv2d(
        x.double() - zero_point, weight.double(), None, stride, padding, dilation, groups
    )
    return sums.int().contiguous(memory_format=torch.channels_last)
