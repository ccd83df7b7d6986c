"""The sums of conv2d_int8 on the CPU, by oneDNN through PyTorch's onednn operators, exactly.

With all scales 1 those return acc as float32, which is acc itself up to 2^24. A weight that could
give more is cut into digits, w = 16 * high + low, each of which cannot: a convolution more. The
rest is exact as it is, zero points, borders, groups, strides and dilations, except for some
convolutions of one channel a group, which accumulator goes around.

Without VNNI oneDNN adds products in pairs, which saturate at 16 bits. Whether it does is tried once
a process; every weight beyond 64 is then cut into digits, and fastcnn.info says so.
"""

import functools
import threading
from collections.abc import Callable, Sequence
from typing import Any
from weakref import WeakValueDictionary

import torch
import torch.nn.functional as F
from torch import Tensor

from fastcnn.ops.conv2d_int8_checks import OP
from fastcnn.ops.convolution import onednn_crashes

_EXACT = 1 << 24  # of float32
_MOST_SIZES = 8  # packed copies that one weight keeps
_qconv = torch.ops.onednn.qconv2d_pointwise.default
_prepack = torch.ops.onednn.qconv_prepack.default

# By the address of a packed weight's own copy, which the operator gets: nobody else has it as long
# as the PackedConv2dInt8 lives, and with it the entry goes.
_PACKED: "WeakValueDictionary[int, PackedConv2dInt8]" = WeakValueDictionary()


class PackedConv2dInt8:
    """A weight of conv2d_int8, copied, with what oneDNN has made of it for the inputs it has met.

    Made by fastcnn.functional.pack_conv2d_int8. What is packed is neither copied nor pickled with
    it: a copy packs its own at its first call.
    """

    def __init__(self, weight: Tensor) -> None:
        # Outside of inference mode, where tensors do not count their changes.
        with torch.inference_mode(False), torch.no_grad():
            self.weight = weight.detach().clone(memory_format=torch.contiguous_format)
        self._parts: dict[Any, list[tuple[Tensor, int]]] = {}
        self._version = self.weight._version
        self._lock = threading.Lock()
        if self.weight.device.type == "cpu" and self.weight.numel() > 0:
            _PACKED[self.weight.data_ptr()] = self

    def parts(self, size: tuple[int, int], *geometry: Any) -> list[tuple[Tensor, int]]:
        """Return the packed digits, with the factor of each, for images of a size."""
        with self._lock:
            if self._version != self.weight._version:  # somebody wrote into it
                self._parts.clear()
                self._version = self.weight._version
            key = (size, *geometry)
            if key not in self._parts:
                while len(self._parts) >= _MOST_SIZES:
                    del self._parts[next(iter(self._parts))]
                self._parts[key] = _pack(self.weight, size, *geometry)
            return self._parts[key]

    def __repr__(self) -> str:
        sizes = "x".join(map(str, self.weight.shape))
        return f"PackedConv2dInt8({sizes}, packed for {len(self._parts)} inputs)"

    def __reduce__(self) -> tuple[Any, ...]:
        return pack_conv2d_int8, (self.weight,)


def pack_conv2d_int8(weight: Tensor) -> PackedConv2dInt8:
    """Check and copy: see fastcnn.functional.pack_conv2d_int8."""
    if not isinstance(weight, Tensor) or weight.dtype is not torch.int8:
        got = weight.dtype if isinstance(weight, Tensor) else type(weight).__name__
        raise TypeError(f"pack_{OP}: weight: expected an int8 Tensor, got {got}")
    if weight.dim() != 4 or weight.numel() == 0:
        raise ValueError(
            f"pack_{OP}: weight: expected 4 dimensions [c_out, c_in / groups, kh, kw], none of "
            f"them 0, got {list(weight.shape)}"
        )
    if weight.device.type not in ("cpu", "meta"):
        why = "there is no CUDA kernel yet" if weight.is_cuda else "there is a CPU kernel only"
        raise ValueError(
            f"pack_{OP}: weight: expected a CPU tensor: {why}, got one on {weight.device}"
        )
    return PackedConv2dInt8(weight)


def digits(weight: Tensor, most: int = 128, shift: int = 4) -> list[tuple[Tensor, int]]:
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
    parts = [(part, factor << shift) for part, factor in digits(high, most, shift // 2)]
    return parts + digits(low, most, shift // 2)


def _pack(
    weight: Tensor,
    size: tuple[int, int],
    stride: Sequence[int],
    padding: Sequence[int],
    dilation: Sequence[int],
    groups: int,
) -> list[tuple[Tensor, int]]:
    ones = torch.ones(weight.shape[0])
    shape = [1, weight.shape[1] * groups, *size]  # the batch makes no difference
    most = 64 if pairs_saturate() else 128  # 2 * 255 * 64 < 2^15
    return [
        (_prepack(part, ones, 1.0, 0, stride, padding, dilation, groups, shape), factor)
        for part, factor in digits(weight, most)
    ]


@functools.cache
def pairs_saturate() -> bool:
    """Whether oneDNN's sums of two products saturate on this processor, tried with the largest."""
    x = torch.full((1, 32, 4, 4), 255, dtype=torch.uint8)
    x = x.contiguous(memory_format=torch.channels_last)
    plain = ((1, 1), (0, 0), (1, 1), 1)
    for value in (-128, 127):
        weight = torch.full((16, 32, 3, 3), value, dtype=torch.int8)
        part = _prepack(weight, torch.ones(16), 1.0, 0, *plain, [1, 32, 4, 4])
        if not (_by_onednn(x, 0, [(part, 1)], 16, *plain) == 32 * 9 * 255 * value).all():
            return True
    return False


def accumulator(
    x: Tensor,
    zero_point: int,
    weight: Tensor,
    stride: Sequence[int],
    padding: Sequence[int],
    dilation: Sequence[int],
    groups: int,
) -> Callable[[Tensor], Tensor]:
    """Return what makes images like x into sums: channels_last, whole numbers or int32."""
    geometry = (tuple(stride), tuple(padding), tuple(dilation), groups)
    columns_out = (x.shape[3] + 2 * padding[1] - dilation[1] * (weight.shape[3] - 1) - 1) // stride[
        1
    ]
    # Likewise wrong: one channel (a group), one column that it gives, and a stride along it.
    errs = weight.shape[1] == 1 and columns_out == 0 and stride[1] > 1
    if errs or onednn_crashes(x, weight, stride, padding, dilation):
        return lambda images: _by_float64(images, zero_point, weight, *geometry)
    known = _PACKED.get(weight.data_ptr())
    size = (x.shape[2], x.shape[3])
    rows, columns = padding
    # PyTorch's operator takes uint8 alone: int8 + 128.
    shift = 128 if x.dtype is torch.int8 else 0
    zero = zero_point + shift
    # Of one channel (a group) oneDNN 3.12 gets zero points wrong, not in every call. There the
    # border is made here, and the zero point's share taken off.
    by_hand = zero != 0 and weight.shape[1] == 1
    share = zero * weight.int().sum((1, 2, 3))[:, None, None] if by_hand else None
    if by_hand:
        size = (size[0] + 2 * rows, size[1] + 2 * columns)
        geometry = (tuple(stride), (0, 0), tuple(dilation), groups)
    if known is not None and known.weight.shape == weight.shape and weight.is_contiguous():
        parts = known.parts(size, *geometry)
    else:
        parts = _pack(weight, size, *geometry)

    def sums(images: Tensor) -> Tensor:
        images = images.contiguous(memory_format=torch.channels_last)
        if shift:
            images = images.view(torch.uint8) ^ shift
        if share is None:
            return _by_onednn(images, zero, parts, weight.shape[0], *geometry)
        if max(padding) > 0:
            images = F.pad(images, (columns, columns, rows, rows), value=zero)
            images = images.contiguous(memory_format=torch.channels_last)
        # Both are at most 2^24 where they are float32, and so is the difference.
        return _by_onednn(images, 0, parts, weight.shape[0], *geometry).sub_(share)

    return sums


def _by_onednn(
    x: Tensor,
    zero_point: int,
    parts: list[tuple[Tensor, int]],
    c_out: int,
    stride: Sequence[int],
    padding: Sequence[int],
    dilation: Sequence[int],
    groups: int,
) -> Tensor:
    ones, zeros = torch.ones(c_out), torch.zeros(c_out, dtype=torch.int8)

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


def _by_float64(
    x: Tensor,
    zero_point: int,
    weight: Tensor,
    stride: Sequence[int],
    padding: Sequence[int],
    dilation: Sequence[int],
    groups: int,
) -> Tensor:
    sums = F.conv2d(x.double() - zero_point, weight.double(), None, stride, padding, dilation,
                    groups)  # fmt: skip
    return sums.int().contiguous(memory_format=torch.channels_last)
