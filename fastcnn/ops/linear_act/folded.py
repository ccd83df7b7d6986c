"""Linear layers and activations one behind the other, in inference, their weights packed once.

    y = act2(act1(x @ weight1.T + bias1) @ weight2.T + bias2)        and so on

Each in one call of oneDNN's, with the activation in it, from weights in its layout. Half types that
are multiplied in float32 (conv2d/float32_products.py) stay so from the first layer to the last: an
MLP's hidden values, four times its input, are neither rounded nor converted. One row, and fewer
than 2**20 multiply-adds, are PyTorch's, as oneDNN's call costs 20 us more; weights from 2**24
values on stay as they are, as packing gained nothing there and would double them. A float32 layer
without an activation is PyTorch's F.linear.

What is kept, and for how long: as conv_bn_act/folded.py says.
"""

import math
from collections.abc import Callable, Sequence
from itertools import repeat
from typing import Any

import torch
from torch import Tensor, nn

from fastcnn.common.activation import Activation, eager_activation
from fastcnn.common.autocast import autocast_dtype, cast_dtype, without_autocast
from fastcnn.ops.conv2d.onednn import EPILOGUES, folds
from fastcnn.ops.conv_bn_act.folded import is_plain_inference, may_be_kept
from fastcnn.ops.conv_bn_act.weight_cache import (
    MOST_SIZES,
    State,
    Unchanged,
    attributes_of,
    is_comparable,
    parameter_of,
)
from fastcnn.ops.linear_act.interface import OP, as_parameter, check_linear, in_float32

LinearAct = tuple[nn.Linear, Activation]
Run = Callable[[Tensor], Tensor]

_FEW, _LARGE = 2**20, 2**24  # multiply-adds, and values of a weight, see above
_linear_pointwise = torch.ops.mkldnn._linear_pointwise.default
_reorder = torch.ops.mkldnn._reorder_linear_weight.default


class FoldedLinears:
    """What runs ``act(linear(x))`` of modules one behind the other on inputs of a kind.

    Raises:
        TypeError, ValueError: prepare(), what fastcnn.functional.linear_act refuses.
    """

    def __init__(self, steps: Sequence[LinearAct]) -> None:
        self.steps = list(steps)
        self._states: list[State] = []
        self._known: dict[Any, tuple[Run, Unchanged]] = {}

    def refresh(self) -> None:
        """Pack anew at the next call."""
        self._states = []  # another: a thread may be at what was kept
        self._known.clear()

    def known(self, x: Tensor) -> Run | None:
        """Return what has run inputs like x, None where nothing has, or it no longer holds."""
        if torch.compiler.is_compiling() or not is_plain_inference((x,)):
            return None
        found = self._known.get(_kind_of(x))
        return found[0] if found is not None and found[1].holds() else None

    def prepare(self, x: Tensor) -> Run | None:
        """Return what runs inputs like x, and keep it; None where nothing can be kept."""
        if torch.compiler.is_compiling():
            return None
        made = self._made(x, autocast_dtype(x)) if is_plain_inference((x,)) else None
        if made is None:
            self.refresh()
            return None
        if len(self._known) >= MOST_SIZES:
            self._known.clear()
        self._known[_kind_of(x)] = made
        return made[0]

    def _made(self, x: Tensor, dtype: torch.dtype | None) -> tuple[Run, Unchanged] | None:
        """Return what runs inputs like x, and as long as what it may."""
        attributes, pairs = [], []  # first: another thread may change them meanwhile
        for linear, _ in self.steps:
            found = attributes_of(linear, ("weight", "bias"))
            if found is None:
                return None
            attributes += found
            pairs.append((parameter_of(linear, "weight"), parameter_of(linear, "bias")))
        flat = [t for pair in pairs for t in pair]
        if not may_be_kept(flat) or not is_comparable(tuple(flat)):
            return None
        like = torch.empty_like(x, dtype=cast_dtype(x, dtype))
        if not folds(like) or like.numel() == 0:
            return None
        tensors = [(*pair, None, None, None, None) for pair in pairs]
        states = self._states
        if not states or not all(map(State.is_of, states, tensors, repeat(()))):
            self.refresh()
            self._states = states = [State(OP, of_step, ()) for of_step in tensors]
        inner = []
        for (weight, bias), (_, act), state in zip(pairs, self.steps, states, strict=True):
            weight, bias = as_parameter(weight, dtype), as_parameter(bias, dtype)
            check_linear(like, weight, bias)
            inner.append(_calling(like, weight, bias, act, state))
            like = like.new_empty((*like.shape[:-1], weight.shape[0]))
        own = like.dtype

        def run(x: Tensor) -> Tensor:
            with without_autocast(x):
                for one in inner:
                    x = one(x)
                return x.to(own)

        return run, Unchanged(states, attributes)


def _kind_of(x: Tensor) -> tuple[Any, ...]:
    return autocast_dtype(x), x.dtype, x.shape, x.stride(), x.device


def _calling(x: Tensor, weight: Tensor, bias: Tensor | None, act: str, state: State) -> Run:
    """Return what computes act(linear()) of what is like x, in the type in which it multiplies."""
    dtype = torch.float32 if in_float32(x, weight) else x.dtype
    (c_out, c_in), rows = weight.shape, math.prod(x.shape[:-1])
    exact = act == "none" and x.dtype is torch.float32
    if exact or rows == 1 or rows * c_out * c_in < _FEW or not folds(x.new_empty(0, dtype=dtype)):
        weight, bias = state.kept(_converted, weight, bias, dtype)
        linear = torch.nn.functional.linear
        return lambda x: eager_activation(linear(x.to(dtype), weight, bias), act, inplace=True)
    make = _packed if weight.numel() < _LARGE else _converted
    weight, bias = state.kept(make, weight, bias, dtype)
    epilogue = EPILOGUES[act]
    return lambda x: _linear_pointwise(x.to(dtype), weight, bias, *epilogue)


def _converted(
    weight: Tensor, bias: Tensor | None, dtype: torch.dtype
) -> tuple[Tensor, Tensor | None]:
    weight = weight.detach().to(dtype)
    return weight, None if bias is None else bias.detach().to(dtype)


def _packed(
    weight: Tensor, bias: Tensor | None, dtype: torch.dtype
) -> tuple[Tensor, Tensor | None]:
    weight, bias = _converted(weight, bias, dtype)
    return _reorder(weight.contiguous(), None), bias
