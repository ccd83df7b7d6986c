"""The convolutions of a chain: PyTorch's own, forward and backward, and its max pooling.

One is fastcnn's: the weight gradient in bfloat16 on CPUs with AVX512-BF16 (weight_grad.py).
"""

import torch
from torch import Tensor

from fastcnn.common.conv_geometry import ConvGeometry, Pool
from fastcnn.ops.conv2d.onednn_workarounds import onednn_overruns, with_border
from fastcnn.ops.conv2d.weight_grad import conv2d_bwd_weight, has_conv2d_bwd_weight

_convolution = torch.ops.aten.convolution.default
_convolution_backward = torch.ops.aten.convolution_backward.default
_max_pool = torch.ops.aten.max_pool2d_with_indices.default
_max_pool_backward = torch.ops.aten.max_pool2d_with_indices_backward.default


def convolve(x: Tensor, weight: Tensor, bias: Tensor | None, g: ConvGeometry) -> Tensor:
    """Return conv2d(x, weight, bias)."""
    x, g = with_border(x, weight, g)
    return _convolution(x, weight, bias, g.stride, g.padding, g.dilation, False, (0, 0), g.groups)


def convolve_bwd(
    dy: Tensor,
    x: Tensor,
    weight: Tensor,
    bias: Tensor | None,
    g: ConvGeometry,
    want: tuple[bool, bool, bool],
) -> tuple[Tensor | None, Tensor | None, Tensor | None]:
    """Return dx, dweight, dbias, with None for what is not wanted."""
    dweight: Tensor | None = None
    if want[1] and has_conv2d_bwd_weight(dy, x, g):
        dweight = conv2d_bwd_weight(dy, x, weight, g)
        want = (want[0], False, want[2])
    elif want[1] and onednn_overruns(weight, g.stride):
        # Cloned, since .contiguous() leaves the strides of what is both layouts as they are.
        nchw = [t.clone(memory_format=torch.contiguous_format) for t in (dy, x, weight)]
        dweight = _convolution_backward(
            *nchw, None, g.stride, g.padding, g.dilation, False, (0, 0), g.groups,
            (False, True, False),
        )[1]  # fmt: skip
        want = (want[0], False, want[2])
    if not any(want):
        return None, dweight, None
    dx, by_torch, dbias = _convolution_backward(
        dy, x, weight, None if bias is None else list(bias.shape),
        g.stride, g.padding, g.dilation, False, (0, 0), g.groups, want,
    )  # fmt: skip
    return dx, by_torch if dweight is None else dweight, dbias


def max_pool(x: Tensor, pool: Pool | None) -> Tensor:
    """Return max_pool2d(x), x without a pool."""
    if pool is None:
        return x
    y, _ = _max_pool(x, *pool)
    return y


def max_pool_bwd(dy: Tensor, x: Tensor, pool: Pool) -> Tensor:
    """Return dx. The indices, 8 bytes an output, are not kept: the window is searched again."""
    _, indices = _max_pool(x, *pool)
    return _max_pool_backward(dy, x, *pool, (1, 1), False, indices)
