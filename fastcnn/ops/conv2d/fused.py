"""A convolution with what stands behind it, in one kernel: for CUDA, in Triton.

    y = act(norm(conv2d(x, weight)) + residual)
    and mean and biased variance of conv2d(x, weight), where asked for

norm(t) = (t - mean) * rstd * weight + bias, rstd = 1 / sqrt(var + eps), per channel, with None for
a weight of 1 and a bias of 0. Images are channels_last; a weight in another layout is copied.
Formulas, floors in bytes and kernels: fastcnn/triton/conv2d_kernels.py. They run on the CPU where
Triton's interpreter is on.
"""

import importlib
from typing import Any

import torch
from torch import Tensor

from fastcnn.common.conv_epilogue import Epilogue
from fastcnn.common.conv_geometry import ConvGeometry, output_size
from fastcnn.common.library import by_name, declare, implement


def _fake(*args: Any) -> tuple[Tensor, Tensor, Tensor]:
    x, weight = args[:2]
    given = by_name(_fused, args)
    geometry = given["stride"], given["padding"], given["dilation"]
    sizes = (
        x.shape[0],
        weight.shape[0],
        *output_size(x.shape[2:], weight.shape[2:], *geometry),
    )
    y = torch.empty(sizes, dtype=x.dtype, device=x.device, memory_format=torch.channels_last)
    c = weight.shape[0] if given["statistics"] else 0
    mean, var = (x.new_empty(c, dtype=torch.float32) for _ in range(2))
    return y, mean, var


declare(
    "conv2d_fused(Tensor x, Tensor weight, Tensor? bn_mean, Tensor? bn_var, Tensor? bn_weight, "
    "Tensor? bn_bias, float bn_eps, Tensor? residual, int act, bool statistics, "
    "int[2] stride, int[2] padding, int[2] dilation, int groups) "
    "-> (Tensor y, Tensor mean, Tensor var)",
    _fake,
)
_fused = torch.ops.fastcnn.conv2d_fused.default


def _run(*args: Any) -> Any:
    """Run the operator by fused_cuda.py, which is imported when it is called."""
    operators = importlib.import_module("fastcnn.ops.conv2d.fused_cuda")
    try:
        return operators.conv2d_fused(*args)
    except (TypeError, ValueError, torch.OutOfMemoryError):
        raise
    except Exception as error:
        raise RuntimeError(
            f"conv2d_fused: Triton could not run it: {type(error).__name__}: {error}; run the "
            f"model once in eager mode first: there the planner finds out, and PyTorch's "
            f"convolution runs instead (docs/planning.md)"
        ) from error


implement("conv2d_fused", ("cpu", "cuda"), _run)


def conv2d_fused(
    x: Tensor, weight: Tensor, g: ConvGeometry, behind: Epilogue
) -> tuple[Tensor, Tensor, Tensor]:
    """Return y, and mean and variance of the convolution, which are empty where not asked for."""
    # A constant of the function: torch.compile takes a number of the module for a changing one.
    norm = (None, None, None, None, 0.0) if behind.norm is None else tuple(behind.norm)
    return _fused(x, weight, *norm, behind.residual, behind.act, behind.statistics, *g)
