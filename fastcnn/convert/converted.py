"""Converted modules: a class of its own for each, whose forward runs the fused code.

    m.__class__    class Bottleneck(Converted, torchvision's Bottleneck), made for this m alone
    m.__dict__     as it was

so that parameters, buffers, names, hooks, flags and isinstance are what they were, and taking the
class away again is a revert to the bit. Copies (deepcopy, pickle, torch.save) are made as of the
original class and converted once more.
"""

import copy
import copyreg
import functools
import types
import warnings
import weakref
from collections.abc import Callable, Iterator, Sequence
from contextlib import contextmanager
from typing import Any, NamedTuple
from weakref import WeakKeyDictionary

import torch
from torch import Tensor, fx, nn

from fastcnn.common.constant_result import constant_result
from fastcnn.convert.codegen import runtime
from fastcnn.convert.codegen.rewrite import comparison_of, drop_identities, function_of, fuse
from fastcnn.convert.codegen.runtime import Options
from fastcnn.convert.graph.describe import describe
from fastcnn.convert.graph.guards import Guard
from fastcnn.convert.graph.patterns import Matcher, Pattern
from fastcnn.convert.graph.trace import Untraceable, arguments_of, is_leaf, trace

# By module: why its forward is not replaced.
untraceable: WeakKeyDictionary[nn.Module, str] = WeakKeyDictionary()


class Plan(NamedTuple):
    """What runs in place of a forward, as long as the training flags that it has read are these."""

    run: Callable[..., Any]
    flags: list[tuple[nn.Module, bool]]
    guard: Guard
    holds: Callable[[Any], bool]  # the guard, as far as torch.compile needs to see it
    patterns: list[tuple[str, str]]  # where, and what became one call
    left: list[tuple[str, str]]  # where, and why not
    calls: list[str]  # paths of the modules that it calls


def match(
    graph: fx.Graph, module: nn.Module, options: Options
) -> tuple[dict[str, nn.Module], list[nn.Module], Matcher, list[Pattern]]:
    """Return a module's modules, the identities taken out of its graph, and the patterns."""
    modules = dict(module.named_modules(remove_duplicate=False))
    dropped = drop_identities(graph, modules)
    matcher = Matcher(graph, modules, folds=options.mode == "infer")
    return modules, dropped, matcher, matcher.match()


def plan(module: nn.Module, leaves: set[nn.Module], options: Options, name: str) -> Plan:
    """Trace a module with its training flags as they are, and fuse what is found.

    Raises:
        Untraceable: the forward cannot be replaced.
    """
    graph, opened, asked = trace(module, leaves)
    modules, dropped, matcher, patterns = match(graph, module, options)
    inside = [modules[str(n.target)] for p in patterns for n in p.nodes if n.op == "call_module"]
    consumed = {m: None for layer in (*inside, *dropped) for m in layer.modules()}
    described = [describe(p, modules) for p in patterns]
    left = [(str(node.target), why) for node, why in matcher.left.items()]
    fuse(graph, matcher, patterns, options)
    calls = [str(node.target) for node in graph.nodes if node.op == "call_module"]
    run = function_of(graph, name or type(module).__name__)
    flags = [(m, m.training) for m in asked]
    guard = Guard(opened, consumed)
    paths = {m: path for path, m in reversed(modules.items())}
    holds = comparison_of(guard, paths, f"comparison of {name}")
    return Plan(run, flags, guard, holds, described, left, calls)


class Conversion:
    """The plans of one module with children."""

    def __init__(self, name: str, options: Options, leaves: Sequence[str]) -> None:
        self.name, self.options, self.leaves = name, options, tuple(leaves)
        self.plans: list[Plan] = []
        self._without: set[tuple[bool, ...]] = set()  # flags with which it has no trace
        self._warned: set[str] = set()
        self._module: Any = None
        self._containers: list[nn.Module] = []

    def prepare(self, module: nn.Module) -> bool:
        """Make the plan for the training flags as they are, and those for training and evaluation.

        Says whether any fuses anything.

        Raises:
            Untraceable: the first cannot be made.
        """
        self._module = weakref.ref(module)
        self._containers = [m for m in module.modules() if not is_leaf(m)]
        self._add()
        now = self._flags()
        try:
            for flag in (True, False):
                for m in self._containers:
                    m.training = flag
                self._find()
        finally:
            for m, flag in zip(self._containers, now, strict=True):
                m.training = flag
        return any(made.patterns for made in self.plans)

    def apply(self, module: Any) -> None:
        """Give a prepared module its class."""
        original, runs = type(module), self.plans
        required, optional = arguments_of(original.forward)
        alone = self.options.mode == "infer"  # folded weights are of this module's own

        @constant_result
        def select(training: bool) -> int:
            return self._select()

        def forward(self: Any, *args: Any, **kwargs: Any) -> Any:
            at = select(self.training)
            inputs = _bind(required, optional, args, kwargs)
            if (
                at < 0
                or inputs is None
                or torch.jit._trace.is_tracing()
                or (alone and _is_replica(self))
            ):
                return original.forward(self, *args, **kwargs)
            if torch.compiler.is_compiling() and not runs[at].holds(self):
                return original.forward(self, *args, **kwargs)
            return runs[at].run(self, *inputs)

        _give_class(module, self, forward)

    def recipe(self) -> tuple[Any, ...]:
        """Return what makes an equal conversion."""
        return type(self), self.name, self.options, self.leaves

    def current(self) -> Plan | None:
        """Return the plan for the flags as they are, None where the forward runs as written."""
        at = self._select()
        return None if at < 0 else self.plans[at]

    def holds(self) -> bool:
        """Whether nothing has changed since the conversion."""
        return all(made.guard.changed() is None for made in self.plans)

    def _select(self) -> int:
        at = self._find()
        why = None if at < 0 else self.plans[at].guard.changed()
        if why is None:
            return at
        if why not in self._warned:
            self._warned.add(why)
            where = self.name or "the model"
            warnings.warn(
                f"fastcnn.convert: {where} has changed since it was converted ({why}): it runs as "
                f"written, its children by themselves; convert it again",
                stacklevel=3,
            )
        return -1

    def _find(self) -> int:
        """Return the place of the plan for the flags as they are, made where it is not there."""
        for at, made in enumerate(self.plans):
            if all(m.training == flag for m, flag in made.flags):
                return at
        flags = self._flags()
        if flags in self._without:
            return -1
        try:
            self._add()
        except Untraceable:
            self._without.add(flags)
            return -1
        return len(self.plans) - 1

    def _flags(self) -> tuple[bool, ...]:
        return tuple([m.training for m in self._containers])

    def _add(self) -> None:
        module = self._module()
        leaves = {module.get_submodule(path) for path in self.leaves}
        with as_original(list(module.modules())):
            made = plan(module, leaves, self.options, self.name)
        self.plans.append(made)


class LayerConversion:
    """A layer by itself: its own class runs its kernel."""

    def __init__(self, options: Options) -> None:
        self.options = options

    def prepare(self, module: nn.Module) -> bool:
        """Say whether there is a kernel for the layer."""
        return True

    def holds(self) -> bool:
        """Whether nothing has changed since the conversion."""
        return True

    def apply(self, module: Any) -> None:
        """Give a layer its class."""
        original, options = type(module), self.options
        required, optional = arguments_of(original.forward)
        run = runtime.layer_call(module)

        def forward(self: Any, *args: Any, **kwargs: Any) -> Any:
            inputs = _bind(required, optional, args, kwargs)
            if inputs is not None and not torch.jit._trace.is_tracing():
                why = runtime.layer_unfit(self, inputs[0], options)
                if why is None:
                    return run(inputs[0], self)
            return original.forward(self, *args, **kwargs)

        _give_class(module, self, forward)

    def recipe(self) -> tuple[Any, ...]:
        """Return what makes an equal conversion."""
        return type(self), self.options


class Converted:
    """Marks the classes that convert makes, each with a conversion of its own."""

    _fastcnn_conversion: Any
    _fastcnn_class: type[nn.Module]

    def __init_subclass__(cls, **_: Any) -> None:
        """Keep the classes made here from the registries that original classes may have."""

    def __copy__(self) -> Any:
        with as_original([self]):
            copied = copy.copy(self)
        _convert_copy(self._fastcnn_conversion.recipe(), copied)
        return copied

    def __deepcopy__(self, memo: dict[int, Any]) -> Any:
        with as_original([self]):
            copied = copy.deepcopy(self, memo)
        _convert_copy(self._fastcnn_conversion.recipe(), copied)
        return copied

    def __reduce_ex__(self, protocol: Any) -> Any:
        recipe = self._fastcnn_conversion.recipe()
        with as_original([self]):
            make, arguments, *rest = self.__reduce_ex__(protocol)
        state = rest[0] if rest and rest[0] is not None else {}
        if make is getattr(copyreg, "__newobj__"):  # noqa: B009 # pickle asks that it be of the object's own class
            make = _new
        return make, arguments, state, None, None, functools.partial(_restore, recipe)


@contextmanager
def as_original(modules: Sequence[Any]) -> Iterator[None]:
    """Give modules their original classes for a while."""
    changed: list[Any] = [(m, type(m)) for m in modules if isinstance(m, Converted)]
    for module, cls in changed:
        module.__class__ = cls._fastcnn_class
    try:
        yield
    finally:
        for module, cls in changed:
            module.__class__ = cls


def _new(cls: type, *arguments: Any) -> Any:
    return cls.__new__(cls, *arguments)


def _restore(recipe: Any, module: Any, state: Any) -> None:
    """Set a pickled module's state, and convert it: its children are there by then."""
    if hasattr(module, "__setstate__"):
        module.__setstate__(state)
    else:
        module.__dict__.update(state)
    _convert_copy(recipe, module)


def _convert_copy(recipe: Any, module: Any) -> None:
    make, *arguments = recipe
    conversion = make(*arguments)
    try:
        conversion.prepare(module)
    except (Untraceable, AttributeError) as error:  # changed since, as a child that is gone
        untraceable[module] = str(error)
    else:
        conversion.apply(module)


def _give_class(module: Any, conversion: Any, forward: Callable[..., Any]) -> None:
    original = type(module)
    # Code of its own: torch.compile counts how often it compiles one code anew, and gives up.
    code, closure = forward.__code__.replace(), forward.__closure__
    forward = types.FunctionType(code, forward.__globals__, "forward", None, closure)
    body = {
        "_fastcnn_conversion": conversion,
        "_fastcnn_class": original,
        "forward": functools.wraps(original.forward)(forward),
        "__module__": original.__module__,
        "__qualname__": original.__qualname__,
        "__doc__": original.__doc__,
    }
    module.__class__ = type(original.__name__, (Converted, original), body)


def _bind(
    required: list[str], optional: dict[str, Any], args: Any, kwargs: dict[str, Any]
) -> list[Any] | None:
    """Return the tensors for a plan's arguments, None where the call is not of that kind.

    The others must have the values that they have by default.
    """
    given = dict(zip((*required, *optional), args, strict=False)) | kwargs
    if len(given) != len(args) + len(kwargs):
        return None
    inputs = [given.pop(name, None) for name in required]
    for name, value in given.items():
        if name not in optional or value is not optional[name]:
            return None
    return inputs if all(isinstance(x, Tensor) for x in inputs) else None


def _is_replica(module: Any) -> bool:
    """Whether nn.DataParallel has made a module for one call."""
    return "_is_replica" in module.__dict__
