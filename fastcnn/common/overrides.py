"""Subclasses of Tensor see a call of an op as they see one of torch's functions.

An op begins as torch's own do, and passes its arguments on by name:

    if has_torch_function_variadic(input, weight):
        return overridden(op, locals())

Within the call nothing is dispatched to them: an autograd.Function would else return a view that
was made inside it, which nothing may write into, and each size that is read would be a call.
"""

import inspect
from collections.abc import Callable, Iterable, Iterator, Mapping
from typing import Any

import torch
from torch.overrides import (
    handle_torch_function,
    has_torch_function,
    has_torch_function_variadic,
)

__all__ = ["has_override_inside", "has_torch_function_variadic", "overridden", "plain_tensors"]

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


def overridden(op: Callable[..., Any], arguments: Mapping[str, Any]) -> Any:
    """Let the __torch_function__ of an argument, or of a mode, run the op."""
    parameters = inspect.signature(op).parameters.values()
    args = [arguments[p.name] for p in parameters if p.kind is p.POSITIONAL_OR_KEYWORD]
    kwargs = {p.name: arguments[p.name] for p in parameters if p.kind is p.KEYWORD_ONLY}
    return handle_torch_function(op, tuple(_flat(arguments.values())), *args, **kwargs)


def _flat(values: Iterable[Any]) -> Iterator[Any]:
    for value in values:
        if isinstance(value, (tuple, list)):
            yield from _flat(value)
        else:
            yield value
