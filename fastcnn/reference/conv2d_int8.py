"""conv2d_int8 in plain PyTorch: float64, in which every sum and every product is exact."""

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

    def one(number: float | None) -> Tensor:  # as float32 has it
        return torch.tensor(number, dtype=torch.float32, device=x.device)

    def per_channel(t: Tensor) -> Tensor:
        return t[:, None, None]

    acc = F.conv2d(
        x.double() - x_zero_point, weight.double(), None, stride, padding, dilation, groups
    )
    scale, added = one(x_scale) * weight_scale, None
    if residual is not None:
        added = residual.double() - (residual_zero_point or 0)
    if out_dtype in (torch.uint8, torch.int8):
        assert out_zero_point is not None
        if bias is not None:
            acc = acc + per_channel(torch.round(bias / scale).double())
        z = acc * per_channel((scale / one(out_scale)).double())
        if added is not None:
            z = z + added * (one(residual_scale) / one(out_scale)).double()
        z = _activate(z, act, (one(6.0) / one(out_scale)).double())
        info = torch.iinfo(out_dtype)
        return torch.round(z + out_zero_point).clamp(info.min, info.max).to(out_dtype)
    z = acc.float() * per_channel(scale)
    if bias is not None:
        z = z + per_channel(bias)
    if added is not None:
        quantised = residual_scale is not None
        z = z + (added.float() * one(residual_scale) if quantised else added.float())
    return _activate(z, act, one(6.0)).to(out_dtype)


def _activate(z: Tensor, act: str, six: Tensor) -> Tensor:
    if act == "none":
        return z
    z = z.clamp(min=0)
    return torch.minimum(z, six) if act == "relu6" else z
