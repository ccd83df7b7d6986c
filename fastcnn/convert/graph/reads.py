"""What a forward reads of its modules while it is traced: all that its trace takes for granted.

Python looks every attribute up through `nn.Module.__getattribute__`, which is ours meanwhile. Noted
are training flags, values of instances and of classes, what an instance lacked (hasattr, a class's
value that an instance may hide), children by their name, lists of children where a container is
iterated, and whether a parameter or buffer is None. Not noted is what runs around a forward
(nn.Module's own names), and what torch.fx asks for itself.

Of an object that is read, the attributes are compared as far as they are plain, since how it is
used further is not seen: a namespace of options, a dataclass, any helper.
"""

import enum
import sys
import threading
import types
from collections.abc import Iterator
from contextlib import contextmanager
from typing import Any, NamedTuple
from unittest.mock import patch

import torch
from torch import nn

from fastcnn.convert.graph.layers import class_of

MISSING = object()
PLAIN = (bool, int, float, str, bytes, type(None), torch.dtype, torch.Size, torch.device)
_OWN = {*vars(nn.Module), *vars(nn.Module())}  # what a subclass's forward does not depend on
_QUIET = {*_OWN, "__class__"} - {"training", "_modules", "__dict__"}
_DEPTH = 3  # of objects within objects


class Value(NamedTuple):
    """An attribute: the dictionary that holds it, its name there, what it was, and where it is."""

    holder: dict[str, Any]
    name: str
    value: Any
    where: str


class Reads:
    """What was read.

    values: of instances, by dictionary and name. of_classes: of their classes. nones: whether a
    parameter or buffer was None. children: their names, of modules that were asked for all of them.
    flags: the modules whose `training` was read. asked: whose attributes were. plain: which values
    torch.compile compares, by module.
    """

    def __init__(self) -> None:
        self.values: dict[tuple[int, str], Value] = {}
        self.of_classes: dict[tuple[type, str], Any] = {}
        self.nones: dict[tuple[int, str], tuple[dict[str, Any], str, bool, str]] = {}
        self.children: dict[nn.Module, tuple[str, ...]] = {}
        self.asked: set[nn.Module] = set()
        self.plain: dict[tuple[nn.Module, str], Any] = {}
        self.flags: dict[nn.Module, None] = {}

    def note(self, module: nn.Module, name: str) -> None:
        """Note what a module's attribute is, wherever Python finds it."""
        self.asked.add(module)
        own, cls = object.__getattribute__(module, "__dict__"), class_of(module)
        where = f"{cls.__name__}.{name}"
        if name in own:
            if self._note(own, name, own[name], where) and isinstance(own[name], PLAIN):
                self.plain[module, name] = own[name]
            return
        found, children = getattr(cls, name, MISSING), own.get("_modules", {})
        if found is MISSING:
            for tensors in (own.get("_parameters", {}), own.get("_buffers", {})):
                if name in tensors:
                    none = tensors[name] is None
                    self.nones.setdefault((id(tensors), name), (tensors, name, none, where))
                    return
            self._note(children, name, children.get(name, MISSING), where)
            if name in children:
                return
        self.of_classes.setdefault((cls, name), found)
        self._note(own, name, MISSING, where)

    def note_children(self, module: nn.Module) -> None:
        """Note which children a module has: somebody has asked for all of them."""
        children = object.__getattribute__(module, "_modules")
        self.asked.add(module)
        self.children.setdefault(module, tuple(children))
        for name, child in children.items():
            self._note(children, name, child, f"{class_of(module).__name__}.{name}")

    def note_all(self, module: nn.Module) -> None:
        """Note all values of an instance: somebody has asked for its dictionary."""
        for name in list(object.__getattribute__(module, "__dict__")):
            if name not in _OWN:
                self.note(module, name)

    def _note(self, holder: dict[str, Any], name: str, value: Any, where: str) -> bool:
        """Note a value where it is the first of that name, and what is in it."""
        if (id(holder), name) in self.values:
            return False
        self.values[id(holder), name] = Value(holder, name, copied(value), where)
        self._note_inside(value, where, _DEPTH)
        return True

    def _note_inside(self, value: Any, where: str, depth: int) -> None:
        if depth == 0 or not _is_helper(value):
            return
        for name, one in list(vars(value).items()):
            if (id(vars(value)), name) in self.values:
                continue
            if _is_plain(one):
                found = Value(vars(value), name, copied(one), f"{where}.{name}")
                self.values[id(vars(value)), name] = found
            else:
                self._note_inside(one, f"{where}.{name}", depth - 1)


@contextmanager
def recorded() -> Iterator[Reads]:
    """Record what the calling thread reads of modules."""
    reads, thread = Reads(), threading.get_ident()
    look_up, this_thread = object.__getattribute__, threading.get_ident

    def read(module: nn.Module, name: str) -> Any:
        if name not in _QUIET and this_thread() == thread:
            if name not in _OWN and not name.startswith("__"):
                reads.note(module, name)
            elif name == "training":
                reads.flags[module] = None
            elif name in ("_modules", "__dict__") and _is_asked_for():
                reads.note_children(module)
                if name == "__dict__":
                    reads.note_all(module)
        return look_up(module, name)

    with patch.object(nn.Module, "__getattribute__", read, create=True):
        yield reads


def _is_asked_for() -> bool:
    """Whether somebody's code, or a container's method, asks for a module's children."""
    frame = sys._getframe(2)
    if frame.f_code is _LOOKUP:  # most of all
        return False
    while (name := frame.f_globals.get("__name__", "")) == "torch.nn.modules.module":
        if frame.f_code.co_name in _LOOKUPS or frame.f_back is None:
            return False
        frame = frame.f_back
    inside = name.startswith(("torch.", "fastcnn.convert."))
    return not inside or name == "torch.nn.modules.container"


_LOOKUP = nn.Module.__getattr__.__code__
_LOOKUPS = ("__getattr__", "__setattr__", "__delattr__", "_call_impl", "_wrapped_call_impl")


def copied(value: Any) -> Any:
    """Copy what can be written into, and leave what is in it as it is."""
    if isinstance(value, list):
        return [copied(one) for one in value]
    if isinstance(value, tuple) and type(value) is tuple:
        return tuple(copied(one) for one in value)
    if isinstance(value, dict):
        return {key: copied(one) for key, one in value.items()}
    return set(value) if isinstance(value, set) else value


def is_same(now: Any, then: Any) -> bool:
    """Whether a value is what it was: the same object, or an equal one of its type."""
    if now is then:
        return True
    copies = next((kind for kind in (list, dict, set) if isinstance(then, kind)), None)
    alike = type(now) is type(then) if copies is None else isinstance(now, copies)
    if not alike or isinstance(now, (torch.Tensor, nn.Module)):
        return False
    try:
        return bool(now == then)
    except (RuntimeError, ValueError, TypeError):  # of tensors and arrays within
        return False


def _is_plain(value: Any) -> bool:
    if isinstance(value, (tuple, list, set, frozenset)):
        return all(map(_is_plain, value))
    if isinstance(value, dict):
        return all(map(_is_plain, (*value.keys(), *value.values())))
    return isinstance(value, (*PLAIN, enum.Enum))


def _is_helper(value: Any) -> bool:
    """Whether a value is an object with attributes of its own that a forward may ask for."""
    other = (nn.Module, torch.Tensor, type, types.ModuleType, enum.Enum)
    return not isinstance(value, other) and not callable(value) and hasattr(value, "__dict__")
