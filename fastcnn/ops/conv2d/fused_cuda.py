"""What the operator of fused.py runs: its flat arguments, checked, as records, launched.

The launch checks sizes, types and layouts; here is what else could let a kernel read elsewhere.
"""

from typing import Any

import torch
from torch import Tensor

from fastcnn.common.batch_norm_params import Norm
from fastcnn.common.checks import check_eps, check_storage
from fastcnn.common.conv_epilogue import Epilogue
from fastcnn.common.conv_geometry import ConvGeometry
from fastcnn.common.library import by_name
from fastcnn.triton.conv2d_fwd import conv2d
from fastcnn.triton.support import interpreted

Given = dict[str, Any]  # the operator's arguments by name


def conv2d_fused(*args: Any) -> tuple[Tensor, Tensor, Tensor]:
    """Run the operator."""
    given = by_name(torch.ops.fastcnn.conv2d_fused.default, args)
    _check_memory(given)
    x, weight = given["x"], given["weight"].contiguous(memory_format=torch.channels_last)
    behind = Epilogue(_norm(given), given["residual"], given["act"], given["statistics"])
    y, found = conv2d(x, weight, _geometry(given), behind)
    return y, *(found or (x.new_empty(0, dtype=torch.float32) for _ in range(2)))


def _check_memory(given: Given) -> None:
    """Check what would let a kernel read elsewhere: one device, dense memory that is there."""
    tensors = {name: t for name, t in given.items() if isinstance(t, Tensor)}
    check_storage("conv2d_fused", **tensors)
    x = given["x"]
    for name, t in tensors.items():
        if t.device != x.device or t.layout is not torch.strided:
            raise ValueError(
                f"conv2d_fused: {name}: expected a dense tensor on {x.device} as x, "
                f"got {t.layout} on {t.device}"
            )
    if not x.is_cuda and not interpreted():
        raise ValueError(
            f"conv2d_fused: x: expected a CUDA tensor, since Triton's kernels run on "
            f"NVIDIA GPUs, got one on {x.device}"
        )


def _norm(given: Given) -> Norm | None:
    """Return the batch norm of the operator's five arguments."""
    # A weight may be expanded, or a slice: small vectors, as everywhere.
    mean, var, weight, bias = (
        None if t is None else t.contiguous()
        for t in (given[f"bn_{key}"] for key in ("mean", "var", "weight", "bias"))
    )
    if mean is not None and var is not None:
        check_eps("conv2d_fused: bn", given["bn_eps"], of_batch=False)
        return Norm(mean, var, weight, bias, given["bn_eps"])
    if any(t is not None for t in (mean, var, weight, bias)):
        raise ValueError("conv2d_fused: expected bn_mean and bn_var, or no batch norm at all")
    return None


def _geometry(given: Given) -> ConvGeometry:
    """Return what the dispatcher has made lists of as pairs again."""
    (a, b), (c, d), (e, f) = given["stride"], given["padding"], given["dilation"]
    return ConvGeometry((a, b), (c, d), (e, f), given["groups"])
