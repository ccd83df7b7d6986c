"""What a forward changes beside its result: plain attributes, and random generators of Python.

A trace runs a forward once and its graph never does so again, so such a forward cannot be replaced;
what it has changed is put back.
"""

import functools
import operator
import pickle
import random
import sys
from collections import deque
from collections.abc import Callable, Iterator
from itertools import starmap
from typing import Any, NamedTuple

import torch
from torch import Tensor, fx, nn

from fastcnn.convert.graph.reads import DEPTH


class Snapshot:
    """What a module's forward might change, as it is now."""

    def __init__(self, module: nn.Module) -> None:
        self._state = _plain_state(module)
        self._generators = [(get(), get, put) for get, put in _generators(module)]

    def restore(self) -> tuple[str, nn.Module | None] | None:
        """Put everything back; say what had changed, if anything, and of which module."""
        drawn = [pickle.dumps(get()) != pickle.dumps(old) for old, get, _ in self._generators]
        for old, _, put in self._generators:
            put(old)
        changed = _restore(self._state)
        if any(drawn):
            return "draws random numbers outside PyTorch", None
        return changed


def _generators(module: nn.Module) -> Iterator[tuple[Callable[[], Any], Callable[[Any], Any]]]:
    """Yield how the states of random generators outside PyTorch are read and set."""
    yield random.getstate, random.setstate
    numpy: Any = sys.modules.get("numpy.random")
    if numpy is not None:
        yield numpy.get_state, numpy.set_state
    for value in [value for m in module.modules() for value in m.__dict__.values()]:
        if isinstance(value, random.Random):
            yield value.getstate, value.setstate
        elif numpy is not None and isinstance(value, numpy.RandomState):
            yield value.get_state, value.set_state
        elif numpy is not None and isinstance(value, numpy.Generator):
            bits = value.bit_generator
            yield (
                functools.partial(getattr, bits, "state"),
                functools.partial(setattr, bits, "state"),
            )


_CONTAINERS = (list, dict, set, deque)


class _Owner(NamedTuple):
    """A module, or an object in one: its attributes, what they were, and copies of containers."""

    name: str
    module: nn.Module
    now: dict[str, Any]
    then: dict[str, Any]
    copies: dict[str, list[tuple[Any, Any]]]  # containers in an attribute, the outermost first

    def changed(self) -> list[str]:
        """Return the names of the attributes that are not what they were."""
        now, then = self.now, self.then
        kept = len(now) == len(then) and all(map(operator.is_, now, then))
        kept = kept and all(map(operator.is_, now.values(), then.values()))
        names = () if kept else dict.fromkeys((*then, *now))
        found = [k for k in names if not self._is_as_it_was(k)]
        copies = self.copies.items()
        return found + [k for k, pairs in copies if not all(starmap(_same, pairs))]

    def _is_as_it_was(self, name: str) -> bool:
        now, then = self.now.get(name, _GONE), self.then.get(name, _GONE)
        if now is then:
            return True
        return isinstance(then, _CONTAINERS) and _same(now, self.copies[name][0][1])

    def restore(self, name: str) -> None:
        """Put one attribute back."""
        now, then = self.now, self.then
        if name not in then:
            now.pop(name, None)
            return
        now[name] = then[name]
        for container, copy in self.copies.get(name, ()):
            _refill(container, copy)


_GONE = object()


def _plain_state(module: nn.Module) -> list[_Owner]:
    """What modules, the containers and the objects in them hold."""
    owners: dict[int, _Owner] = {}
    for m in module.modules():
        if not isinstance(m, torch.jit.ScriptModule):  # which caches its methods
            _add(owners, m, m, DEPTH)
    return list(owners.values())


def _add(owners: dict[int, _Owner], owner: Any, module: nn.Module, depth: int) -> None:
    now, copies = owner.__dict__, dict[str, list[tuple[Any, Any]]]()
    owners[id(owner)] = _Owner(type(owner).__name__, module, now, dict(now), copies)

    for name, value in list(now.items()):
        if type(value) in _WITHOUT_STATE:
            continue
        pairs: list[tuple[Any, Any]] = []
        if name not in _OF_MODULES:
            _add_inside(owners, value, module, depth, pairs)
        elif isinstance(value, _CONTAINERS):
            pairs.append((value, value.copy()))
        if pairs:
            copies[name] = pairs


def _add_inside(
    owners: dict[int, _Owner],
    value: Any,
    module: nn.Module,
    depth: int,
    pairs: list[tuple[Any, Any]],
) -> None:
    """Add the containers in a value to pairs, and the objects to owners."""
    if type(value) in _WITHOUT_STATE or depth == 0:
        return
    if isinstance(value, _CONTAINERS):
        pairs.append((value, value.copy()))
    if isinstance(value, (*_CONTAINERS, tuple)):
        for one in value.values() if isinstance(value, dict) else value:
            _add_inside(owners, one, module, depth - 1, pairs)
    elif id(value) not in owners and _has_state(value):
        _add(owners, value, module, depth - 1)


_WITHOUT_STATE = {bool, int, float, str, type(None), torch.Tensor, nn.Parameter}
_OF_MODULES = set(vars(nn.Module()))  # tensors, modules and hooks


def _has_state(value: Any) -> bool:
    plain = not callable(value) and not isinstance(value, (Tensor, nn.Module, fx.Graph))
    return plain and isinstance(getattr(value, "__dict__", None), dict)


def _restore(before: list[_Owner]) -> tuple[str, nn.Module] | None:
    """Put the dictionaries back as they were; return one entry that was not, and its module."""
    changed = None
    for owner in before:
        for name in owner.changed():
            changed = f"changes the attribute {owner.name}.{name}", owner.module
            owner.restore(name)
    return changed


def _same(now: Any, then: Any) -> bool:
    """Whether a container holds what a copy of it holds."""
    if not isinstance(now, type(then)) or len(now) != len(then):
        return False
    if isinstance(then, set):
        return bool(now == then)
    if isinstance(then, dict):
        return all(k in then and then[k] is v for k, v in now.items())
    return all(map(operator.is_, now, then))


def _refill(target: Any, source: Any) -> None:
    target.clear()
    target.extend(source) if isinstance(target, (list, deque)) else target.update(source)
