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
_OF_MODULES = dict(vars(nn.Module))  # what each has of its class
# Each instance's own, and how a forward is called.
_QUIET = {
    *vars(nn.Module()),
    "__class__",
    "_call_impl",
    "_wrapped_call_impl",
    "_compiled_call_impl",
}
_QUIET -= {"training", "_modules"}
DEPTH = 3  # of objects within objects


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
    flags: the modules whose `training` was read. asked: whose attributes were. entered: whose
    forward was called by its name. made: by the forward itself, of which nothing is noted.
    """

    def __init__(self) -> None:
        self.values: dict[tuple[int, str], Value] = {}
        self.of_classes: dict[tuple[type, str], Any] = {}
        self.nones: dict[tuple[int, str], tuple[dict[str, Any], str, bool, str]] = {}
        self.children: dict[nn.Module, tuple[str, ...]] = {}
        self.asked: set[nn.Module] = set()
        self.entered: dict[nn.Module, None] = {}
        self.made: set[nn.Module] = set()
        self.flags: dict[nn.Module, None] = {}

    def note(self, module: nn.Module, name: str) -> None:
        """Note what a module's attribute is, wherever Python finds it."""
        if module in self.made or isinstance(module, torch.jit.ScriptModule):
            return
        self.asked.add(module)
        own, cls = object.__getattribute__(module, "__dict__"), class_of(module)
        where = f"{cls.__name__}.{name}"
        if name in own:
            self._note(own, name, own[name], where)
            return
        found, children = of_class(cls, name), own.get("_modules", {})
        if found is MISSING:
            tensors = [own.get(kind, {}) for kind in ("_parameters", "_buffers")]
            for holder in tensors:
                if name in holder:
                    none = holder[name] is None
                    self.nones.setdefault((id(holder), name), (holder, name, none, where))
                    return
            self._note(children, name, children.get(name, MISSING), where)
            if name in children:
                return
            for holder in tensors:
                self._note(holder, name, MISSING, where)
        elif (cls, name) not in self.of_classes:
            self._note_inside(found, where, DEPTH)
        self.of_classes.setdefault((cls, name), copied(found))
        self._note(own, name, MISSING, where)

    def note_children(self, module: nn.Module) -> None:
        """Note which children a module has: somebody has asked for all of them."""
        if module in self.made or isinstance(module, torch.jit.ScriptModule):
            return
        children = object.__getattribute__(module, "_modules")
        self.asked.add(module)
        self.children.setdefault(module, tuple(children))
        for name, child in children.items():
            self._note(children, name, child, f"{class_of(module).__name__}.{name}")

    def note_all(self, module: nn.Module) -> None:
        """Note all values of an instance: somebody has asked for its dictionary."""
        for name in list(object.__getattribute__(module, "__dict__")):
            if name not in _QUIET and name not in ("training", "_modules"):
                self.note(module, name)

    def _note(self, holder: dict[str, Any], name: str, value: Any, where: str) -> None:
        """Note a value where it is the first of that name, and what is in it."""
        if (id(holder), name) not in self.values:
            self.values[id(holder), name] = Value(holder, name, copied(value), where)
            self._note_inside(value, where, DEPTH)

    def _note_inside(self, value: Any, where: str, depth: int) -> None:
        if depth == 0 or not is_helper(value):
            return
        for name, one in list(vars(value).items()):
            if (id(vars(value)), name) in self.values:
                continue
            if is_plain(one):
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
            if name == "training":
                reads.flags[module] = None
            elif name == "forward":
                if not _is_torch_s(sys._getframe(1)):
                    reads.entered[module] = None
            elif name in ("_modules", "__dict__"):
                if _is_asked_for():
                    reads.note_children(module)
                    if name == "__dict__":
                        reads.note_all(module)
            elif not name.startswith("__") and _is_its_own(module, name):
                reads.note(module, name)
        return look_up(module, name)

    initialize = nn.Module.__init__

    def note_made(module: nn.Module, *args: Any, **kwargs: Any) -> None:
        initialize(module, *args, **kwargs)
        if this_thread() == thread:
            reads.made.add(module)

    with (
        patch.object(nn.Module, "__getattribute__", read, create=True),
        patch.object(nn.Module, "__init__", note_made),
    ):
        yield reads


def _is_its_own(module: nn.Module, name: str) -> bool:
    """Whether a name is more than what every module has under it."""
    usual = _OF_MODULES.get(name, MISSING)
    if usual is MISSING:
        return True
    own = object.__getattribute__(module, "__dict__")
    return name in own or of_class(type(module), name) is not usual


def of_class(cls: type, name: str) -> Any:
    """Return what a class has under a name, as it stands there, MISSING where it has nothing."""
    for k in cls.__mro__:
        if name in vars(k):
            return vars(k)[name]
    return MISSING


def _is_torch_s(frame: types.FrameType) -> bool:
    """Whether code is torch's own, or that of convert."""
    return frame.f_globals.get("__name__", "").startswith(("torch.", "fastcnn.convert."))


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
    except Exception:  # of tensors and arrays within, or of anybody's __eq__
        return False


def is_plain(value: Any) -> bool:
    """Whether a value is compared by what it says: a constant, or a container of such."""
    if isinstance(value, (tuple, list, set, frozenset)):
        return all(map(is_plain, value))
    if isinstance(value, dict):
        return all(map(is_plain, (*value.keys(), *value.values())))
    return isinstance(value, (*PLAIN, enum.Enum))


def is_helper(value: Any) -> bool:
    """Whether a value is an object with attributes of its own that a forward may ask for."""
    other = (nn.Module, torch.Tensor, type, types.ModuleType, enum.Enum)
    plain = not isinstance(value, other) and not callable(value)
    return plain and isinstance(getattr(value, "__dict__", None), dict)
