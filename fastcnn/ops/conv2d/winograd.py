"""conv2d_winograd: 3x3 convolutions of stride 1 by Winograd's F(4, 3), in float32 on the CPU.

    y  = A' [ sum over c_in of (G w G') * (B' x B) ] A      of each tile of 4 x 4 pixels of y, from
    dx = the same of dy with the weight turned around       6 x 6 of x, * elementwise
    dw = S' [ sum over tiles of (B' x B) * (D dy D') ] S

(Lavin and Gray, "Fast algorithms for convolutional neural networks", CVPR 2016.) 36 products give
16 pixels where the definition has 144: 36 products of matrices [tiles, c_in] x [c_in, c_out] a
convolution, which PyTorch makes. The transforms around them are kernels (csrc/cpu/
conv2d_winograd.cpp); the weight's is a product with a constant matrix. Bytes: x and y once, and
2.25 times as many floats as each has, written and read: some megabytes of tiles at a time, so that
they stay in a cache. Saved for backward: what the convolution's caller saves, x and the weight.

The points are 0, 3/4, -3/4, 4/3, -4/3 and infinity. Where 0, 1, -1, 2, -2 make 2.7 to 4.1 times the
error of oneDNN's direct sums (root mean square over 2x24x24 outputs of 64 to 512 channels, all
normal), these make 1.4 to 2.2 times. A tile's error is that of its largest value, where a direct
sum has that of its own terms: beside one value of 1e6 others are off by 0.1. An infinity or NaN in
x reaches all of the tiles that read it.
With FASTCNN_WINOGRAD=off in the environment oneDNN makes them.

PyTorch's time over this, 8 images in channels_last, 2 cores of a Xeon (model 207), torch 2.13, in
turns with nothing beside it; forward with the weight's transform done before, a step with it:

                                    forward    forward, dx and dw
    32 to 32, 56 x 56                  1.52                  1.39
    64 to 64, 28 x 28                  2.12                  1.81
    64 to 64, 56 x 56                  1.94                  1.90
    128 to 32, 28 x 28                 1.84                  1.65
    128 to 128, 28 x 28                2.12                  2.15
    256 to 256, 14 x 14                2.10                  1.77
    256 to 256, 56 x 56                2.93                  2.80
    512 to 512, 7 x 7                  2.22                  1.24
    512 to 512, 14 x 14                2.07                  1.70
    64 to 64, 256 x 256 (4 images)     1.94                  2.02

NCHW, forward with two transpositions by PyTorch: 64 to 64 of 56 x 56 1.35, 128 of 28 2.0, 256 of 14
2.0, 512 of 7 1.9, 32 of 56 1.0. With oneDNN, the products and the transforms held to AVX2 on the
same machine: 2.0 to 2.6, and 1.3 to 2.5 a step. gain() is fitted to these, and to ResNets' blocks
in training: where it says 1.2 (48 channels of 14 x 14) they were level or lost 6 %, and 14 % with
576 channels of 7 x 7, whose transformed weight is written and read six times; at 1.34 (64 channels)
they gained 13 %. From LEAST_GAIN on a convolution is made so, of half types too where
float32_products.py has their products in float32: the transforms convert in registers.
"""

import os
from collections.abc import Sequence
from fractions import Fraction

import torch
from torch import Tensor

from fastcnn import _C
from fastcnn.common.activation import ACT_NUMBER
from fastcnn.common.autocast import without_autocast
from fastcnn.common.checks import in_format_of, memory_format_of
from fastcnn.common.constant_result import constant_result
from fastcnn.common.conv_geometry import ConvGeometry
from fastcnn.common.dtypes import new_image
from fastcnn.common.library import declare
from fastcnn.ops.conv2d.float32_products import is_exporting, is_slow

_POINTS = (Fraction(0), Fraction(3, 4), Fraction(-3, 4), Fraction(4, 3), Fraction(-4, 3))
_STEP, _KERNEL = 4, 3
_MATRICES = 36

LEAST_GAIN = 1.3


def _weight_rows() -> list[list[Fraction]]:
    """Return G, [6, 3]: q^k over the product of q - p, p the other points; infinity's of k = 2."""
    rows = []
    for q in _POINTS:
        product = Fraction(1)
        for p in _POINTS:
            product *= q - p if p != q else 1
        rows.append([q**k / product for k in range(_KERNEL)])
    return [*rows, [Fraction(0)] * (_KERNEL - 1) + [Fraction(1)]]


def _sum_rows() -> list[list[Fraction]]:
    """Return S', [3, 6]: q^k, and infinity's for k = 2."""
    return [[*(q**k for q in _POINTS), Fraction(int(k == _KERNEL - 1))] for k in range(_KERNEL)]


def _both_ways(rows: Sequence[Sequence[Fraction]]) -> list[list[float]]:
    """Return what is applied to a matrix row by row, column by column, as one matrix."""
    return [[float(a * b) for a in left for b in right] for left in rows for right in rows]


# [36, 9], [9, 36]; lists, since of what a trace sees a tensor would be none.
_WEIGHT, _SUM = _both_ways(_weight_rows()), _both_ways(_sum_rows())


def _fwd_fake(
    x: Tensor,
    u: Tensor,
    bias: Tensor | None,
    residual: Tensor | None,
    padding_h: int,
    padding_w: int,
    act: int,
) -> Tensor:
    h, w = x.shape[2] + 2 * padding_h - 2, x.shape[3] + 2 * padding_w - 2
    return new_image(x, (x.shape[0], u.shape[2], h, w), channels_last=True)


def _bwd_weight_fake(dy: Tensor, x: Tensor, padding_h: int, padding_w: int) -> Tensor:
    return x.new_empty((_MATRICES, x.shape[1], dy.shape[1]), dtype=torch.float32)


declare(
    "conv2d_winograd_fwd(Tensor x, Tensor u, Tensor? bias, Tensor? residual, int padding_h, "
    "int padding_w, int act) -> Tensor",
    _fwd_fake,
)
declare(
    "conv2d_winograd_bwd_weight(Tensor dy, Tensor x, int padding_h, int padding_w) -> Tensor",
    _bwd_weight_fake,
)
_fwd = torch.ops.fastcnn.conv2d_winograd_fwd.default
_bwd_weight = torch.ops.fastcnn.conv2d_winograd_bwd_weight.default


def _wanted() -> bool:
    """Read FASTCNN_WINOGRAD: off leaves these convolutions to oneDNN."""
    value = os.environ.get("FASTCNN_WINOGRAD", "on")
    if value not in ("on", "off"):
        raise ValueError(f"FASTCNN_WINOGRAD: expected on or off, got {value!r}")
    return value == "on"


_WANTED = _wanted()


@constant_result
def _has_kernels() -> bool:
    """Whether the transforms are compiled for vectors that make up for them."""
    return _WANTED and _C.cpu_capability() != "baseline"


# Transforms of the weight that a call makes: of one that is kept, in a training step for each of
# forward and backward, and where inference folds a batch norm into it each time, whose copies cost
# as much: with 512 channels on 49 to 196 pixels those calls took 1.3 to 3 times the direct ones'.
KEPT, STEP, EACH_CALL = 0, 1, 3


def by_winograd(x: Tensor, weight: Tensor, g: ConvGeometry, transforms: int) -> bool:
    """Whether a convolution of x is made so; transforms: KEPT, STEP or EACH_CALL."""
    c_out, c_in, *kernel = weight.shape
    if kernel != [_KERNEL, _KERNEL] or g.stride != (1, 1) or g.dilation != (1, 1) or g.groups != 1:
        return False
    if not (x.dtype is torch.float32 or is_slow(x.dtype)) or max(g.padding) > _KERNEL - 1:
        return False
    layout = memory_format_of(x)
    if x.device.type != "cpu" or layout is None:
        return False
    # torch.func's batches of weights have no operators of ours.
    if not _has_kernels() or is_exporting() or torch._C._are_functorch_transforms_active():
        return False
    (n, _, h, w), (p_h, p_w) = x.shape, g.padding
    sides = h + 2 * p_h - 2, w + 2 * p_w - 2
    transposes = layout is not torch.channels_last
    return gain(n, *sides, c_in, c_out, transforms, transposes) >= LEAST_GAIN


def gain(
    n: int, h: int, w: int, c_in: int, c_out: int, transforms: int, transposes: bool = False
) -> float:
    """Return about how many times as fast as a direct convolution it is, for y of [n, c_out, h, w].

    A fourth of the products, for tiles that may reach beyond the image; the transforms' floats for
    each product, and the weight's, which are read once a tile and written once a transform. NCHW
    is transposed to channels_last, and back.
    """
    tiles = n * -(-h // _STEP) * -(-w // _STEP)
    if tiles == 0:
        return 0.0
    filled = n * h * w / (tiles * _STEP**2)
    images = 26 + 40 * transposes
    cost = 1.1 + images * (1 / c_in + 1 / c_out) + 16 * (1 + 2 * transforms) / tiles
    return 4 * filled / cost


def transformed(weight: Tensor) -> Tensor:
    """Return u = G w G', [36, c_in, c_out], of a weight [c_out, c_in, 3, 3], in float32."""
    return _of_taps(weight.permute(2, 3, 1, 0))


def conv2d_winograd(
    x: Tensor,
    u: Tensor,
    bias: Tensor | None,
    padding: Sequence[int],
    act: int = ACT_NUMBER["none"],
    residual: Tensor | None = None,
) -> Tensor:
    """Return act(conv2d(x) + bias + residual) of a transformed weight, in x's layout."""
    wide = None if bias is None else bias.float()
    added = None if residual is None else _channels_last(residual)
    y: Tensor = _fwd(_channels_last(x), u, wide, added, *padding, act)
    return in_format_of(y, x)


def conv2d_winograd_bwd(
    dy: Tensor, x: Tensor, weight: Tensor, padding: Sequence[int], want: tuple[bool, bool]
) -> tuple[Tensor | None, Tensor | None]:
    """Return dx and dweight in x's type and layout, where they are wanted."""
    dy = _channels_last(dy)
    dx = dweight = None
    if want[0]:
        u = _of_taps(weight.flip(2, 3).permute(2, 3, 0, 1))
        dx = conv2d_winograd(dy, u, None, [_KERNEL - 1 - p for p in padding])
        dx = in_format_of(dx, x)
    if want[1]:
        sums = _product(_SUM, _bwd_weight(dy, _channels_last(x), *padding).view(_MATRICES, -1))
        taps = sums.view(_KERNEL, _KERNEL, *weight.shape[1::-1]).to(dy.dtype).permute(3, 2, 0, 1)
        dweight = in_format_of(taps, x)
    return dx, dweight


def _channels_last(x: Tensor) -> Tensor:
    return x.contiguous(memory_format=torch.channels_last)


def _of_taps(taps: Tensor) -> Tensor:
    sizes = taps.shape[2:]
    return _product(_WEIGHT, taps.float().reshape(_KERNEL**2, -1)).view(_MATRICES, *sizes)


def _product(rows: list[list[float]], t: Tensor) -> Tensor:
    with without_autocast(t):
        return t.new_tensor(rows) @ t
