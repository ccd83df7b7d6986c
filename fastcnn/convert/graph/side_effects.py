"""What a forward changes beside its result: plain attributes, and random generators of Python.

A trace runs a forward once and its graph never does so again, so such a forward cannot be replaced;
what it has changed is put back.
"""

import functools
import pickle
import random
import sys
from collections.abc import Callable, Iterator
from typing import Any

import torch
from torch import Tensor, fx, nn


class Snapshot:
    """What a module's forward might change, as it is now."""

    def __init__(self, module: nn.Module) -> None:
        self._state = _plain_state(module)
        self._generators = [(get(), get, put) for get, put in _generators(module)]

    def restore(self) -> str | None:
        """Put everything back, and say what had changed, if anything."""
        drawn = [pickle.dumps(get()) != pickle.dumps(old) for old, get, _ in self._generators]
        for old, _, put in self._generators:
            put(old)
        changed = _restore(self._state)
        if any(drawn):
            return "draws random numbers outside PyTorch"
        return None if changed is None else f"changes the attribute {changed}"


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


# An owner's name, its attributes, and what they were.
_State = list[tuple[str, dict[str, Any], dict[str, Any]]]


def _plain_state(module: nn.Module) -> _State:
    """What modules and the objects in them hold, lists and dictionaries copied one level deep."""
    copied = (list, dict, set)
    owners: dict[int, Any] = {}
    for m in module.modules():
        if not isinstance(m, torch.jit.ScriptModule):  # which caches its methods
            objects = [v for v in m.__dict__.values() if _has_state(v)]
            owners |= {id(owner): owner for owner in (m, *objects)}
    return [
        (
            type(owner).__name__,
            owner.__dict__,
            {k: v.copy() if isinstance(v, copied) else v for k, v in owner.__dict__.items()},
        )
        for owner in owners.values()
    ]


def _has_state(value: Any) -> bool:
    plain = not callable(value) and not isinstance(value, (Tensor, nn.Module, fx.Graph))
    return plain and isinstance(getattr(value, "__dict__", None), dict)


def _restore(before: _State) -> str | None:
    """Put the dictionaries back as they were; return the name of one entry that was not."""
    changed = None
    for owner, new, old in before:
        for name in old.keys() | new.keys():
            if name in old and name in new and _same(old[name], new[name]):
                continue
            changed = f"{owner}.{name}"
            if name not in old:
                del new[name]
            elif _is_refillable(new.get(name), old[name]):
                _refill(new[name], old[name])
            else:
                new[name] = old[name]
    return changed


def _same(a: Any, b: Any) -> bool:
    """Whether two attributes are one object, or hold the same objects."""
    if a is b:
        return True
    if type(a) is not type(b) or not isinstance(a, (list, dict, set)) or len(a) != len(b):
        return False
    if isinstance(a, set):
        return a == b
    if isinstance(a, dict):
        return all(k in b and b[k] is v for k, v in a.items())
    return all(x is y for x, y in zip(a, b, strict=True))


def _is_refillable(new: Any, old: Any) -> bool:
    return type(new) is type(old) and isinstance(old, (list, dict, set))


def _refill(target: Any, source: Any) -> None:
    target.clear()
    target.extend(source) if isinstance(target, list) else target.update(source)
