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


def with_columns(x: Tensor, weight: Tensor, g: ConvGeometry) -> tuple[Tensor, ConvGeometry]:
    """Return x and g, with zeros in place of padding where onednn_crashes()."""
    if not onednn_crashes(x, weight, g.stride, g.padding, g.dilation):
        return x, g
    columns = g.padding[1]
    return F.pad(x, (columns, columns)), g._replace(padding=(g.padding[0], 0))


def onednn_crashes(
    x: Tensor,
    weight: Tensor,
    stride: Sequence[int],
    padding: Sequence[int],
    dilation: Sequence[int],
) -> bool:
    """Whether every output column reads padding only, and no column of x.

    oneDNN 3.12 has made no kernel then, and calls it for what follows the sum: the bias of a
    convolution with groups, any epilogue.
    """
    w, k, s, p, d = x.shape[3], weight.shape[3], stride[1], padding[1], dilation[1]
    # A wider x has a column under every window that is not left or right of it.
    if x.device.type != "cpu" or w == 0 or w >= max(s, d):
        return False
    first = range(-p, w + p - d * (k - 1), s)  # each window's first column
    return not any(0 <= at + i * d < w for at in first for i in range(k))
