"""Packed weights of conv2d_int8, and what makes sums of an input and a weight, packed or not."""

import threading
from collections.abc import Callable, Sequence
from typing import Any
from weakref import WeakValueDictionary

import torch
import torch.nn.functional as F
from torch import Tensor

from fastcnn.ops.conv2d.onednn_workarounds import onednn_crashes
from fastcnn.ops.conv2d_int8.arguments import DEVICES, OP, check_weight_type
from fastcnn.ops.conv2d_int8.onednn import by_float64, by_onednn, prepack
from fastcnn.ops.conv2d_int8.value_checks import check_not_capturing

_MOST_SIZES = 8  # packed copies that one weight keeps

# By the address of a packed weight's own copy, which the operator gets, on every device. packed_of
# makes sure of what it finds: `packed.weight.data = t` and its like leave an entry behind.
_PACKED: "WeakValueDictionary[int, PackedConv2dInt8]" = WeakValueDictionary()


class PackedConv2dInt8:
    """A weight of conv2d_int8, copied to channels_last, with what the backend makes of it.

    That is the sum of each output channel's weights, and what oneDNN has made of it for the inputs
    it has met. Made by fastcnn.functional.pack_conv2d_int8. What is packed is neither copied nor
    pickled with it: a copy packs its own.

    Example:
        >>> packed = fastcnn.functional.pack_conv2d_int8(torch.ones(4, 8, 3, 3, dtype=torch.int8))
        >>> packed.weight.shape, packed.to("cpu") is packed
        (torch.Size([4, 8, 3, 3]), True)
    """

    def __init__(self, weight: Tensor) -> None:
        # Outside of inference mode, where tensors do not count their changes.
        with torch.inference_mode(False), torch.no_grad():
            self.weight = weight.detach().clone(memory_format=torch.channels_last)
            self._sums = channel_sums(self.weight)
        self._parts: dict[Any, list[tuple[Tensor, int]]] = {}
        self._version = self.weight._version
        self._lock = threading.Lock()
        self._address = self._registered()

    def _registered(self) -> int:
        address = self.weight.data_ptr()
        if self.weight.device.type != "meta":
            _PACKED[address] = self
        return address

    def to(self, device: torch.device | str | int) -> "PackedConv2dInt8":
        """Return it packed on a device: itself where it is there already."""
        moved = self.weight.to(device)
        return self if moved is self.weight else PackedConv2dInt8(moved)

    def found_by_address(self) -> Tensor:
        """Return the weight, by whose address the operator finds what has packed it.

        share_memory_() moves it, as a queue of torch.multiprocessing does, and `weight.data = t`.
        """
        if not torch.compiler.is_compiling() and self.weight.data_ptr() != self._address:
            with self._lock:
                self._address, self._version = self._registered(), -1  # whose values are others
        return self.weight

    def _look_for_changes(self) -> None:
        if self._version != self.weight._version:  # somebody wrote into it
            check_not_capturing("weight", self.weight)
            self._parts.clear()
            # Into the same memory, which a captured CUDA graph reads.
            self._sums.copy_(channel_sums(self.weight))
            self._version = self.weight._version

    def sums(self) -> Tensor:
        """Return the sum of each output channel's weights."""
        with self._lock:
            self._look_for_changes()
            return self._sums

    def parts(self, size: tuple[int, int], *geometry: Any) -> list[tuple[Tensor, int]]:
        """Return the packed parts, with the factor of each, for images of a size."""
        with self._lock:
            self._look_for_changes()
            key = (size, *geometry)
            if key not in self._parts:
                while len(self._parts) >= _MOST_SIZES:
                    del self._parts[next(iter(self._parts))]
                self._parts[key] = prepack(self.weight, size, *geometry)
            return self._parts[key]

    def __repr__(self) -> str:
        sizes = "x".join(map(str, self.weight.shape))
        return f"PackedConv2dInt8({sizes}, packed for {len(self._parts)} inputs)"

    def __reduce__(self) -> tuple[Any, ...]:
        return pack_conv2d_int8, (self.weight,)


def pack_conv2d_int8(weight: Tensor) -> PackedConv2dInt8:
    """Check and copy: see fastcnn.functional.pack_conv2d_int8."""
    if not isinstance(weight, Tensor):
        raise TypeError(f"pack_{OP}: weight: expected a Tensor, got {type(weight).__name__}")
    check_weight_type(f"pack_{OP}", weight)
    if weight.dim() != 4 or weight.numel() == 0:
        raise ValueError(
            f"pack_{OP}: weight: expected 4 dimensions [c_out, c_in / groups, kh, kw], none of "
            f"them 0, got {list(weight.shape)}"
        )
    if weight.device.type not in DEVICES:
        raise ValueError(
            f"pack_{OP}: weight: expected a CPU or CUDA tensor, got one on {weight.device}"
        )
    return PackedConv2dInt8(weight)


def packed_of(weight: Tensor) -> PackedConv2dInt8 | None:
    """Return what has packed this very weight."""
    known = _PACKED.get(weight.data_ptr())
    if known is None:
        return None
    own = known.weight
    same = own.data_ptr() == weight.data_ptr() and own.device == weight.device
    return known if same and own.shape == weight.shape and own.stride() == weight.stride() else None


def channel_sums(weight: Tensor) -> Tensor:
    """Return the sum of each output channel's weights, int32."""
    return weight.sum((1, 2, 3), dtype=torch.int32)


def accumulator(
    x: Tensor,
    zero_point: int,
    weight: Tensor,
    stride: Sequence[int],
    padding: Sequence[int],
    dilation: Sequence[int],
    groups: int,
) -> Callable[[Tensor], Tensor]:
    """Return what makes images like x into sums: channels_last, integers or int32."""
    geometry = (tuple(stride), tuple(padding), tuple(dilation), groups)
    # oneDNN 3.12 errs where one channel (a group) gives one column, with a stride along it.
    reach = x.shape[3] + 2 * padding[1] - dilation[1] * (weight.shape[3] - 1) - 1
    errs = weight.shape[1] == 1 and stride[1] > 1 and reach < stride[1]
    if errs or onednn_crashes(x, weight, stride, padding, dilation):
        return lambda images: by_float64(images, zero_point, weight, *geometry)
    known = packed_of(weight)
    size = (x.shape[2], x.shape[3])
    rows, columns = padding
    # PyTorch's operator takes uint8 alone: int8 + 128.
    shift = 128 if x.dtype is torch.int8 else 0
    zero = zero_point + shift
    # And it gets zero points wrong there, in some calls and not in others, with more columns too:
    # the border is made here, and the zero point's share taken off.
    by_hand, share = zero != 0 and weight.shape[1] == 1, None
    if by_hand:
        share = zero * (channel_sums(weight) if known is None else known.sums())[:, None, None]
        size = (size[0] + 2 * rows, size[1] + 2 * columns)
        geometry = (tuple(stride), (0, 0), tuple(dilation), groups)
    parts = known.parts(size, *geometry) if known else prepack(weight, size, *geometry)

    def sums(images: Tensor) -> Tensor:
        images = images.contiguous(memory_format=torch.channels_last)
        if shift:
            images = images.view(torch.uint8) ^ shift
        if share is None:
            return by_onednn(images, zero, parts, weight.shape[0], *geometry)
        if max(padding) > 0:
            images = F.pad(images, (columns, columns, rows, rows), value=zero)
            images = images.contiguous(memory_format=torch.channels_last)
        # Both are at most 2^24 where they are float32, and so is the difference.
        return by_onednn(images, 0, parts, weight.shape[0], *geometry).sub_(share)

    return sums
