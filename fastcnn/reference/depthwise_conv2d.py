"""depthwise_conv2d as shifted, weighted copies of the image, without torch's own convolution."""

import torch
from torch import Tensor

from fastcnn.common.activation import activation
from fastcnn.common.conv_geometry import Pair, output_size


def depthwise_conv2d(
    x: Tensor,
    weight: Tensor,
    bias: Tensor | None = None,
    stride: Pair = (1, 1),
    padding: Pair = (0, 0),
    dilation: Pair = (1, 1),
    act: str = "none",
) -> Tensor:
    """Return y of x [n, c, h, w] and weight [c, 1, kh, kw]."""
    (kh, kw), (sh, sw), (ph, pw), (dh, dw) = weight.shape[2:], stride, padding, dilation
    h, w = output_size(x.shape[2:], (kh, kw), stride, padding, dilation)
    padded = torch.nn.functional.pad(x, (pw, pw, ph, ph))
    z = x.new_zeros(*x.shape[:2], h, w)
    for a in range(kh):
        for b in range(kw):
            rows = slice(a * dh, a * dh + (h - 1) * sh + 1, sh)
            columns = slice(b * dw, b * dw + (w - 1) * sw + 1, sw)
            z = z + weight[:, 0, a, b, None, None] * padded[..., rows, columns]
    return activation(z if bias is None else z + bias[:, None, None], act)
