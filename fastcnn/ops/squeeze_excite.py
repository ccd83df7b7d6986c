"""squeeze_excite: the operators, what they return, and their autograd.

    mean[n, c] = sum over h, w of x[n, c, h, w] / (h * w)
    s = fc2(act(fc1(mean)))        fc(t) = t @ weight.T + bias; without fc2 s = fc1(mean)
    y = x * gate(s)                gate: sigmoid, or hardsigmoid(s) = clamp(s / 6 + 1 / 2, 0, 1)

x, y: [n, c, h, w]; fc1: [c_mid, c, 1, 1] and [c_mid]; fc2: [c, c_mid, 1, 1] and [c]; without fc2
c_mid = c. Sums and everything between them and y are float32 (float64 for float64), also where
autocast casts; y alone is rounded to x's dtype.

    dgate[n, c] = sum over h, w of dy * x        dx = dy * gate + dmean / (h * w)

Data movement, T = one pass over the image: forward 3T (mean reads x; scale reads x and writes y),
backward 4T (bwd_gate reads dy and x; scale reads dy and writes dx). Step by step PyTorch moves as
much forward, and backward 9T or more: the product's two gradients (dy * gate, and dy * x, read once
more to be summed), the mean's written out, and their sum. The products of [n, c] matrices between
them are PyTorch's. Saved for backward: x, the parameters, and [n, c] values: mean, fc1's output and
fc2's.
"""

from typing import Any, Literal, get_args

import torch
import torch.nn.functional as F
from torch import Tensor

from fastcnn.common.activation import act_number, activation_backward, eager_activation
from fastcnn.common.autocast import without_autocast
from fastcnn.common.checks import (
    check_channels,
    check_choice,
    check_image,
    check_parameter_type,
    in_format_of,
)
from fastcnn.common.dtypes import acc_type
from fastcnn.common.library import apply, declare, distinct, once_differentiable, positional

OP = "squeeze_excite"
Gate = Literal["sigmoid", "hardsigmoid"]
GATES = get_args(Gate)


def _mean_fake(x: Tensor) -> Tensor:
    return x.new_empty(x.shape[:2], dtype=acc_type(x))


def _scale_fake(x: Tensor, *_: Any) -> Tensor:
    return torch.empty_like(x)


def _bwd_gate_fake(dy: Tensor, x: Tensor) -> Tensor:
    return _mean_fake(x)


declare("squeeze_excite_mean(Tensor x) -> Tensor", _mean_fake)
declare("squeeze_excite_scale(Tensor x, Tensor gate, Tensor? dmean) -> Tensor", _scale_fake)
declare("squeeze_excite_bwd_gate(Tensor dy, Tensor x) -> Tensor", _bwd_gate_fake)

_mean = torch.ops.fastcnn.squeeze_excite_mean.default
_scale = torch.ops.fastcnn.squeeze_excite_scale.default
_bwd_gate = torch.ops.fastcnn.squeeze_excite_bwd_gate.default


def _gate(z: Tensor, gate: str) -> Tensor:
    return z.sigmoid() if gate == "sigmoid" else F.hardsigmoid(z)


def _gate_backward(dgate: Tensor, z: Tensor, gate: str) -> Tensor:
    aten = torch.ops.aten
    if gate == "sigmoid":
        dz: Tensor = aten.sigmoid_backward(dgate, z.sigmoid())
    else:
        dz = aten.hardsigmoid_backward(dgate, z)
    return dz


def _matrix(weight: Tensor, acc: torch.dtype) -> Tensor:
    """Return the weight of a 1x1 convolution as a matrix in the accumulate type."""
    return weight.flatten(1).to(acc)


def _linear(t: Tensor, weight: Tensor, bias: Tensor | None) -> Tensor:
    """Return a 1x1 convolution of images of one pixel, [n, c], in t's type."""
    return F.linear(t, _matrix(weight, t.dtype), None if bias is None else bias.to(t.dtype))


def _linear_bwd(
    dz: Tensor, t: Tensor, weight: Tensor, bias: Tensor | None, want: tuple[bool, bool, bool]
) -> tuple[Tensor | None, Tensor | None, Tensor | None]:
    """Return the gradients of _linear's t, weight and bias, with None for what is not wanted."""
    dt = dz @ _matrix(weight, dz.dtype) if want[0] else None
    dweight = (dz.t() @ t).to(weight.dtype).view(weight.shape) if want[1] else None
    dbias = dz.sum(0).to(bias.dtype) if want[2] and bias is not None else None
    return dt, dweight, dbias


class SqueezeExciteFunction(torch.autograd.Function):
    """y, then what backward needs: mean and the outputs of fc1 and fc2. Backward of y."""

    @staticmethod
    @positional
    def forward(
        x: Tensor,
        fc1_weight: Tensor,
        fc1_bias: Tensor | None,
        fc2_weight: Tensor | None,
        fc2_bias: Tensor | None,
        act: str,
        gate: str,
    ) -> tuple[Tensor | None, ...]:
        mean = _mean(x)
        with without_autocast(x):
            z = z1 = _linear(mean, fc1_weight, fc1_bias)
            z2 = None
            if fc2_weight is not None:
                z = z2 = _linear(eager_activation(z1, act), fc2_weight, fc2_bias)
            y = _scale(x, _gate(z, gate), None)
        return y, mean, z1, z2

    @staticmethod
    def setup_context(ctx: Any, inputs: tuple[Any, ...], output: Any) -> None:
        *tensors, ctx.act, ctx.gate = inputs
        _, *between = output
        ctx.mark_non_differentiable(*(t for t in between if t is not None))
        ctx.set_materialize_grads(False)
        ctx.save_for_backward(*tensors, *between)

    @staticmethod
    @once_differentiable
    def backward(ctx: Any, dy: Tensor | None, *_: Any) -> tuple[Tensor | None, ...]:
        if dy is None:
            return (None,) * 7
        x, fc1_weight, fc1_bias, fc2_weight, fc2_bias, mean, z1, z2 = ctx.saved_tensors
        dy = in_format_of(dy, x)
        of_x, *of_fc1, of_fc2_weight, of_fc2_bias = ctx.needs_input_grad[:5]
        dx = dfc1_weight = dfc1_bias = dfc2_weight = dfc2_bias = None
        with without_autocast(x):
            z = z1 if z2 is None else z2
            dz = _gate_backward(_bwd_gate(dy, x), z, ctx.gate)
            if fc2_weight is not None:
                want = of_x or any(of_fc1), of_fc2_weight, of_fc2_bias
                hidden = eager_activation(z1, ctx.act)
                dhidden, dfc2_weight, dfc2_bias = _linear_bwd(
                    dz, hidden, fc2_weight, fc2_bias, want
                )
                if dhidden is not None:
                    dz = activation_backward(dhidden, z1, ctx.act)
            want = of_x, *of_fc1
            dmean, dfc1_weight, dfc1_bias = _linear_bwd(dz, mean, fc1_weight, fc1_bias, want)
            if of_x:
                dx = _scale(dy, _gate(z, ctx.gate), dmean)
        return dx, dfc1_weight, dfc1_bias, dfc2_weight, dfc2_bias, None, None


def _check_fc(name: str, weight: Tensor, bias: Tensor | None, sizes: list[Any], x: Tensor) -> None:
    if not isinstance(weight, Tensor):
        raise TypeError(f"{OP}: {name}_weight: expected a Tensor, got {type(weight).__name__}")
    found = list(weight.shape)
    if len(found) != 4 or any(size not in (None, f) for size, f in zip(sizes, found, strict=True)):
        expected = ", ".join("c_mid" if size is None else str(size) for size in sizes)
        raise ValueError(f"{OP}: {name}_weight: expected sizes [{expected}], got {found}")
    check_parameter_type(OP, f"{name}_weight", weight, x)
    if bias is not None:
        check_channels(OP, f"{name}_bias", bias, found[0], x)


def squeeze_excite(
    input: Tensor,
    fc1_weight: Tensor,
    fc1_bias: Tensor | None,
    fc2_weight: Tensor | None,
    fc2_bias: Tensor | None,
    act: str,
    gate: str,
) -> Tensor:
    """Check and apply: see fastcnn.functional.squeeze_excite."""
    check_image(OP, "input", input)
    c = input.shape[1]
    _check_fc("fc1", fc1_weight, fc1_bias, [c if fc2_weight is None else None, c, 1, 1], input)
    if fc2_weight is not None:
        _check_fc("fc2", fc2_weight, fc2_bias, [c, fc1_weight.shape[0], 1, 1], input)
    elif fc2_bias is not None:
        raise ValueError(f"{OP}: fc2_bias: expected None as fc2_weight is None, got a Tensor")
    act_number(OP, act)
    check_choice(OP, "gate", gate, GATES)
    tensors = distinct(input, fc1_weight, fc1_bias, fc2_weight, fc2_bias)
    y: Tensor = apply(SqueezeExciteFunction, *tensors, act, gate)[0]
    return y
