"""upsample_taps: a 3x3 convolution over an upsampled image, with the channels mixed first.

Upsampling mixes pixels and a convolution's tap mixes channels: they commute. So

    conv2d(up(x), weight, padding=1) = taps(conv2d(x, weight as a 1x1 kernel to 9 c_out channels))

    z[n, 3 a + b, o] = sum over i of weight[o, i, a, b] * x[n, i]
    y[n, o, p, q] = sum over a, b of up(z[n, 3 a + b, o])[p + a - 1, q + b - 1]

with 0 outside of y; z is [n, 9 c_out, h, w], y [n, c_out, H, W]. The products are made on the small
image: a fourth of them where H, W = 2h, 2w. up is upsample.py's, rows and columns of shares. CPU
alone, channels_last. Bytes: z and y once.
"""

from typing import Any

import torch
from torch import Tensor

from fastcnn.common.dtypes import new_image
from fastcnn.common.library import declare

TAPS = 9


def _fwd_fake(z: Tensor, h: int, w: int, *_: Any) -> Tensor:
    return new_image(z, (z.shape[0], z.shape[1] // TAPS, h, w), channels_last=True)


def _bwd_fake(dy: Tensor, h: int, w: int, *_: Any) -> Tensor:
    return new_image(dy, (dy.shape[0], TAPS * dy.shape[1], h, w), channels_last=True)


_HOW = "SymInt h, SymInt w, float? scale_h, float? scale_w, int sampling"
declare(f"upsample_taps_fwd(Tensor z, {_HOW}) -> Tensor", _fwd_fake)
declare(f"upsample_taps_bwd(Tensor dy, {_HOW}) -> Tensor", _bwd_fake)

upsample_taps_fwd = torch.ops.fastcnn.upsample_taps_fwd.default
upsample_taps_bwd = torch.ops.fastcnn.upsample_taps_bwd.default
