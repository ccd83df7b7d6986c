"""What a trace took for granted, compared with the modules at every call.

A trace holds what the forward has read of its modules (`reads.py`), their classes' forwards, and
what the layers are that fused calls run without calling them; and it calls no hooks of what it
opened. If any of this is different at a call, the forward runs as written.
"""

import reprlib
import types
from collections.abc import Hashable, Iterable, Iterator, Sequence
from typing import Any, NamedTuple

from torch import nn

from fastcnn import _C
from fastcnn.common.checks import one_of
from fastcnn.convert.graph.layers import NORMS, Layers, class_of
from fastcnn.convert.graph.reads import (
    DEPTH,
    MISSING,
    Reads,
    Value,
    is_helper,
    is_plain,
    is_same,
    of_class,
)
from fastcnn.nn.conv_bn_act import own_method

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
# How a layer computes, where somebody may patch it: padding that wraps around, as for tiles.
_METHODS = ("forward", "_conv_forward", "_check_input_dim")
_READ_AT_CALLS = {**dict.fromkeys(NORMS, ("eps", "momentum")), "dropout": ("p", "inplace")}
# Layers that fused calls do not read at each call, so that torch.compile would not compare them.
_COMPARED_COMPILED = {
    "act", "adaptive_pool", "hardsigmoid", "identity", "max_pool", "upsample",
}  # fmt: skip


def has_hooks(module: nn.Module) -> bool:
    """Whether hooks run around a module's forward."""
    return any(getattr(module, name) for name in _HOOKS)


class Guard:
    """Compares the modules of a trace with how they were.

    opened: modules whose forward is part of the trace, the root first. consumed: the layers that
    fused calls run without calling them, and the identities that are gone. The root itself is not
    kept, which lives as long as nobody else keeps it.
    """

    def __init__(
        self,
        opened: Sequence[nn.Module],
        consumed: Iterable[nn.Module],
        reads: Reads,
        layers: Layers,
    ) -> None:
        consumed = list(consumed)
        inner = [*opened[1:], *consumed]
        self._inner = inner
        self._own = [vars(m) for m in inner]
        self._values = [*reads.values.values(), *_inside(consumed)]
        self._values += [value for m in inner for value in _methods_of(m)]
        holders = [*opened[1:], *(m for m in consumed if m._modules)]
        self._values += [
            Value(vars(m), "_modules", m._modules, f"{_name(m)}._modules") for m in holders
        ]
        fixed = {*opened, *consumed, *reads.asked}  # others are called: one of their class will do
        modules = [v.value for v in self._values if isinstance(v.value, nn.Module)]
        self._called = {id(m) for m in modules if m not in fixed}
        self._values += [value for m in consumed for value in _options_of(m, layers)]
        self._of_classes = [(*key, value) for key, value in reads.of_classes.items()]
        self._nones = list(reads.nones.values())
        self._children = [(m._modules, names, _name(m)) for m, names in reads.children.items()]
        # A class's forward may be replaced for all its modules, a module's class for it alone.
        self._classes = [class_of(m) for m in inner]
        self._types = [type(m) for m in inner]  # of now: a converted module has one of its own
        classes = dict.fromkeys(k for m in (*opened, *consumed) for k in class_of(m).__mro__)
        self._methods = [
            (cls, name, vars(cls)[name])
            for cls in classes
            for name in _METHODS
            if cls is not nn.Module and name in vars(cls)
        ]

    @classmethod
    def of_layer(cls, module: nn.Module, layers: Layers) -> "Guard":
        """Return the guard of a layer that runs by itself, with what is inside it."""
        inside = [m for m in module.modules() if m is not module]
        guard = cls([module], inside, Reads(), layers)
        guard._values += [*_inside([module]), *_options_of(module, layers)]
        return guard

    def changed(self) -> tuple[Hashable, str] | None:
        """Return what is no longer as it was traced, each attribute another, and say it, if any."""
        if any(_GLOBAL_HOOKS):
            return "hooks", "hooks on all modules are registered"
        at = _C.first_filled(self._own, _HOOKS)
        if at >= 0:
            module = self._inner[at]
            return (id(module), "hooks"), f"{one_of(type(module))} has hooks now"
        at = -1
        while (at := _C.first_changed(self._values, MISSING, at + 1)) >= 0:
            holder, name, value, where = self._values[at]
            now = holder.get(name, MISSING)
            if id(value) in self._called and class_of(now) is class_of(value):
                self._called.add(id(now))
                self._values[at] = self._values[at]._replace(value=now)
            elif not is_same(now, value) and not _is_method_of_class(holder, name, now, value):
                return (id(holder), name), _difference(where, value, now)
        at = -1
        while (at := _C.first_of_another_type(self._inner, self._types, at + 1)) >= 0:
            module, cls = self._inner[at], self._classes[at]
            if class_of(module) is not cls:
                return (id(module), "class"), f"{one_of(cls)} has another class now"
            self._types[at] = type(module)
        for cls, name, value in self._of_classes:
            now = of_class(cls, name)
            if now is not value and not is_same(now, value):
                return (cls, name), _difference(f"{cls.__name__}.{name}", value, now)
        for holder, name, none, where in self._nones:
            if (holder.get(name) is None) is not none:
                return (id(holder), name), f"{where} is {'a tensor' if none else 'None'} now"
        for cls, name, method in self._methods:
            if vars(cls).get(name) is not method:
                return (cls, name), f"{cls.__name__} has another {name} now"
        for holder, names, where in self._children:
            if tuple(holder) != names:
                return (id(holder), names), f"{where} has other children now"
        return None


class Compared(NamedTuple):
    """What torch.compile has to see compared, as it keeps a guard's answer.

    attribute: of a module, and of what that is. how: what is asked of it: "class", "equal" (to the
    value), "is None", "has" (the module none of that name), "children" (their names). value: the
    answer.
    """

    module: nn.Module
    attribute: tuple[str, ...]
    how: str
    value: Any


def compared_compiled(
    opened: Sequence[nn.Module], consumed: Iterable[nn.Module], reads: Reads, layers: Layers
) -> Iterator[Compared]:
    """Yield what torch.compile is to see: what it would have seen in the forward as written.

    It compares what it has met: all of a plain value, the function or class that another one is.
    """
    consumed = list(consumed)
    for m in reads.flags:
        yield Compared(m, ("training",), "equal", m.training)
    for m, names in reads.children.items():
        yield Compared(m, (), "children", names)
    for m in consumed:
        if layers[m].kind in _COMPARED_COMPILED:
            yield Compared(m, (), "class", type(m))
            for _, name, value, _ in _options_of(m, layers):
                if is_plain(value):
                    yield Compared(m, (name,), "equal", value)
    for m in (*opened[1:], *consumed):
        for name in _METHODS:
            if hasattr(m, name):
                yield Compared(m, (name,), "is None", False)
    # By the dictionaries that are read, what has them. An attribute of a class is one of a module.
    holders = {id(vars(m)): (m, tuple[str, ...]()) for m in reads.asked}
    tensors = {id(d): m for m in reads.asked for d in (m._parameters, m._buffers)}
    children = {id(m._modules): m for m in reads.asked}
    for holder, name, none, _ in reads.nones.values():
        if id(holder) in tensors:
            yield Compared(tensors[id(holder)], (name,), "is None", none)
    for holder, name, value, _ in reads.values.values():
        if id(holder) in children and value is not MISSING:
            yield Compared(children[id(holder)], (name,), "is None", value is None)
        if id(holder) not in holders:
            continue
        module, attribute = holders[id(holder)][0], (*holders[id(holder)][1], name)
        found = of_class(class_of(module), name) if value is MISSING else value
        if found is MISSING:
            yield from [] if hasattr(module, name) else [Compared(module, attribute, "has", False)]
        elif is_plain(found):
            yield Compared(module, attribute, "equal", found)
        elif value is not MISSING or _is_kept(found):
            yield Compared(module, attribute, "is None", False)
            _add_helpers(holders, found, module, attribute)


def _is_kept(found: Any) -> bool:
    """Whether asking an instance for what its class has computes nothing, as a property does."""
    return isinstance(found, types.FunctionType) or not hasattr(type(found), "__get__")


def _add_helpers(
    holders: dict[int, tuple[nn.Module, tuple[str, ...]]],
    value: Any,
    module: nn.Module,
    attribute: tuple[str, ...],
) -> None:
    """Add the attributes of an object that is an attribute of a module, as Reads notes them."""
    if len(attribute) <= DEPTH and is_helper(value):
        holders[id(vars(value))] = module, attribute
        for name, one in vars(value).items():
            _add_helpers(holders, one, module, (*attribute, name))


def _name(module: nn.Module) -> str:
    return type(module).__name__


def _inside(layers: Iterable[nn.Module]) -> Iterator[Value]:
    """Yield the children of layers, such as the activation inside a norm."""
    for m in layers:
        for name, child in m._modules.items():
            yield Value(m._modules, name, child, f"{_name(m)}.{name}")


def _methods_of(module: nn.Module) -> Iterator[Value]:
    """Yield the methods that run a module, of which an instance may have its own."""
    for name in _METHODS:
        if hasattr(type(module), name):
            own = own_method(module, name)
            then = MISSING if own is None else own
            yield Value(vars(module), name, then, f"{_name(module)}.{name}")


def _is_method_of_class(own: dict[str, Any], name: str, now: Any, then: Any) -> bool:
    """Whether an instance that had no method of its own has one now that is its class's."""
    module = getattr(now, "__self__", None)
    if then is not MISSING or not isinstance(module, nn.Module) or vars(module) is not own:
        return False
    return own_method(module, name) is None


def _options_of(layer: nn.Module, layers: Layers) -> list[Value]:
    """Return the values that a layer was made with, and that are not read at each call."""
    later = _READ_AT_CALLS.get(str(layers[layer].kind), ())
    names = [n for n in getattr(layer, "__constants__", ()) if n not in later]
    own = layer.__dict__
    return [Value(own, n, own[n], f"{_name(layer)}.{n}") for n in names if n in own]


def _difference(where: str, then: Any, now: Any) -> str:
    if then is MISSING:
        return f"{where} was not there and is now"
    if now is MISSING:
        return f"{where} is gone"
    if isinstance(then, nn.Module) or isinstance(now, nn.Module):
        return f"{where} is another module now"
    was, is_now = reprlib.repr(then), reprlib.repr(now)
    return f"{where} was {was} and is {is_now} now" if was != is_now else f"{where} has changed"
