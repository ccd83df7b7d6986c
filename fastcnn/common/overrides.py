"""Subclasses of Tensor see a call of an op as they see one of torch's functions.

An op begins as torch's own do, and passes its arguments on by name:

    @overridable
    def op(input, weight):
        if has_torch_function_variadic(input, weight):
            return overridden(locals())

Within the call nothing is dispatched to them: an autograd.Function would else return a view that
was made inside it, which nothing may write into, and each size that is read would be a call.
"""

import sys
from collections.abc import Callable, Iterable, Iterator, Mapping
from types import CodeType
from typing import Any, ParamSpec, TypeVar

import torch
from torch.overrides import (
    handle_torch_function,
    has_torch_function,
    has_torch_function_variadic,
)

__all__ = [
    "has_override_inside",
    "has_torch_function_variadic",
    "overridable",
    "overridden",
    "plain_tensors",
]

P = ParamSpec("P")
R = TypeVar("R")

# Within it nothing is dispatched to subclasses: for a backward, which may have saved some.
plain_tensors = torch._C.DisableTorchFunctionSubclass


def has_override_inside(kind: type[tuple[Any, ...]], values: Iterable[Any]) -> bool:
    """Whether a tensor in tuples of a kind, as a chain's steps, has a __torch_function__."""
    for value in values:
        if isinstance(value, kind):
            if has_torch_function(value):
                return True
        elif isinstance(value, (tuple, list)) and has_override_inside(kind, value):
            return True
    return False


_ops: dict[CodeType, Callable[..., Any]] = {}


def overridable(op: Callable[P, R]) -> Callable[P, R]:
    """Let `overridden` know an op by its code: its name may be patched when it is called."""
    _ops[op.__code__] = op
    return op


def overridden(arguments: Mapping[str, Any]) -> Any:
    """Let the __torch_function__ of an argument, or of a mode, run the op that calls this.

    arguments: its locals, of which the positional ones come first.
    """
    code = sys._getframe(1).f_code
    pairs = list(arguments.items())
    args = [value for _, value in pairs[: code.co_argcount]]
    kwargs = dict(pairs[code.co_argcount :])
    return handle_torch_function(_ops[code], tuple(_flat(arguments.values())), *args, **kwargs)


def _flat(values: Iterable[Any]) -> Iterator[Any]:
    for value in values:
        if isinstance(value, (tuple, list)):
            yield from _flat(value)
        else:
            yield value
