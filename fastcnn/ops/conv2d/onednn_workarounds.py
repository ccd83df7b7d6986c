"""What oneDNN computes wrongly, and how it is kept from it."""

from collections.abc import Sequence

import torch.nn.functional as F
from torch import Tensor

from fastcnn.common.conv_geometry import ConvGeometry


def onednn_overruns(weight: Tensor, stride: Sequence[int]) -> bool:
    """Whether oneDNN's weight gradient would write past its scratch memory in channels_last.

    Of 1x1 convolutions with a stride and fewer input channels than a vector has lanes
    (https://github.com/uxlfoundation/oneDNN/issues/6035, open in torch 2.13: bfloat16 on AVX-512
    corrupts the heap). NCHW takes another way there.
    """
    narrow = tuple(weight.shape[2:]) == (1, 1) and weight.shape[1] < 16
    return weight.device.type == "cpu" and narrow and max(stride) > 1


def with_border(x: Tensor, weight: Tensor, g: ConvGeometry) -> tuple[Tensor, ConvGeometry]:
    """Return x and g, with zeros in place of the padding for which onednn_crashes().

    Not of the other side too: on AMX oneDNN errs in some convolutions of one column.
    """
    if g.stride == g.dilation == (1, 1):  # most, and none of those: spared 3 us of each call
        return x, g
    rows, columns = _padding_only(x, weight, g.stride, g.padding, g.dilation)
    if not rows and not columns:
        return x, g
    h, w = g.padding[0] * rows, g.padding[1] * columns
    return F.pad(x, (w, w, h, h)), g._replace(padding=(g.padding[0] - h, g.padding[1] - w))


def onednn_crashes(
    x: Tensor,
    weight: Tensor,
    stride: Sequence[int],
    padding: Sequence[int],
    dilation: Sequence[int],
) -> bool:
    """Whether every output row, or every output column, reads padding only, and nothing of x.

    oneDNN 3.12 has made no kernel then, and calls it for what follows the sum: of columns the bias
    of a convolution with groups and any epilogue, on AMX of rows too, in bfloat16 and 8 bits.
    """
    return any(_padding_only(x, weight, stride, padding, dilation))


def _padding_only(
    x: Tensor,
    weight: Tensor,
    stride: Sequence[int],
    padding: Sequence[int],
    dilation: Sequence[int],
) -> tuple[bool, bool]:
    """Say it of rows and of columns."""
    if x.device.type != "cpu":
        return False, False
    (h, w), (kh, kw) = x.shape[2:], weight.shape[2:]
    return (
        _reads_padding_only(h, kh, stride[0], padding[0], dilation[0]),
        _reads_padding_only(w, kw, stride[1], padding[1], dilation[1]),
    )


def _reads_padding_only(size: int, kernel: int, stride: int, padding: int, dilation: int) -> bool:
    # A larger image has a pixel under every window that does not lie before or behind it.
    if size == 0 or size >= max(stride, dilation):
        return False
    first = range(-padding, size + padding - dilation * (kernel - 1), stride)
    return not any(0 <= at + i * dilation < size for at in first for i in range(kernel))
