"""Chains in inference: each step's weights folded and packed once, by FoldedConv2d.

In training, and where a gradient is required, the steps run as runtime.py's.
"""

import itertools
import weakref
from collections.abc import Callable, Sequence
from typing import Any

import torch
from torch import Tensor
from torch.nn.modules.batchnorm import _BatchNorm

from fastcnn.common.activation import eager_activation
from fastcnn.convert.codegen import runtime
from fastcnn.convert.codegen.fit import Shortcut, StepModules
from fastcnn.convert.codegen.runtime import Resizing
from fastcnn.convert.options import Options
from fastcnn.ops.conv_bn_act.folded import FoldedConv2d
from fastcnn.ops.upsample_conv2d.folded import FoldedUpsampleConv2d

_numbers = itertools.count()


def folded_chain(
    steps: Sequence[StepModules],
    shortcut: Sequence[StepModules] | None,
    residual_dies: bool,
    options: Options,
) -> Callable[[Tensor, Tensor | None], Tensor]:
    """Return what runs a chain on an input and a residual.

    shortcut: steps on the input whose output is the residual, () for the input itself; None where
    the residual is an argument, or there is none. residual_dies: nobody reads it afterwards.
    """
    main = [(FoldedConv2d(conv, bn, act), pool) for conv, bn, act, pool in steps]
    beside = [(FoldedConv2d(conv, bn, act), pool) for conv, bn, act, pool in shortcut or ()]
    norms = [bn for _, bn, _, _ in (*steps, *(shortcut or ())) if isinstance(bn, _BatchNorm)]
    weight = steps[0][0]

    def run(x: Tensor, residual: Tensor | None) -> Tensor:
        added = residual if shortcut is None else shortcut
        asks = torch.is_grad_enabled() and (x.requires_grad or weight.weight.requires_grad)
        if asks or any(bn.training or bn.running_mean is None for bn in norms):
            for step, _ in (*main, *beside):  # an optimizer that writes to .data is not seen
                step.refresh()
            return _differentiable(x, steps, added, options)
        if _converts_layout(x, weight.weight):
            x = x.contiguous(memory_format=torch.channels_last)
        if runtime.runs_one_by_one(x, steps, added, options):
            return runtime.one_by_one(x, steps, added)
        added = residual if shortcut is None else _through(x, beside)
        return _through(x, main, added, residual_dies or bool(beside))

    return run


def folded_upsampled_chain(
    steps: Sequence[StepModules], concat_last: bool, options: Options
) -> Callable[..., Tensor]:
    """Return what runs a chain on an image to be upsampled, a skip, how, and a residual."""
    (conv, bn, act, pool), *others = steps
    first = FoldedUpsampleConv2d(conv, bn, act)
    rest = folded_chain(others, None, False, options) if others else None
    whole = folded_chain(steps, None, False, options)

    def run(x: Tensor, concat: Tensor | None, how: Resizing, residual: Tensor | None) -> Tensor:
        how = runtime.resizing(how)
        beside: Any = {"concat": concat, "concat_last": concat_last}
        asks = torch.is_grad_enabled() and (x.requires_grad or conv.weight.requires_grad)
        of_batch = isinstance(bn, _BatchNorm) and (bn.training or bn.running_mean is None)
        if asks or of_batch:
            first.refresh()
        small = runtime.upsamples_small(x, concat, conv, how, options)
        if bn is not None and (asks or of_batch) and all(b is not None for _, b, _, _ in others):
            return runtime.run_upsampled_chain(
                x, concat, concat_last, how, steps, residual, options
            )
        if asks or of_batch or not small or (residual is not None and rest is None):
            return whole(runtime.run_interpolate(x, **how, **beside, options=options), residual)
        y = first(x, **beside, **how)
        y = y if pool is None else pool(y)
        return y if rest is None else rest(y, residual)

    return run


class Kept:
    """A function as a graph has it, with a name of its own by which generated code calls it.

    The graph keeps it until somebody else does.
    """

    def __init__(self, function: Callable[..., Any]) -> None:
        self.__name__ = self.__qualname__ = f"folded_chain_{next(_numbers)}"
        self._function = function

    def __call__(self, *args: Any) -> Any:
        """Call the function."""
        return self._function(*args)

    def given_up(self) -> Callable[..., Any]:
        """Return the function, which the caller keeps from here on."""
        function, self._function = self._function, weakref.proxy(self._function)
        return function


def _converts_layout(x: Tensor, weight: Tensor) -> bool:
    """Whether PyTorch's convolution would go on in channels_last from NCHW images."""
    last = torch.channels_last
    nchw = x.dim() == 4 and not x.is_contiguous(memory_format=last)
    return nchw and weight.is_contiguous(memory_format=last) and not weight.is_contiguous()


def _through(
    x: Tensor,
    steps: Sequence[tuple[FoldedConv2d, Any]],
    residual: Tensor | None = None,
    dies: bool = False,
) -> Tensor:
    for i, (step, pool) in enumerate(steps, start=1):
        x = step(x, residual, dies) if i == len(steps) and residual is not None else step(x)
        x = x if pool is None else pool(x)
    return x


def _differentiable(
    x: Tensor, steps: Sequence[StepModules], residual: Shortcut, options: Options
) -> Tensor:
    """Run a chain, of which steps without a batch norm are PyTorch's."""
    if all(bn is not None for _, bn, _, _ in steps):
        return runtime.run_chain(x, steps, residual, options)
    added = residual
    if added is not None and not isinstance(added, Tensor):
        added = _differentiable(x, added, None, options) if added else x
    for i, step in enumerate(steps, start=1):
        conv, bn, act, pool = step
        last = added if i == len(steps) else None
        if bn is not None:
            x = runtime.run_chain(x, [step], last, options)
            continue
        x = conv(x)
        x = eager_activation(x if last is None else x + last, act)
        x = x if pool is None else pool(x)
    return x
