"""Chains in inference: each step's weights folded and packed once, by FoldedConv2d, FoldedLinears.

In training, and where a gradient is required, the steps run as runtime.py's.
"""

import itertools
import weakref
from collections.abc import Callable, Sequence
from typing import Any, NamedTuple

import torch
from torch import Tensor
from torch.nn.modules.batchnorm import _BatchNorm

from fastcnn.common.activation import eager_activation
from fastcnn.common.autocast import autocast_dtype, cast
from fastcnn.common.checks import as_convolved, is_channels_last
from fastcnn.convert.codegen import runtime
from fastcnn.convert.codegen.fit import Shortcut, StepModules, linears_unfit
from fastcnn.convert.codegen.runtime import Resizing
from fastcnn.convert.options import Options
from fastcnn.ops.conv_bn_act.folded import FoldedConv2d, is_plain_inference
from fastcnn.ops.conv_bn_act.together import Together, prepare_together
from fastcnn.ops.conv_bn_act.weight_cache import MOST_SIZES, Attribute, State, Unchanged
from fastcnn.ops.linear_act.folded import FoldedLinears, LinearAct
from fastcnn.ops.upsample_conv2d.folded import FoldedUpsampleConv2d

# What runs a step on x, a residual, and whether that dies; and the pooling behind it.
Ran = tuple[Callable[[Tensor, Tensor | None, bool], Tensor], Any]

_numbers = itertools.count()


class _Known(NamedTuple):
    """What inputs of one kind run, and as long as what."""

    converts: bool  # the input to channels_last first
    beside: list[Ran]
    main: list[Ran]
    unchanged: Unchanged


class FoldedChain:
    """A chain on an input and a residual.

    shortcut: steps on the input whose output is the residual, () for the input itself; None where
    the residual is an argument, or there is none. residual_dies: nobody reads it afterwards.

    Whether the kernels take an input, and which one a step runs, is asked once for each of the last
    kinds of inputs, while the modules stay as they are: with all questions a step took 110 us,
    PyTorch's modules 50 (mobilenet_v3_small, one image of 32 x 32, a Xeon with AVX-512).
    """

    def __init__(
        self,
        steps: Sequence[StepModules],
        shortcut: Sequence[StepModules] | None,
        residual_dies: bool,
        options: Options,
    ) -> None:
        self._steps, self._shortcut, self._options = steps, shortcut, options
        self._main = [(FoldedConv2d(conv, bn, act), pool) for conv, bn, act, pool in steps]
        self._beside = [(FoldedConv2d(c, bn, act), pool) for c, bn, act, pool in shortcut or ()]
        norms = [bn for _, bn, _, _ in (*steps, *(shortcut or ()))]
        self._norms = [bn for bn in norms if isinstance(bn, _BatchNorm)]
        self._dies = residual_dies or bool(shortcut)
        self._known: dict[Any, _Known] = {}

    def __call__(self, x: Tensor, residual: Tensor | None) -> Tensor:
        """Return the chain's output."""
        images = (x,) if residual is None else (x, residual)
        if torch.compiler.is_compiling() or not is_plain_inference(images):
            return self._ask(x, residual, None)
        dtype = autocast_dtype(x)
        key = (dtype, *[(t.shape, t.stride(), t.dtype, t.device) for t in images])
        known = self._known.get(key)
        if known is None or not known.unchanged.holds():
            # All that do not hold: after .bfloat16() inputs in float32 never come again.
            others = [(k, other) for k, other in list(self._known.items()) if other is not known]
            self._known = {k: other for k, other in others if other.unchanged.holds()}
            return self._ask(x, residual, key)
        x, added = cast(x, dtype), cast(residual, dtype)
        if known.converts:
            x = x.contiguous(memory_format=torch.channels_last)
        if self._shortcut is not None:
            added = _through(x, known.beside)
        if added is not None:
            added = runtime.as_added(added, x, self._steps)
        return _through(x, known.main, added, self._dies)

    def _ask(self, x: Tensor, residual: Tensor | None, key: Any) -> Tensor:
        """Return its output, and keep what inputs with this key run, if it is not None."""
        options = self._options
        added: Shortcut = residual if self._shortcut is None else self._shortcut
        if self.trains((x, residual)):
            self.refresh()  # an optimizer that writes to .data is not seen
            return _differentiable(x, self._steps, added, options)
        converts = _converts_layout(x, self._steps[0][0].weight)
        if converts:
            x = x.contiguous(memory_format=torch.channels_last)
        if runtime.runs_one_by_one(x, self._steps, added, options):
            return runtime.one_by_one(x, self._steps, added)
        if key is None:
            beside = residual if self._shortcut is None else _through(x, self._beside)
            beside = None if beside is None else runtime.as_added(beside, x, self._steps)
            return _through(x, self._main, beside, self._dies)
        attributes = self._attributes()  # first: another thread may change them meanwhile
        dtype, states = key[0], list[tuple[State, Attribute]]()
        x, residual, ran = cast(x, dtype), cast(residual, dtype), list[Ran]()
        if self._shortcut is not None:
            residual, ran = _prepared(x, self._beside, None, False, dtype, states)
        if residual is not None:
            residual = runtime.as_added(residual, x, self._steps)
        y, main = _prepared(x, self._main, residual, self._dies, dtype, states)
        if attributes is not None and len(states) == len(self._main) + len(self._beside):
            if len(self._known) >= MOST_SIZES:
                self._known.clear()
            attributes += [kept for _, kept in states]
            unchanged = Unchanged([state for state, _ in states], attributes)
            self._known[key] = _Known(converts, ran, main, unchanged)
        return y

    def trains(self, images: Sequence[Tensor | None]) -> bool:
        """Whether a step takes the batch's statistics, or a gradient is asked of anything."""
        if any(bn.training or bn.running_mean is None for bn in self._norms):
            return True
        if not torch.is_grad_enabled():
            return False
        read = [step.tensors() for step, _ in (*self._main, *self._beside)]
        return any(t is not None and t.requires_grad for t in itertools.chain(images, *read))

    def refresh(self) -> None:
        """Fold anew at the next call."""
        self._known.clear()
        for step, _ in (*self._main, *self._beside):
            step.refresh()

    def _attributes(self) -> list[Attribute] | None:
        """Return what the steps read of their modules, None where that is not told by identity."""
        found: list[Attribute] = []
        for step, _ in (*self._main, *self._beside):
            read = step.attributes()
            if read is None:
                return None
            found += read
        return found


def folded_upsampled_chain(
    steps: Sequence[StepModules], concat_last: bool, options: Options
) -> Callable[..., Tensor]:
    """Return what runs a chain on an image to be upsampled, a skip, how, and a residual."""
    (conv, bn, act, pool), *others = steps
    first = FoldedUpsampleConv2d(conv, bn, act)
    rest = FoldedChain(others, None, False, options) if others else None
    whole = FoldedChain(steps, None, False, options)

    def run(x: Tensor, concat: Tensor | None, how: Resizing, residual: Tensor | None) -> Tensor:
        how = runtime.resizing(how)
        beside: Any = {"concat": concat, "concat_last": concat_last}
        trains = whole.trains((x, concat, residual))
        if trains:
            first.refresh()
            whole.refresh()
            if rest is not None:
                rest.refresh()
        small = runtime.upsamples_small(x, concat, conv, how, options)
        if trains and all(b is not None for _, b, _, _ in steps):
            return runtime.run_upsampled_chain(
                x, concat, concat_last, how, steps, residual, options
            )
        if trains or not small or (residual is not None and rest is None):
            return whole(runtime.run_interpolate(x, **how, **beside, options=options), residual)
        x = as_convolved(x, conv.weight)
        beside["concat"] = None if concat is None else as_convolved(concat, conv.weight)
        y = first(x, **beside, **how)
        y = y if pool is None else pool(y)
        return y if rest is None else rest(y, residual)

    return run


def folded_linears(steps: Sequence[LinearAct], options: Options) -> Callable[[Tensor], Tensor]:
    """Return what runs linear layers and activations one behind the other."""
    linears = FoldedLinears(steps)

    def run(x: Tensor) -> Tensor:
        call = linears.known(x)
        if call is None:
            parameters = [(linear.weight, linear.bias) for linear, _ in steps]
            fits = linears_unfit(x, parameters, options) is None
            call = linears.prepare(x) if fits else None
        return runtime.run_linears(x, steps, options) if call is None else call(x)

    return run


class Kept:
    """A function as a graph has it, with a name of its own by which generated code calls it.

    The graph keeps it until somebody else does.
    """

    def __init__(self, function: Callable[..., Any]) -> None:
        self.__name__ = self.__qualname__ = f"chain_{next(_numbers)}"
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
    nchw = x.dim() == 4 and not x.is_contiguous(memory_format=torch.channels_last)
    return nchw and is_channels_last(weight)


def _through(
    x: Tensor, steps: Sequence[Ran], residual: Tensor | None = None, dies: bool = False
) -> Tensor:
    last = len(steps) - 1
    for i, (run, pool) in enumerate(steps):
        x = run(x, residual if i == last else None, dies)
        x = x if pool is None else pool(x)
    return x


def _prepared(
    x: Tensor,
    steps: Sequence[tuple[FoldedConv2d, Any]],
    residual: Tensor | None,
    dies: bool,
    dtype: torch.dtype | None,
    states: list[tuple[State, Attribute]],
) -> tuple[Tensor, list[Ran]]:
    """Return the output and what has run; add the states of steps that keep one, as they do."""
    ran, rest = list[Ran](), list(steps)
    while rest:
        first = _first_prepared(x, rest, residual, dtype)
        _, pool = rest[first.steps - 1]
        rest = rest[first.steps :]
        states += first.kept
        ran.append((first.run, pool))
        x = _through(x, ran[-1:], None if rest else residual, dies)
    return x, ran


def _first_prepared(
    x: Tensor,
    steps: Sequence[tuple[FoldedConv2d, Any]],
    residual: Tensor | None,
    dtype: torch.dtype | None,
) -> Together:
    """Return what runs the first steps that are one call, or the first; residual: the last's."""
    pooled = [i for i, (_, pool) in enumerate(steps[:-1], start=1) if pool is not None]
    alike = [step for step, _ in steps[: pooled[0] if pooled else None]]
    together = prepare_together(alike, x, None if pooled else residual, dtype)
    if together is not None:
        return together
    step = alike[0]
    found = step.prepare(x, residual if len(steps) == 1 else None, dtype)
    if found is None:
        return Together(1, [], step)
    return Together(1, [(found[0], step.keeps(found[0]))], found[1])


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
