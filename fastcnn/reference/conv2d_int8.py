"""conv2d_int8 in plain PyTorch: exact sums, and float32 operations that are rounded one by one."""

import torch
import torch.nn.functional as F
from torch import Tensor


def conv2d_int8(
    x: Tensor,
    weight: Tensor,
    weight_scale: Tensor,
    x_scale: float,
    x_zero_point: int,
    bias: Tensor | None = None,
    stride: int | tuple[int, int] = 1,
    padding: int | tuple[int, int] = 0,
    dilation: int | tuple[int, int] = 1,
    groups: int = 1,
    residual: Tensor | None = None,
    residual_scale: float | None = None,
    residual_zero_point: int | None = None,
    act: str = "none",
    out_dtype: torch.dtype = torch.uint8,
    out_scale: float | None = None,
    out_zero_point: int | None = None,
) -> Tensor:
    """Return y, by the formula at the top of fastcnn/ops/conv2d_int8/interface.py."""

    def one(number: float) -> Tensor:  # as float32 has it
        return torch.tensor(number, dtype=torch.float32, device=x.device)

    def per_channel(t: Tensor) -> Tensor:
        return t[:, None, None]

    # float64's sums of integers are exact.
    acc = F.conv2d(
        x.double() - x_zero_point, weight.double(), None, stride, padding, dilation, groups
    ).int()
    scale, six = one(x_scale) * weight_scale, one(6.0)
    added, factor = residual, residual_scale and one(residual_scale)
    if out_scale is not None:
        if bias is not None:
            acc = acc + per_channel(torch.round(bias / scale).int())
        scale, six = scale / one(out_scale), six / one(out_scale)
        factor = factor and factor / one(out_scale)
    z = acc.float() * per_channel(scale)
    if bias is not None and out_scale is None:
        z = z + per_channel(bias)
    if added is not None:
        if factor is not None:
            added = (added.int() - (residual_zero_point or 0)).float() * factor
        z = z + added.float()
    if act != "none":
        z = z.clamp(min=0)
    if act == "relu6":
        z = torch.minimum(z, six)
    if out_zero_point is None:
        return z.to(out_dtype)
    info = torch.iinfo(out_dtype)
    integers = torch.round(z.clamp(-1e6, 1e6)).int()  # int32 holds them
    return (integers + out_zero_point).clamp(info.min, info.max).to(out_dtype)
