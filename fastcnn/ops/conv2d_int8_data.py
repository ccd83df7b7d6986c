"""What conv2d_int8 asks of its tensors beyond sizes and types: of their data, and of autograd."""

import math
import struct

import torch
from torch import Tensor

OP = "conv2d_int8"
MOST_BIAS = 2**27


def float32(value: float) -> float:
    """Return the value as float32 has it; infinity where it is too large."""
    try:
        return struct.unpack("f", struct.pack("f", value))[0]
    except OverflowError:
        return math.inf


def check_scales(weight_scale: Tensor, x_scale: float, out_scale: float | None) -> None:
    """Check the data of weight_scale, and that its products are numbers of float32's full range."""
    ends = torch.stack(weight_scale.aminmax()).tolist()
    if not (ends[0] > 0 and ends[1] < math.inf):
        raise ValueError(
            f"{OP}: weight_scale: expected finite numbers above 0, got {ends[0]} to {ends[1]}"
        )
    tiny = torch.finfo(torch.float32).tiny
    for end in ends:
        product = float32(end * float32(x_scale))
        factors = [product] if out_scale is None else [product, product / float32(out_scale)]
        if not all(tiny <= float32(factor) < math.inf for factor in factors):
            raise ValueError(
                f"{OP}: x_scale: expected scales whose product is a normal float32 number, got "
                f"x_scale {x_scale}, weight_scale {end}, out_scale {out_scale}"
            )


def check_bias(bias: Tensor, most: float) -> Tensor:
    """Check the data of a bias, or of one in units of the sums; return it."""
    low, high = torch.stack(bias.aminmax()).tolist()
    if not (-most <= low and high <= most):
        unit = " in units of x_scale * weight_scale" if most == MOST_BIAS else ""
        raise ValueError(
            f"{OP}: bias: expected finite numbers of at most {most:g}{unit}, got {low} to {high}"
        )
    return bias


def check_storage(**tensors: Tensor | None) -> None:
    """Check that nobody has shrunk the storage under a tensor, whose sizes do not show it."""
    for name, t in tensors.items():
        if t is None or t.numel() == 0:
            continue
        last = sum((size - 1) * stride for size, stride in zip(t.shape, t.stride(), strict=True))
        needed = (t.storage_offset() + last + 1) * t.element_size()
        if t.untyped_storage().nbytes() < needed:
            raise ValueError(
                f"{OP}: {name}: expected a storage of at least {needed} bytes, got "
                f"{t.untyped_storage().nbytes()}"
            )


def check_grad(tensors: dict[str, Tensor | None]) -> None:
    """Check that nobody expects a gradient, of which there is none."""
    for name, t in tensors.items():
        if t is not None and torch.is_grad_enabled() and t.requires_grad:
            raise ValueError(
                f"{OP}: {name}: expected a tensor that does not require grad, since there is no "
                f"backward, got one that does; call {name}.detach() or use torch.no_grad()"
            )
