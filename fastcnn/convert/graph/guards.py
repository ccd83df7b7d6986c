"""What a trace took for granted, compared with the modules at every call.

A trace reads the modules' classes, their plain attributes and those of their configurations, which
children there are and which are None, and calls no hooks of what it opened. If any of this is
different at a call, the forward runs as written.
"""

import dataclasses
from collections.abc import Iterable, Iterator, Sequence
from typing import Any

import torch
from torch import nn

from fastcnn.convert.graph.layers import NORMS, Layers, class_of

_HOOKS = ("_forward_hooks", "_forward_pre_hooks", "_backward_hooks", "_backward_pre_hooks")
_GLOBAL_HOOKS = [
    getattr(nn.modules.module, name)
    for name in (
        "_global_forward_hooks",
        "_global_forward_pre_hooks",
        "_global_backward_hooks",
        "_global_backward_pre_hooks",
    )
]
_PLAIN = (bool, int, float, str, type(None), torch.dtype, torch.Size)
_MISSING = object()
_NOT_STATE = {*nn.Module().__dict__}  # training flags, and what has checks of its own
# What fused calls do not read at each call, so that torch.compile would not compare it.
_COMPARED_COMPILED = {"act", "identity", "max_pool", "upsample"}
_READ_AT_CALLS = {"eps", "momentum"}  # of norms


def has_hooks(module: nn.Module) -> bool:
    """Whether hooks run around a module's forward."""
    return any(getattr(module, name) for name in _HOOKS)


class Guard:
    """Compares a root and what its trace opened with how they were.

    opened: modules whose forward is part of the trace, the root first. consumed: the layers that
    fused calls run without calling them, and the identities that are gone.
    """

    def __init__(
        self, opened: Sequence[nn.Module], consumed: Iterable[nn.Module], layers: Layers
    ) -> None:
        consumed = list(consumed)
        norms = {m for m in consumed if layers[m].kind in NORMS}
        fixed = {id(m) for m in (*opened, *consumed)}
        inner = [*opened[1:], *consumed]
        self._hooks = [(getattr(m, name), m) for m in inner for name in _HOOKS]
        self._values = [value for m in (*opened, *consumed) for value in _values(m, m in norms)]
        # A class's forward may be replaced for all its modules, a module's class for it alone.
        self._classes = [(m, class_of(m), class_of(m).forward) for m in (*opened, *consumed)]
        self._children = [
            (m._modules, name, child, m)
            for m in (*opened, *consumed)
            for name, child in m._modules.items()
            if child is None or id(child) in fixed
        ]
        self.kinds_compiled = [m for m in consumed if layers[m].kind in _COMPARED_COMPILED]
        self.seen_compiled = [
            (m, name, value)
            for m in (*opened, *self.kinds_compiled)
            for _, name, value, where in _values(m, m in norms)
            if where == _name(m) and isinstance(value, _PLAIN)
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
        for values, name, value, where in self._values:
            now = values.get(name, _MISSING)
            if now is not value and (not _same_type(now, value) or now != value):
                return f"{where}.{name} was {value!r} and is {now!r} now"
        for module, cls, forward in self._classes:
            if class_of(module) is not cls or cls.forward is not forward:
                return f"a {cls.__name__} has another class or forward now"
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


def _same_type(now: Any, then: Any) -> bool:
    """Whether two values are of one type; copies of lists and dictionaries are plain ones."""
    kinds = (list, dict)
    return type(now) is type(then) or (isinstance(then, kinds) and isinstance(now, type(then)))


def _values(module: nn.Module, is_norm: bool) -> Iterator[tuple[dict[str, Any], str, Any, str]]:
    """Yield where a module's plain values are, each with its name and what it is now."""
    read_later = _READ_AT_CALLS if is_norm else set()
    for name, value in module.__dict__.items():
        if name in _NOT_STATE or name in read_later:
            continue
        if _is_plain(value):
            yield module.__dict__, name, _copied(value), _name(module)
        elif _is_configuration(value):
            for key, one in vars(value).items():
                if _is_plain(one):
                    yield vars(value), key, _copied(one), f"{_name(module)}.{name}"


def _is_plain(value: Any) -> bool:
    if isinstance(value, (tuple, list)):
        return all(map(_is_plain, value))
    if isinstance(value, dict):
        return all(map(_is_plain, (*value.keys(), *value.values())))
    return isinstance(value, _PLAIN)


def _copied(value: Any) -> Any:
    """Copy what can be written into."""
    if isinstance(value, list):
        return [_copied(one) for one in value]
    if isinstance(value, dict):
        return {key: _copied(one) for key, one in value.items()}
    return value


def _is_configuration(value: Any) -> bool:
    """Whether an object holds options: a namespace, a dataclass, or a class that says so."""
    if isinstance(value, (nn.Module, torch.Tensor, type)) or not hasattr(value, "__dict__"):
        return False
    named = type(value).__name__.lower().endswith(("config", "namespace"))
    return named or dataclasses.is_dataclass(value)
