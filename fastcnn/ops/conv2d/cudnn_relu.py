"""cuDNN's convolution with bias, ReLU and a sum, as an operator that torch.compile knows."""

from typing import Any

import torch
import torch.nn.functional as F
from torch import Tensor

from fastcnn.common.checks import check_storage
from fastcnn.common.library import declare, implement


def _relu_fake(
    x: Tensor, weight: Tensor, bias: Tensor, residual: Tensor | None, *geometry: Any
) -> Tensor:
    return torch.ops.aten.convolution.default(
        x, weight, None, *geometry[:3], False, (0, 0), geometry[3]
    )


def _relu_cuda(
    x: Tensor, weight: Tensor, bias: Tensor, residual: Tensor | None, *geometry: Any
) -> Tensor:
    check_storage("conv2d_relu", x=x, weight=weight, bias=bias, residual=residual)
    if residual is None:
        return torch.ops.aten.cudnn_convolution_relu(x, weight, bias, *geometry)
    return torch.ops.aten.cudnn_convolution_add_relu(x, weight, residual, 1.0, bias, *geometry)


def _relu_cpu(
    x: Tensor, weight: Tensor, bias: Tensor, residual: Tensor | None, *geometry: Any
) -> Tensor:
    check_storage("conv2d_relu", x=x, weight=weight, bias=bias, residual=residual)
    y = F.conv2d(x, weight, bias, *geometry)
    return F.relu_(y if residual is None else y.add_(residual))


# PyTorch's own operators of cuDNN have no fakes for torch.compile.
declare(
    "conv2d_relu(Tensor x, Tensor weight, Tensor bias, Tensor? residual, int[2] stride, "
    "int[2] padding, int[2] dilation, int groups) -> Tensor",
    _relu_fake,
)
implement("conv2d_relu", "cuda", _relu_cuda)
implement("conv2d_relu", "cpu", _relu_cpu)

conv2d_relu = torch.ops.fastcnn.conv2d_relu.default
