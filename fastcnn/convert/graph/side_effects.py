"""What a forward changes beside its result: plain attributes, and random generators of Python.

A trace runs a forward once and its graph never does so again, so such a forward cannot be replaced;
what it has changed is put back.
"""

import functools
import operator
import pickle
import random
import sys
from collections import OrderedDict
from collections.abc import Callable, Iterator
from typing import Any, NamedTuple

import torch
from torch import Tensor, fx, nn


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


_CONTAINERS = (list, dict, set)


class _Owner(NamedTuple):
    """A module, or an object in one: its attributes, what they were, and copies of containers."""

    name: str
    module: nn.Module
    now: dict[str, Any]
    then: dict[str, Any]
    copies: dict[str, Any]  # one level deep

    def changed(self) -> list[str]:
        """Return the names of the attributes that are not what they were."""
        now, then = self.now, self.then
        kept = len(now) == len(then) and all(map(operator.is_, now.values(), then.values()))
        names = () if kept else dict.fromkeys((*then, *now))
        plain = [k for k in names if k not in self.copies]
        found = [k for k in plain if now.get(k, _GONE) is not then.get(k, _GONE)]
        return found + [k for k, v in self.copies.items() if not _same(now.get(k), v)]

    def restore(self, name: str) -> None:
        """Put one attribute back."""
        now, then = self.now, self.then
        if name not in then:
            del now[name]
            return
        now[name] = then[name]
        if name in self.copies:
            _refill(then[name], self.copies[name])


_GONE = object()


def _plain_state(module: nn.Module) -> list[_Owner]:
    """What modules and the objects in them hold."""
    owners: dict[int, _Owner] = {}
    for m in module.modules():
        if not isinstance(m, torch.jit.ScriptModule):  # which caches its methods
            owners[id(m)] = _state_of(m, m)
            for value in m.__dict__.values():
                if type(value) not in _WITHOUT_STATE and _has_state(value):
                    owners[id(value)] = _state_of(value, m)
    return list(owners.values())


def _state_of(owner: Any, module: nn.Module) -> _Owner:
    now = owner.__dict__
    copies = {k: v.copy() for k, v in now.items() if isinstance(v, _CONTAINERS)}
    return _Owner(type(owner).__name__, module, now, dict(now), copies)


_WITHOUT_STATE = {bool, int, float, str, tuple, type(None), list, dict, set, OrderedDict}


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
    target.extend(source) if isinstance(target, list) else target.update(source)
