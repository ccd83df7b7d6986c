"""What a trace took for granted, compared with the modules at every call.

A trace reads the modules' plain attributes, which children there are and which are None, and calls
no hooks of what it opened. If any of this is different at a call, the forward runs as written.
"""

from collections.abc import Iterable, Sequence
from typing import Any

import torch
from torch import nn

_HOOKS = ("_forward_hooks", "_forward_pre_hooks", "_backward_hooks", "_backward_pre_hooks")
_GLOBAL_HOOKS = [
    getattr(nn.modules.module, name)
    for name in (
        "_global_forward_hooks", "_global_forward_pre_hooks", "_global_backward_hooks",
        "_global_backward_pre_hooks",
    )
]  # fmt: skip
_PLAIN = (bool, int, float, str, type(None), torch.dtype, torch.Size)
_MISSING = object()


def has_hooks(module: nn.Module) -> bool:
    """Whether hooks run around a module's forward."""
    return any(getattr(module, name) for name in _HOOKS)


class Guard:
    """Compares a root and what its trace opened with how they were.

    opened: modules whose forward is part of the trace, the root first. consumed: the layers that
    fused calls run without calling them.
    """

    def __init__(self, opened: Sequence[nn.Module], consumed: Iterable[nn.Module]) -> None:
        consumed = list(consumed)
        fixed = {id(m) for m in (*opened, *consumed)}
        inner = [*opened[1:], *consumed]
        self._hooks = [(getattr(m, name), m) for m in inner for name in _HOOKS]
        self._values = [
            (m.__dict__, name, value, m)
            for m in (*opened, *consumed)
            for name, value in m.__dict__.items()
            if name != "training" and _is_plain(value)
        ]
        self._children = [
            (m._modules, name, child, m)
            for m in (*opened, *consumed)
            for name, child in m._modules.items()
            if child is None or id(child) in fixed
        ]
        self._counts = [(m._modules, len(m._modules), m) for m in opened]
        self._own = [(m.__dict__, m) for m in inner]

    def changed(self) -> str | None:
        """Say what is no longer as it was traced, if anything."""
        if any(_GLOBAL_HOOKS):
            return "hooks on all modules are registered"
        for hooks, module in self._hooks:
            if hooks:
                return f"a {_name(module)} has hooks now"
        for values, name, value, module in self._values:
            now = values.get(name, _MISSING)
            if now is not value and (type(now) is not type(value) or now != value):
                return f"{_name(module)}.{name} was {value!r} and is {now!r} now"
        for children, name, child, module in self._children:
            if children.get(name) is not child:
                return f"{_name(module)}.{name} is another module now"
        for children, count, module in self._counts:
            if len(children) != count:
                return f"{_name(module)} has {len(children)} children and had {count}"
        for values, module in self._own:
            if "forward" in values:
                return f"a {_name(module)} has a forward of its own now"
        return None


def _name(module: nn.Module) -> str:
    return type(module).__name__


def _is_plain(value: Any) -> bool:
    if isinstance(value, (tuple, list)):
        return all(map(_is_plain, value))
    return isinstance(value, _PLAIN)
