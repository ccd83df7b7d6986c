"""The sums of conv2d_int8 on the CPU, by oneDNN through PyTorch's onednn operators, exactly.

With all scales 1 those return acc as float32, which is acc itself up to 2^24. A weight that could
give more is cut into digits, w = 16 * high + low, each of which cannot: a convolution more (tests
with random weights need one from some 2000 terms on). Zero points, borders, groups, strides and
dilations are exact as they are: tests/test_conv2d_int8.py tries them, with the extremes too.

Not exact is oneDNN on processors without VNNI: pairs of products saturate at 16 bits there. Whether
they do is tried, once a process; float64 convolutions then make the sums, exact and slow, and
fastcnn.info says so. They also make those that read padding only: see onednn_crashes.
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


def digits(weight: Tensor, shift: int = 4) -> list[tuple[Tensor, int]]:
    """Return int8 weights and factors that add up to a weight, whose sums float32 all holds.

    A sum is at most 255 times that of a filter's positive weights, or of its negative ones.
    """
    rows = weight.int().flatten(1)
    largest = torch.maximum(rows.clamp(min=0).sum(1), -rows.clamp(max=0).sum(1)).max()
    if 255 * int(largest) <= _EXACT:
        return [(weight.to(torch.int8), 1)]
    high = (weight.int() + (1 << (shift - 1))) >> shift
    low = weight.int() - (high << shift)
    parts = [(part, factor << shift) for part, factor in digits(high, shift // 2)]
    return parts + digits(low, shift // 2)


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
    return [
        (_prepack(part, ones, 1.0, 0, stride, padding, dilation, groups, shape), factor)
        for part, factor in digits(weight)
    ]


@functools.cache
def onednn_is_exact() -> bool:
    """Whether oneDNN's 8-bit sums are exact here, tried with the largest products there are."""
    x = torch.full((1, 64, 4, 4), 255, dtype=torch.uint8)
    for value in (-128, 127):
        weight = torch.full((16, 64, 3, 3), value, dtype=torch.int8)
        sums = _by_onednn(x, 0, _pack(weight, (4, 4), (1, 1), (1, 1), (1, 1), 1), weight,
                          (1, 1), (1, 1), (1, 1), 1)  # fmt: skip
        if not torch.equal(sums.int(), _by_float64(x, 0, weight, (1, 1), (1, 1), (1, 1), 1)):
            return False
    return True


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
    if not onednn_is_exact() or onednn_crashes(x, weight, stride, padding, dilation):
        return lambda images: _by_float64(images, zero_point, weight, *geometry)
    known = _PACKED.get(weight.data_ptr())
    size = (x.shape[2], x.shape[3])
    if known is not None and known.weight.shape == weight.shape and weight.is_contiguous():
        parts = known.parts(size, *geometry)
    else:
        parts = _pack(weight, size, *geometry)
    return lambda images: _by_onednn(images, zero_point, parts, weight, *geometry)


def _by_onednn(
    x: Tensor,
    zero_point: int,
    parts: list[tuple[Tensor, int]],
    weight: Tensor,
    stride: Sequence[int],
    padding: Sequence[int],
    dilation: Sequence[int],
    groups: int,
) -> Tensor:
    x = x.contiguous(memory_format=torch.channels_last)
    if x.dtype is torch.int8:  # which PyTorch's operator does not take: x + 128
        x, zero_point = x.view(torch.uint8) ^ 128, zero_point + 128
    ones = torch.ones(weight.shape[0])
    zeros = torch.zeros(weight.shape[0], dtype=torch.int8)

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
