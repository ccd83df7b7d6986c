"""conv_bn_act: a chain of (convolution, batch norm, activation) steps as one autograd.Function.

    a_0 = input
    r_i = conv(a_{i-1}, weight_i)                              the raw output of step i
    a_i = act_i(batch_norm_i(r_i))                             i < last
    output = act_last(batch_norm_last(r_last) + residual)

Kept for backward: the input, every r_i, the statistics, and the output where a residual went
through an activation (it is the next chain's input anyway). Not kept: a_1 ... a_{last-1}, which
eager keeps beside each r_i. Backward rebuilds each by one elementwise pass, bit for bit, as the
input that the next convolution's weight gradient needs:

    forward   convolutions + the passes of batch_norm_act
    backward  the same + 2 passes (read r_i, write a_i) for every step but the last

The convolutions are PyTorch's own. The residual's gradient is dz of the last step.
"""

from collections.abc import Sequence
from typing import Any, NamedTuple

import torch
from torch import Tensor
from torch.autograd.function import once_differentiable

from fastcnn.ops._library import distinct, positional
from fastcnn.ops.activation import ACT_NUMBER, act_number
from fastcnn.ops.batch_norm_act import (
    batch_norm_act_apply,
    batch_norm_act_bwd,
    batch_norm_act_fwd,
    check_parameters,
    update_running,
)
from fastcnn.ops.checks import check_image, check_like

OP = "conv_bn_act"


class ConvBnActStep(NamedTuple):
    """One step of a chain: act(batch_norm(conv2d(x))).

    The arguments are those of torch.nn.functional.conv2d and batch_norm: weight
    [c_out, c_in / groups, kh, kw], conv_bias [c_out] or None, and per output channel running_mean,
    running_var, bn_weight, bn_bias or None. stride, padding, dilation: an int or a pair.
    """

    weight: Tensor
    conv_bias: Tensor | None
    stride: int | tuple[int, int]
    padding: int | tuple[int, int]
    dilation: int | tuple[int, int]
    groups: int
    running_mean: Tensor | None
    running_var: Tensor | None
    bn_weight: Tensor | None
    bn_bias: Tensor | None
    training: bool = False
    momentum: float = 0.1
    eps: float = 1e-5
    act: str = "relu"


class _Geometry(NamedTuple):
    """What is not a tensor in a step."""

    stride: tuple[int, int]
    padding: tuple[int, int]
    dilation: tuple[int, int]
    groups: int
    training: bool
    eps: float
    act: int


# Tensors of a step in the Function's flat argument list: weight, conv_bias, bn_weight, bn_bias,
# and the fixed mean and var, which are None where the batch's own are used.
_TENSORS = 6


_AUTOCAST_FROM = (torch.float32, torch.bfloat16, torch.float16)


def _pair(value: int | tuple[int, int]) -> tuple[int, int]:
    return (value, value) if isinstance(value, int) else (value[0], value[1])


_convolution = torch.ops.aten.convolution.default
_convolution_backward = torch.ops.aten.convolution_backward.default


def _convolve(x: Tensor, weight: Tensor, bias: Tensor | None, g: _Geometry) -> Tensor:
    return _convolution(x, weight, bias, g.stride, g.padding, g.dilation, False, (0, 0), g.groups)


class ConvBnActFunction(torch.autograd.Function):
    """The output, then for each step its raw convolution output, mean and var.

    The latter are outputs because what backward keeps must be an input or an output for
    torch.func; they have no gradient.
    """

    @staticmethod
    @positional
    def forward(
        x: Tensor, residual: Tensor | None, geometry: tuple[_Geometry, ...], *tensors: Tensor | None
    ) -> tuple[Tensor, ...]:
        kept: list[Tensor] = []
        for i, g in enumerate(geometry):
            weight, conv_bias, bn_weight, bn_bias, mean, var = _step_tensors(tensors, i)
            added = residual if i == len(geometry) - 1 else None
            raw = _convolve(x, weight, conv_bias, g)
            if added is not None:
                check_like(OP, "residual", added, raw)
            if g.training:
                x, mean, var = batch_norm_act_fwd(raw, added, bn_weight, bn_bias, g.eps, g.act)
                kept += raw, mean, var
            else:
                x = batch_norm_act_apply(raw, added, bn_weight, bn_bias, mean, var, g.eps, g.act)
                kept += (raw,)
        return x, *kept

    @staticmethod
    def setup_context(ctx: Any, inputs: tuple[Any, ...], output: tuple[Tensor, ...]) -> None:
        x, residual, ctx.geometry, *tensors = inputs
        y, *kept = output
        ctx.mark_non_differentiable(*kept)
        ctx.set_materialize_grads(False)
        ctx.has_residual = residual is not None
        keep_y = ctx.has_residual and ctx.geometry[-1].act != ACT_NUMBER["none"]
        ctx.save_for_backward(x, y if keep_y else None, *tensors, *kept)

    @staticmethod
    @once_differentiable
    def backward(ctx: Any, dy: Tensor | None, *_: Any) -> tuple[Tensor | None, ...]:
        geometry, needs = ctx.geometry, ctx.needs_input_grad
        grads: list[Tensor | None] = [None] * len(needs)
        if dy is None:
            return tuple(grads)
        x, y, *rest = ctx.saved_tensors
        steps = _saved_steps(geometry, rest)
        del rest
        if not torch.compiler.is_compiling():
            # Each tensor now goes back to the allocator after its last use, not at the end: the
            # next step then writes into memory that is still in the cache. Kept with retain_graph.
            ctx.maybe_clear_saved_tensors()
        while steps:
            i = len(steps) - 1
            g, step, last = geometry[i], steps.pop(), i == len(geometry) - 1
            dy, dresidual, dbn_weight, dbn_bias = batch_norm_act_bwd(
                dy, step.raw, y if last else None, step.bn_weight, step.bn_bias, step.mean,
                step.var, g.eps, g.act, g.training, last and ctx.has_residual and needs[1],
            )  # fmt: skip
            weight, conv_bias, y = step.weight, step.conv_bias, None
            del step
            if last:
                grads[1] = dresidual
                del dresidual
            conv_input = x
            if i > 0:
                prev, p = geometry[i - 1], steps[-1]
                conv_input = batch_norm_act_apply(
                    p.raw, None, p.bn_weight, p.bn_bias, p.mean, p.var, prev.eps, prev.act
                )
                del p
            at = 3 + i * _TENSORS
            need_input = needs[0] if i == 0 else True
            dy, dweight, dconv_bias = _convolution_backward(
                dy, conv_input, weight, None if conv_bias is None else list(conv_bias.shape),
                g.stride, g.padding, g.dilation, False, (0, 0), g.groups,
                (need_input, needs[at], needs[at + 1]),
            )  # fmt: skip
            del conv_input
            grads[at : at + 4] = dweight, dconv_bias, dbn_weight, dbn_bias
        grads[0] = dy if needs[0] else None
        return tuple(grads)


def _step_tensors(tensors: Sequence[Tensor | None], i: int) -> Sequence[Any]:
    return tensors[i * _TENSORS : (i + 1) * _TENSORS]


class _SavedStep(NamedTuple):
    weight: Tensor
    conv_bias: Tensor | None
    bn_weight: Tensor | None
    bn_bias: Tensor | None
    raw: Tensor
    mean: Tensor
    var: Tensor


def _saved_steps(geometry: tuple[_Geometry, ...], saved: Sequence[Any]) -> list[_SavedStep]:
    """Undo setup_context's flattening: the tensors of all steps, then what forward returned."""
    steps = []
    kept = len(geometry) * _TENSORS
    for i, g in enumerate(geometry):
        weight, conv_bias, bn_weight, bn_bias, mean, var = _step_tensors(saved, i)
        raw = saved[kept]
        kept += 1
        if g.training:
            mean, var = saved[kept : kept + 2]
            kept += 2
        steps.append(_SavedStep(weight, conv_bias, bn_weight, bn_bias, raw, mean, var))
    return steps


def _autocast(t: Any, dtype: torch.dtype) -> Any:
    """Cast as autocast does for a convolution: every floating type but float64."""
    return t.to(dtype) if isinstance(t, Tensor) and t.dtype in _AUTOCAST_FROM else t


def conv_bn_act(x: Tensor, steps: Sequence[ConvBnActStep], residual: Tensor | None) -> Tensor:
    """Check, apply, update the running statistics: see fastcnn.functional.conv_bn_act."""
    if not steps:
        raise ValueError(f"{OP}: steps: expected at least one, got none")
    if isinstance(x, Tensor) and torch.is_autocast_enabled(x.device.type):
        dtype = torch.get_autocast_dtype(x.device.type)
        x, residual = _autocast(x, dtype), _autocast(residual, dtype)
        steps = [
            s._replace(weight=_autocast(s.weight, dtype), conv_bias=_autocast(s.conv_bias, dtype))
            for s in steps
        ]
    check_image(OP, "input", x)
    geometry: list[_Geometry] = []
    tensors: list[Tensor | None] = []
    sizes = list(x.shape)
    for i, step in enumerate(steps):
        sizes = _check_step(f"{OP}: step {i}", step, x, sizes)
        fixed = (None, None) if step.training else (step.running_mean, step.running_var)
        tensors += step.weight, step.conv_bias, step.bn_weight, step.bn_bias, *fixed
        geometry.append(
            _Geometry(
                _pair(step.stride), _pair(step.padding), _pair(step.dilation), step.groups,
                step.training, step.eps, act_number(f"{OP}: step {i}", step.act),
            )
        )  # fmt: skip
    image, added, *tensors = distinct(x, residual, *tensors)
    y, *kept = ConvBnActFunction.apply(image, added, tuple(geometry), *tensors)
    for step in steps:
        raw = kept.pop(0)
        if step.training:
            mean, var = kept.pop(0), kept.pop(0)
            update_running(step.running_mean, step.running_var, mean, var, step.momentum, raw)
    return y


def _check_step(op: str, step: ConvBnActStep, x: Tensor, sizes: list[int]) -> list[int]:
    """Check a step whose input has these sizes and x's dtype; return the sizes of its output."""
    weight = step.weight
    if not isinstance(weight, Tensor):
        raise TypeError(f"{op}: weight: expected a Tensor, got {type(weight).__name__}")
    if weight.dim() != 4:
        raise ValueError(
            f"{op}: weight: expected 4 dimensions [c_out, c_in / groups, kh, kw], "
            f"got {list(weight.shape)}"
        )
    c_out, c_in = weight.shape[0], weight.shape[1] * step.groups
    if c_in != sizes[1]:
        raise ValueError(
            f"{op}: weight: expected {sizes[1]} input channels, got {c_in} "
            f"({weight.shape[1]} for each of {step.groups} groups)"
        )
    if c_out % step.groups != 0:
        raise ValueError(
            f"{op}: groups: expected a divisor of {c_out} output channels, got {step.groups}"
        )
    for name, t in (("weight", weight), ("conv_bias", step.conv_bias)):
        if t is not None and t.dtype != x.dtype:
            raise TypeError(f"{op}: {name}: expected {x.dtype} as the input, got {t.dtype}")
        if t is not None and t.device != x.device:
            raise ValueError(f"{op}: {name}: expected device {x.device}, got {t.device}")
    if step.conv_bias is not None and step.conv_bias.shape != (c_out,):
        raise ValueError(
            f"{op}: conv_bias: expected {c_out} numbers, got {list(step.conv_bias.shape)}"
        )
    out = [sizes[0], c_out]
    for size, kernel, stride, padding, dilation in zip(
        sizes[2:], weight.shape[2:], _pair(step.stride), _pair(step.padding), _pair(step.dilation),
        strict=True,
    ):  # fmt: skip
        reach = size + 2 * padding - dilation * (kernel - 1) - 1
        if reach < 0 or stride < 1 or padding < 0 or dilation < 1:
            raise ValueError(
                f"{op}: weight: expected a kernel that fits into the padded input, got kernel "
                f"{list(weight.shape[2:])}, stride {step.stride}, padding {step.padding}, dilation "
                f"{step.dilation} for an input of {sizes}"
            )
        out.append(reach // stride + 1)
    check_parameters(
        op, out, x, step.bn_weight, step.bn_bias, step.running_mean, step.running_var,
        step.training, "bn_",
    )  # fmt: skip
    return out
