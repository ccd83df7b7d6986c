"""The convolutions of a chain: PyTorch's own, forward and backward, and its max pooling.

On the CPU fastcnn's are depthwise ones (depthwise_conv2d.py), most of 3x3 in float32 (winograd.py)
and, in bfloat16 with AVX512-BF16, the weight gradient (weight_grad.py); half types may have their
products in float32 (float32_products.py).
"""

import torch
from torch import Tensor

from fastcnn.common.checks import as_convolved, in_format_of
from fastcnn.common.conv_geometry import ConvGeometry, Pool
from fastcnn.common.dtypes import acc_type
from fastcnn.ops.conv2d.float32_products import in_backward, in_float32
from fastcnn.ops.conv2d.onednn_workarounds import onednn_overruns, with_border
from fastcnn.ops.conv2d.weight_grad import conv2d_bwd_weight, has_conv2d_bwd_weight
from fastcnn.ops.conv2d.winograd import (
    STEP,
    by_winograd,
    conv2d_winograd,
    conv2d_winograd_bwd,
    transformed,
)
from fastcnn.ops.depthwise_conv2d import depthwise_bwd, depthwise_fwd, is_depthwise

_convolution_backward = torch.ops.aten.convolution_backward.default
_max_pool = torch.ops.aten.max_pool2d_with_indices.default
_max_pool_backward = torch.ops.aten.max_pool2d_with_indices_backward.default


def convolve(x: Tensor, weight: Tensor, bias: Tensor | None, g: ConvGeometry) -> Tensor:
    """Return conv2d(x, weight, bias), whichever kernel makes it in the layout of PyTorch's."""
    x = as_convolved(x, weight)
    if is_depthwise(x, weight, g.groups):
        return depthwise_fwd(x, weight, bias, g[:3])
    if by_winograd(x, weight, g, STEP):
        return conv2d_winograd(x, transformed(weight), bias, g.padding)
    if in_float32(x, weight, g):
        wide = None if bias is None else bias.float()
        return convolve(x.float(), weight.float(), wide, g).to(x.dtype)
    x, g = with_border(x, weight, g)
    # Not the operator of torch.ops, whose call takes 5 us more.
    return torch.convolution(
        x, weight, bias, g.stride, g.padding, g.dilation, False, (0, 0), g.groups
    )


def convolve_bwd(
    dy: Tensor,
    x: Tensor,
    weight: Tensor,
    bias: Tensor | None,
    g: ConvGeometry,
    want: tuple[bool, bool, bool],
) -> tuple[Tensor | None, Tensor | None, Tensor | None]:
    """Return dx, dweight, dbias, with None for what is not wanted."""
    if is_depthwise(x, weight, g.groups):
        dx, dweight, sums = depthwise_bwd(in_format_of(dy, x), x, weight, g[:3], want)
        return dx, dweight, None if sums is None else sums.to(dy.dtype)
    if any(want[:2]) and by_winograd(x, weight, g, STEP):
        pair = conv2d_winograd_bwd(dy, x, weight, g.padding, want[:2])
        return *pair, _bias_gradient(dy) if want[2] else None
    if in_float32(x, weight, g, backward=True):
        # Without dweight only the input's sizes and layout matter.
        image = in_backward(x) if want[1] else torch.empty_like(x, dtype=torch.float32)
        found = convolve_bwd(dy.float(), image, in_backward(weight), bias, g, want)
        dx, dweight, sums = (None if t is None else t.to(dy.dtype) for t in found)
        return dx, dweight, sums
    dweight = _own_bwd_weight(dy, x, weight, g) if want[1] else None
    dbias: Tensor | None = None
    by_torch = (want[0], want[1] and dweight is None, want[2])
    if want[2] and not by_torch[1]:  # oneDNN would compute the weight's gradient with it
        dbias = _bias_gradient(dy)
        by_torch = (want[0], False, False)
    if not any(by_torch):
        return None, dweight, dbias
    dx, *more = _convolution_backward(
        dy, x, weight, None if bias is None else list(bias.shape),
        g.stride, g.padding, g.dilation, False, (0, 0), g.groups, by_torch,
    )  # fmt: skip
    return dx, more[0] if by_torch[1] else dweight, more[1] if by_torch[2] else dbias


def outruns_pytorch(x: Tensor, weight: Tensor, g: ConvGeometry) -> bool:
    """Whether a convolution of images as x, in training, is made otherwise, and far faster.

    docs/performance.md, "Small feature maps", has how much.
    """
    if is_depthwise(x, weight, g.groups):
        return max(weight.shape[2:]) > 3
    larger = max(weight.shape[2:]) > 1
    return larger and (by_winograd(x, weight, g, STEP) or in_float32(x, weight, g))


def _bias_gradient(dy: Tensor) -> Tensor:
    return dy.sum((0, 2, 3), dtype=acc_type(dy)).to(dy.dtype)


def _own_bwd_weight(dy: Tensor, x: Tensor, weight: Tensor, g: ConvGeometry) -> Tensor | None:
    """Return dweight where PyTorch's own call is slower, or wrong."""
    if has_conv2d_bwd_weight(dy, x, g):
        return conv2d_bwd_weight(dy, x, weight, g)
    if not onednn_overruns(weight, g.stride):
        return None
    # Cloned, since .contiguous() leaves the strides of what is both layouts as they are.
    nchw = [t.clone(memory_format=torch.contiguous_format) for t in (dy, x, weight)]
    return _convolution_backward(
        *nchw, None, g.stride, g.padding, g.dilation, False, (0, 0), g.groups, (False, True, False)
    )[1]


def max_pool(x: Tensor, pool: Pool | None) -> Tensor:
    """Return max_pool2d(x), x without a pool."""
    return x if pool is None else max_pool_with_indices(x, pool)[0]


def max_pool_with_indices(x: Tensor, pool: Pool) -> tuple[Tensor, Tensor]:
    """Return max_pool2d(x), and where in x each value is from: 8 bytes each."""
    y, indices = _max_pool(x, *pool)
    return y, indices


def max_pool_bwd(dy: Tensor, x: Tensor, indices: Tensor | None, pool: Pool) -> Tensor:
    """Return dx, of x's sizes; where the indices were not saved, the windows of x are searched."""
    if indices is None:
        _, indices = max_pool_with_indices(x, pool)
    return _max_pool_backward(dy, x, *pool, (1, 1), False, indices)
