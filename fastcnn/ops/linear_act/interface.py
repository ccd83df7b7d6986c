"""linear_act: a linear layer and the activation behind it, with its autograd.

    z = x @ weight.T + bias
    y = act(z)

x: [..., c_in]; weight: [c_out, c_in]; bias: [c_out]; y: [..., c_out]. The products are PyTorch's,
on the CPU and on CUDA; half types on the CPU are multiplied in float32 where
conv2d/float32_products.py says so, by float32 weights that nobody has rounded:

    z = round(float(x) @ float(weight).T + float(bias))       y = round(act(z))
    dz = round(dy * act'(z))
    dx = round(float(dz) @ float(weight))                     dweight = float(dz).T @ float(x)

Data movement beside the products, T = one pass over z: act reads z and writes y, its gradient reads
dy and z and writes dz, dbias reads dz: PyTorch's. In float32 the bias is added to the product in
place; addmm, which copies it first and then adds the product, took 10.2 instead of 8.2 ms for 25088
rows of 96 to 384, 6.4 instead of 6.2 for 392 of 768 to 3072 (2 cores of a Xeon with AVX-512).
Saved for backward: x, the weight, and y where it tells the derivative, else z.
"""

import math
from collections.abc import Callable
from typing import Any

import torch
from torch import Tensor

from fastcnn.common.activation import act_number, eager_activation
from fastcnn.common.autocast import autocast_dtype, cast, without_autocast
from fastcnn.common.checks import HALVES, check_channels, check_dense, check_parameter_type
from fastcnn.common.library import apply, distinct, each_of_batched, positional
from fastcnn.common.overrides import plain_tensors
from fastcnn.ops.conv2d.float32_products import in_backward, pays

OP = "linear_act"
# From how many values of z on adding the bias in place is worth a Function's 40 us, see above.
_MANY = 2**23

_aten = torch.ops.aten


def _silu_backward(dy: Tensor, z: Tensor) -> Tensor:
    if not torch.is_grad_enabled():
        return _aten.silu_backward.default(dy, z)
    sigmoid = z.sigmoid()  # PyTorch's operator has no derivative
    return dy * sigmoid * (1 + z * (1 - sigmoid))


# dy * act'(z), from y for those in _FROM_Y.
_BACKWARD: dict[str, Callable[[Tensor, Tensor], Tensor]] = {
    "relu": lambda dy, y: _aten.threshold_backward.default(dy, y, 0),
    "relu6": lambda dy, y: _aten.hardtanh_backward.default(dy, y, 0, 6),
    "leaky_relu": lambda dy, y: _aten.leaky_relu_backward.default(dy, y, 0.01, True),
    "sigmoid": lambda dy, y: _aten.sigmoid_backward.default(dy, y),
    "silu": _silu_backward,
    "gelu": lambda dy, z: _aten.gelu_backward.default(dy, z),
    "hardswish": lambda dy, z: _aten.hardswish_backward.default(dy, z),
}
_FROM_Y = ("relu", "relu6", "leaky_relu", "sigmoid")


def in_float32(x: Tensor, weight: Tensor, backward: bool = False) -> bool:
    """Whether the products of x are in float32, x being of a half type; a float32 weight is free.

    Asked of one row where the weight is, so that it holds for any batch.
    """
    c_out, c_in = weight.shape
    if weight.dtype is torch.float32:
        return pays(x, c_in * c_out, c_in + c_out, backward)
    rows = math.prod(x.shape[:-1])
    return pays(x, rows * c_in * c_out, rows * (c_in + c_out) + c_in * c_out, backward)


def outruns_pytorch(x: Tensor, weight: Tensor, act: str) -> bool:
    """Whether this is known to be faster than F.linear and the activation."""
    if x.device.type != "cpu":
        return False
    if x.dtype in HALVES:
        return in_float32(x, weight) or in_float32(x, weight, backward=True)
    if act == "none" or torch.compiler.is_compiling():  # first: sizes may be symbols there
        return False
    return math.prod(x.shape[:-1]) * weight.shape[0] >= _MANY


def _linear(x: Tensor, weight: Tensor, bias: Tensor | None) -> Tensor:
    """Return z."""
    if in_float32(x, weight):
        return _linear(x.float(), weight.float(), bias).to(x.dtype)
    weight, bias = weight.to(x.dtype), None if bias is None else bias.to(x.dtype)
    if bias is None or x.dtype in HALVES or x.device.type != "cpu":
        return torch.nn.functional.linear(x, weight, bias)  # which rounds a half type once
    return torch.matmul(x, weight.t()).add_(bias)


class LinearActFunction(torch.autograd.Function):
    """y, and z where backward needs it. Backward of y, which can be differentiated again."""

    @staticmethod
    @positional
    def forward(
        x: Tensor, weight: Tensor, bias: Tensor | None, act: str
    ) -> tuple[Tensor, Tensor | None]:
        with without_autocast(x):
            z = _linear(x, weight, bias)
        if act == "none" or act in _FROM_Y:
            return eager_activation(z, act, inplace=True), None
        return eager_activation(z, act), z

    @staticmethod
    def setup_context(ctx: Any, inputs: tuple[Any, ...], output: Any) -> None:
        x, weight, bias, ctx.act = inputs
        y, z = output
        if z is not None:
            ctx.mark_non_differentiable(z)
        ctx.set_materialize_grads(False)
        ctx.save_for_backward(x, weight, bias, y if ctx.act in _FROM_Y else z)

    @staticmethod
    @each_of_batched
    def backward(ctx: Any, dy: Tensor | None, _: Any) -> tuple[Tensor | None, ...]:
        if dy is None:
            return (None,) * 4
        x, weight, bias, saved = ctx.saved_tensors
        if torch.compiler.is_compiling():  # which traces it where forward was called
            with without_autocast(x):
                return _gradients(ctx, dy, x, weight, bias, saved)
        with plain_tensors(), without_autocast(x):
            if saved is not None and ctx.act not in _FROM_Y and torch.is_grad_enabled():
                saved = _linear(x, weight, bias)  # the same bits, and a function of x
            return _gradients(ctx, dy, x, weight, bias, saved)


def _gradients(
    ctx: Any, dy: Tensor, x: Tensor, weight: Tensor, bias: Tensor | None, saved: Tensor | None
) -> tuple[Tensor | None, ...]:
    """Return dx, dweight and dbias, with None for what is not wanted."""
    dz = dy if saved is None else _BACKWARD[ctx.act](dy, saved)
    dz, rows = (t[None] if t.dim() == 1 else t.flatten(0, -2) for t in (dz, x))
    want, dtype = ctx.needs_input_grad, x.dtype
    if in_float32(x, weight, backward=True):
        dz, weight_as = dz.float(), in_backward(weight)
        rows = in_backward(rows) if want[1] else rows
    else:
        weight_as = weight.to(dtype)
    dx = (dz @ weight_as).to(dtype).view(x.shape) if want[0] else None
    dweight = (dz.t() @ rows).to(weight.dtype) if want[1] else None
    dbias = dz.sum(0).to(bias.dtype) if want[2] and bias is not None else None
    return dx, dweight, dbias, None


def check_linear(input: Tensor, weight: Tensor, bias: Tensor | None) -> None:
    """Check a linear layer's tensors."""
    check_dense(OP, "input", input)
    if not isinstance(weight, Tensor):
        raise TypeError(f"{OP}: weight: expected a Tensor, got {type(weight).__name__}")
    if weight.dim() != 2:
        raise ValueError(
            f"{OP}: weight: expected 2 dimensions [c_out, c_in], got {list(weight.shape)}"
        )
    if input.dim() == 0 or input.shape[-1] != weight.shape[1]:
        raise ValueError(
            f"{OP}: input: expected sizes [..., {weight.shape[1]}] as the weight has columns, got "
            f"{list(input.shape)}"
        )
    check_parameter_type(OP, "weight", weight, input)
    if bias is not None:
        check_channels(OP, "bias", bias, weight.shape[0], input)


def as_parameter(t: Any, dtype: torch.dtype | None) -> Any:
    """Return a parameter as autocast casts it, but for float32, which is rounded where it must."""
    return t if isinstance(t, Tensor) and t.dtype is torch.float32 else cast(t, dtype)


def linear_act(input: Tensor, weight: Tensor, bias: Tensor | None, act: str) -> Tensor:
    """Check, cast, apply: see fastcnn.functional.linear_act."""
    dtype = autocast_dtype(input)
    input = cast(input, dtype)
    weight, bias = as_parameter(weight, dtype), as_parameter(bias, dtype)
    check_linear(input, weight, bias)
    act_number(OP, act)
    y: Tensor = apply(LinearActFunction, *distinct(input, weight, bias), act)[0]
    return y
