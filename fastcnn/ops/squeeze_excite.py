"""squeeze_excite: the operators, what they return, and their autograd.

    mean[n, c] = sum over h, w of x[n, c, h, w] / (h * w)
    z1 = mean @ fc1.T + bias1
    z2 = act(z1) @ fc2.T + bias2        without an fc1 z2 = mean @ fc2.T + bias2
    y = x * gate(z2)                    gate: sigmoid, or hardsigmoid(z) = clamp(z + 3, 0, 6) / 6

x, y: [n, c, h, w]; fc1: [m, c, 1, 1]; bias1: [m]; fc2: [c, m, 1, 1], without an fc1 [c, c, 1, 1];
bias2: [c]. All between x and y is float32 (float64 for float64), also where autocast casts.

    dz2 = gate'(z2) * (sum over h, w of dy * x)
    dz1 = act'(z1) * (dz2 @ fc2)        dfc2 = dz2.T @ act(z1)        dbias2 = sum over n of dz2
    dmean = dz1 @ fc1                   dfc1 = dz1.T @ mean           dbias1 = sum over n of dz1
    dx = dy * gate(z2) + dmean / (h * w)

Data movement, T = one pass over the image: forward 3T (the means read x; the product reads x and
writes y), backward 4T (the gates' gradient reads dy and x; dx reads dy and is written); on the CPU,
where a sample stays in a cache from one pass to the next, 2T and 3T. Step by step PyTorch moves 3T
and 10T: both gradients of the product (3T each), the second one's sum (1T), the mean's gradient
added to the first (3T). Saved for backward: x, the parameters, mean, z1 and z2.
"""

from typing import Any, Literal, get_args

import torch
from torch import Tensor
from torch.autograd import forward_ad

from fastcnn.common.activation import ACT_NUMBER, act_number, eager_activation
from fastcnn.common.autocast import without_autocast
from fastcnn.common.checks import (
    check_channels,
    check_choice,
    check_image,
    check_parameter_type,
    in_format_of,
)
from fastcnn.common.dtypes import acc_type, as_acc
from fastcnn.common.library import apply, declare, distinct, once_differentiable, positional

OP = "squeeze_excite"
Gate = Literal["sigmoid", "hardsigmoid"]

# csrc/squeeze_excite.h holds the same table.
GATE_NUMBER: dict[str, int] = {name: number for number, name in enumerate(get_args(Gate))}
_ACT_NAME = {number: name for name, number in ACT_NUMBER.items()}


def _between(x: Tensor, fc1: Tensor | None) -> tuple[Tensor, Tensor]:
    """Return [n, m] and [n, c] uninitialised numbers, m = 0 without an fc1."""
    n, c = x.shape[:2]
    m = 0 if fc1 is None else fc1.shape[0]
    return x.new_empty((n, m), dtype=acc_type(x)), x.new_empty((n, c), dtype=acc_type(x))


def _fwd_fake(x: Tensor, fc1: Tensor | None, *_: Any) -> tuple[Tensor, Tensor, Tensor, Tensor]:
    z1, z2 = _between(x, fc1)
    return torch.empty_like(x), torch.empty_like(z2), z1, z2


def _bwd_fake(dy: Tensor, x: Tensor, fc1: Tensor | None, *_: Any) -> tuple[Tensor, Tensor, Tensor]:
    return torch.empty_like(x), *_between(x, fc1)


declare(
    "squeeze_excite_fwd(Tensor x, Tensor? fc1, Tensor? bias1, Tensor fc2, Tensor? bias2, int act, "
    "int gate) -> (Tensor y, Tensor mean, Tensor z1, Tensor z2)",
    _fwd_fake,
)
declare(
    "squeeze_excite_bwd(Tensor dy, Tensor x, Tensor? fc1, Tensor fc2, Tensor z1, Tensor z2, "
    "int act, int gate) -> (Tensor dx, Tensor dz1, Tensor dz2)",
    _bwd_fake,
)

_fwd = torch.ops.fastcnn.squeeze_excite_fwd.default
_bwd = torch.ops.fastcnn.squeeze_excite_bwd.default


def _parameter_gradients(
    dz: Tensor, t: Tensor, weight: Tensor, bias: Tensor | None, want: tuple[bool, bool]
) -> tuple[Tensor | None, Tensor | None]:
    """Return those of a product t @ weight.T + bias, with None for what is not wanted."""
    dweight = (dz.t() @ t).to(weight.dtype).view(weight.shape) if want[0] else None
    dbias = dz.sum(0).to(bias.dtype) if want[1] and bias is not None else None
    return dweight, dbias


class SqueezeExciteFunction(torch.autograd.Function):
    """y, mean, z1 and z2. Backward of y."""

    @staticmethod
    @positional
    def forward(
        x: Tensor,
        fc1: Tensor | None,
        bias1: Tensor | None,
        fc2: Tensor,
        bias2: Tensor | None,
        act: int,
        gate: int,
    ) -> tuple[Tensor, Tensor, Tensor, Tensor]:
        parameters = (as_acc(x, t) for t in (fc1, bias1, fc2, bias2))
        y, mean, z1, z2 = _fwd(x, *parameters, act, gate)
        return y, mean, z1, z2

    @staticmethod
    def setup_context(ctx: Any, inputs: tuple[Any, ...], output: Any) -> None:
        *tensors, ctx.act, ctx.gate = inputs
        _, *between = output
        ctx.mark_non_differentiable(*between)
        ctx.set_materialize_grads(False)
        ctx.save_for_backward(*tensors, *between)

    @staticmethod
    @once_differentiable
    def backward(ctx: Any, dy: Tensor | None, *_: Any) -> tuple[Tensor | None, ...]:
        if dy is None:
            return (None,) * 7
        x, fc1, bias1, fc2, bias2, mean, z1, z2 = ctx.saved_tensors
        weights = as_acc(x, fc1), as_acc(x, fc2)
        dx, dz1, dz2 = _bwd(in_format_of(dy, x), x, *weights, z1, z2, ctx.act, ctx.gate)
        want = ctx.needs_input_grad
        with without_autocast(x):
            into = mean
            first: tuple[Tensor | None, Tensor | None] = None, None
            if fc1 is not None:
                first = _parameter_gradients(dz1, mean, fc1, bias1, want[1:3])
                into = eager_activation(z1, _ACT_NAME[ctx.act])
            second = _parameter_gradients(dz2, into, fc2, bias2, want[3:5])
        return dx, *first, *second, None, None


def _check_fc(name: str, weight: Tensor, bias: Tensor | None, sizes: list[Any], x: Tensor) -> None:
    if not isinstance(weight, Tensor):
        raise TypeError(f"{OP}: {name}_weight: expected a Tensor, got {type(weight).__name__}")
    found = list(weight.shape)
    if (
        len(found) != 4
        or found[0] == 0
        or any(size not in (None, f) for size, f in zip(sizes, found, strict=True))
    ):
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
    """Check and apply: see fastcnn.functional.squeeze_excite. An only fc is the operators' fc2."""
    check_image(OP, "input", input)
    c = input.shape[1]
    _check_fc("fc1", fc1_weight, fc1_bias, [c if fc2_weight is None else None, c, 1, 1], input)
    fcs: tuple[Any, ...] = (None, None, fc1_weight, fc1_bias)
    if fc2_weight is not None:
        _check_fc("fc2", fc2_weight, fc2_bias, [c, fc1_weight.shape[0], 1, 1], input)
        fcs = fc1_weight, fc1_bias, fc2_weight, fc2_bias
    elif fc2_bias is not None:
        raise ValueError(f"{OP}: fc2_bias: expected None as fc2_weight is None, got a Tensor")
    number = act_number(OP, act)
    check_choice(OP, "gate", gate, GATE_NUMBER)
    tensors = distinct(input, *fcs)
    # Without a Function where there is nothing for autograd: 12 of 27 us of a call (2-core Xeon).
    call = apply if _may_be_differentiated(tensors) else _forward_alone
    y: Tensor = call(SqueezeExciteFunction, *tensors, number, GATE_NUMBER[gate])[0]
    return y


def _forward_alone(function: Any, *args: Any) -> Any:
    return function.forward(*args)


def _may_be_differentiated(tensors: tuple[Any, ...]) -> bool:
    """Whether autograd or a transform may ask for a gradient; apply() knows it of a compiler."""
    if torch.compiler.is_compiling():
        return True
    if torch.is_grad_enabled() and any(t is not None and t.requires_grad for t in tensors):
        return True
    return torch._C._are_functorch_transforms_active() or forward_ad._current_level >= 0
