"""What conv2d_int8 asks of its tensors beyond sizes and types: of their data, and of autograd.

Data is looked at once for a tensor and its version, that is after each change in place, since on
CUDA looking means waiting for the device. A tensor made in inference mode does not count its
changes: it is looked at once. `t.data = other` changes no version, but the address.
"""

import math
from typing import NamedTuple

import torch
from torch import Tensor
from torch.utils.weak import WeakIdRef

from fastcnn.ops.conv2d_int8.arguments import MOST_FACTOR, OP, Call, float32, quotient

MOST_BIAS = 2**26
_ZERO, _ONE = (0.0, 0.0), (1.0, 1.0)


class Ranges(NamedTuple):
    """The least and the largest of each; units is bias / weight_scale, in float64."""

    weight_scale: tuple[float, float]
    bias: tuple[float, float]
    units: tuple[float, float]


# By weight_scale and bias, with the versions and addresses that were looked at. A reference to a
# tensor that is gone equals no other, wherever the new one lies.
_KNOWN: dict[tuple[bool | WeakIdRef, ...], tuple[list[tuple[int, int]], Ranges]] = {}


def check_data(call: Call) -> None:
    """Check weight_scale, that its products are numbers of float32's full range, and the bias."""
    scales, biases, units = _ranges(call)
    x_scale, one = float32(call.x_scale), 1.0
    if call.weight_scale_number is not None:
        one = float32(call.weight_scale_number)
        scales = (one, one)
    low, high = scales
    if not (low > 0 and high < math.inf):
        raise ValueError(
            f"{OP}: weight_scale: expected finite numbers above 0, got {low} to {high}"
        )
    info, quantised = torch.finfo(torch.float32), call.out_scale is not None
    for scale in scales:
        product = float32(x_scale * scale)
        factor = quotient(product, call.out_scale)
        if min(product, factor) < info.tiny or factor > (MOST_FACTOR if quantised else info.max):
            raise ValueError(
                f"{OP}: x_scale: expected scales whose product is a normal float32 number, at most "
                f"{MOST_FACTOR:g} in units of out_scale, got x_scale {call.x_scale}, weight_scale "
                f"{scale}, out_scale {call.out_scale}"
            )
    low, high = biases
    most, unit = info.max, ""
    if quantised:
        low, high = (end / (x_scale * one) for end in units)
        most, unit = float(MOST_BIAS), " in units of x_scale * weight_scale"
    if not (-most <= low and high <= most):
        raise ValueError(
            f"{OP}: bias: expected finite numbers of at most {most:g}{unit}, got {low} to {high}"
        )


def _ranges(call: Call) -> Ranges:
    tensors = [t for t in (call.weight_scale, call.bias) if t is not None]
    if not tensors:
        return Ranges(_ONE, _ZERO, _ZERO)
    # Which there are comes first: a reference can be compared with references alone.
    there: list[bool | WeakIdRef] = [call.weight_scale is None, call.bias is None]
    refs = (*there, *map(WeakIdRef, tensors))
    versions = [(-1 if t.is_inference() else t._version, t.data_ptr()) for t in tensors]
    known = _KNOWN.get(refs)
    if known is not None and known[0] == versions:
        return known[1]
    check_not_capturing("weight_scale and bias", call.x)
    for key in list(_KNOWN):
        if any(isinstance(ref, WeakIdRef) and ref() is None for ref in key):
            _KNOWN.pop(key, None)
    ranges = _look(call.weight_scale, call.bias)
    _KNOWN[refs] = (versions, ranges)
    return ranges


def _look(weight_scale: Tensor | None, bias: Tensor | None) -> Ranges:
    """Read the values; on CUDA one synchronisation with the device."""
    known = [t for t in (weight_scale, bias) if t is not None]
    known += [] if weight_scale is None or bias is None else [bias.double() / weight_scale]
    ends = torch.stack([torch.stack(t.double().aminmax()) for t in known]).tolist()
    pairs = [(low, high) for low, high in ends]
    if weight_scale is None:
        return Ranges(_ONE, pairs[0], pairs[0])
    return Ranges(pairs[0], *(pairs[1:] or (_ZERO, _ZERO)))


def check_not_capturing(name: str, t: Tensor) -> None:
    """Check that no CUDA graph is captured: what is looked at there has no data yet."""
    if t.is_cuda and torch.cuda.is_current_stream_capturing():
        raise RuntimeError(
            f"{OP}: {name}: expected what a call has looked at since it last changed, since none "
            f"can while a CUDA graph is captured; call once with the very same before capturing"
        )


def check_grad(tensors: dict[str, Tensor | None]) -> None:
    """Check that nobody expects a gradient, of which there is none."""
    for name, t in tensors.items():
        if t is not None and torch.is_grad_enabled() and t.requires_grad:
            raise ValueError(
                f"{OP}: {name}: expected a tensor that does not require grad, since there is no "
                f"backward, got one that does; call {name}.detach() or use torch.no_grad()"
            )
