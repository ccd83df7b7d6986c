"""conv_bn_act: a chain of (convolution, batch norm, activation) steps as one autograd.Function.

    a_0 = input
    r_i = conv(a_{i-1}, weight_i)                              the raw output of step i
    a_i = act_i(batch_norm_i(r_i))                             i < last
    output = act_last(batch_norm_last(r_last) + residual)

Kept for backward: the input, every r_i, the statistics, and where a residual went through an
activation the output (it is the next chain's input anyway) or, for activations whose derivative the
output does not tell, the residual. Not kept: a_1 ... a_{last-1}, which
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
from fastcnn.ops.batch_norm_act import (
    batch_norm_act_apply,
    batch_norm_act_bwd,
    batch_norm_act_fwd,
    image_to_save,
    update_running,
)
from fastcnn.ops.checks import check_image, check_like
from fastcnn.ops.conv_bn_act_step import ConvBnActStep, Geometry, check_step

OP = "conv_bn_act"

# Tensors of a step in the Function's flat argument list: weight, conv_bias, bn_weight, bn_bias,
# and the fixed mean and var, which are None where the batch's own are used.
_TENSORS = 6

_AUTOCAST_FROM = (torch.float32, torch.bfloat16, torch.float16)

_convolution = torch.ops.aten.convolution.default
_convolution_backward = torch.ops.aten.convolution_backward.default


def _convolve(x: Tensor, weight: Tensor, bias: Tensor | None, g: Geometry) -> Tensor:
    return _convolution(x, weight, bias, g.stride, g.padding, g.dilation, False, (0, 0), g.groups)


class ConvBnActFunction(torch.autograd.Function):
    """The output, then for each step its raw convolution output, mean and var.

    The latter are outputs because what backward keeps must be an input or an output for
    torch.func; they have no gradient.
    """

    @staticmethod
    @positional
    def forward(
        x: Tensor, residual: Tensor | None, geometry: tuple[Geometry, ...], *tensors: Tensor | None
    ) -> tuple[Tensor, ...]:
        kept: list[Tensor] = []
        for i, g in enumerate(geometry):
            weight, conv_bias, bn_weight, bn_bias, mean, var = _step_tensors(tensors, i)
            added = residual if i == len(geometry) - 1 else None
            raw = _convolve(x, weight, conv_bias, g)
            if added is not None:
                check_like(OP, "residual", added, raw)
            if g.training:
                x, *stats = batch_norm_act_fwd(
                    raw, added, bn_weight, bn_bias, g.eps, g.act, g.group
                )
                kept += raw, *stats
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
        saved = image_to_save(ctx.geometry[-1].act, y, residual)
        ctx.save_for_backward(x, saved, *tensors, *kept)

    @staticmethod
    @once_differentiable
    def backward(ctx: Any, dy: Tensor | None, *_: Any) -> tuple[Tensor | None, ...]:
        geometry, needs = ctx.geometry, ctx.needs_input_grad
        grads: list[Tensor | None] = [None] * len(needs)
        if dy is None:
            return tuple(grads)
        x, saved, *rest = ctx.saved_tensors
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
                dy, step.raw, saved if last else None, step.bn_weight, step.bn_bias, step.mean,
                step.var, g.eps, g.act, g.training, last and ctx.has_residual and needs[1],
                True, step.total, g.group,
            )  # fmt: skip
            weight, conv_bias, saved = step.weight, step.conv_bias, None
            del step
            if last:
                grads[1] = dresidual
                del dresidual
            at = 3 + i * _TENSORS
            if i == 0:
                conv_input = x
            elif needs[at]:
                conv_input = _rebuild(steps[-1], geometry[i - 1])
            else:  # a frozen weight: only the sizes of the input matter, and raw has them
                conv_input = steps[-1].raw
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
    total: Tensor | None


def _rebuild(step: _SavedStep, g: Geometry) -> Tensor:
    """Return the step's activation, by the kernel that made it: the same bits."""
    return batch_norm_act_apply(
        step.raw, None, step.bn_weight, step.bn_bias, step.mean, step.var, g.eps, g.act
    )


def _saved_steps(geometry: tuple[Geometry, ...], saved: Sequence[Any]) -> list[_SavedStep]:
    """Undo setup_context's flattening: the tensors of all steps, then what forward returned."""
    steps = []
    kept = len(geometry) * _TENSORS
    for i, g in enumerate(geometry):
        weight, conv_bias, bn_weight, bn_bias, mean, var = _step_tensors(saved, i)
        raw = saved[kept]
        kept += 1
        total = None
        if g.training:
            mean, var = saved[kept : kept + 2]
            kept += 2
        if g.group is not None:
            total = saved[kept]
            kept += 1
        steps.append(_SavedStep(weight, conv_bias, bn_weight, bn_bias, raw, mean, var, total))
    return steps


def _autocast(t: Any, dtype: torch.dtype) -> Any:
    """Cast as autocast does for a convolution: every floating type but float64."""
    return t.to(dtype) if isinstance(t, Tensor) and t.dtype in _AUTOCAST_FROM else t


def conv_bn_act(x: Tensor, steps: Sequence[ConvBnActStep], residual: Tensor | None) -> Tensor:
    """Check, apply, update the running statistics: see fastcnn.functional.conv_bn_act."""
    if not steps:
        raise ValueError(f"{OP}: steps: expected at least one, got none")
    on_meta = isinstance(x, Tensor) and x.device.type == "meta"  # autocast does not know meta
    if isinstance(x, Tensor) and not on_meta and torch.is_autocast_enabled(x.device.type):
        dtype = torch.get_autocast_dtype(x.device.type)
        x, residual = _autocast(x, dtype), _autocast(residual, dtype)
        steps = [
            s._replace(weight=_autocast(s.weight, dtype), conv_bias=_autocast(s.conv_bias, dtype))
            for s in steps
        ]
    check_image(OP, "input", x)
    geometry: list[Geometry] = []
    tensors: list[Tensor | None] = []
    sizes = list(x.shape)
    for i, step in enumerate(steps):
        g, sizes = check_step(f"{OP}: step {i}", step, x, sizes)
        geometry.append(g)
        fixed = (None, None) if step.training else (step.running_mean, step.running_var)
        tensors += step.weight, step.conv_bias, step.bn_weight, step.bn_bias, *fixed
    image, added, *tensors = distinct(x, residual, *tensors)
    y, *kept = ConvBnActFunction.apply(image, added, tuple(geometry), *tensors)
    for step, g in zip(steps, geometry, strict=True):
        raw = kept.pop(0)
        if step.training:
            mean, var = kept.pop(0), kept.pop(0)
            total = None if g.group is None else kept.pop(0)
            update_running(
                step.running_mean, step.running_var, mean, var, step.momentum, raw, total
            )
    return y
