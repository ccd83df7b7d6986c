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
from typing import Any
from weakref import WeakKeyDictionary

import torch
from torch import Tensor, nn

from fastcnn.common.constant_result import constant_result
from fastcnn.convert import blame
from fastcnn.convert.codegen import runtime
from fastcnn.convert.fused_forward import FusedForward, trace_and_fuse
from fastcnn.convert.graph.layers import Layer, Layers
from fastcnn.convert.graph.trace import Untraceable, arguments_of, tracing
from fastcnn.convert.options import Options

# By module: why its forward is not replaced.
untraceable: WeakKeyDictionary[nn.Module, str] = WeakKeyDictionary()


class Conversion:
    """One module with children: a fused forward for each set of training flags met so far.

    Traced at once by prepare(), or after attach() when it is called.
    """

    def __init__(self, name: str, options: Options, leaves: Sequence[str]) -> None:
        self.name, self.options, self.leaves = name, options, tuple(leaves)
        self.forwards: list[FusedForward] = []
        self._without: dict[tuple[bool, ...], str] = {}  # flags, and why it has no trace with them
        self._warned: set[str] = set()
        self._module: Any = None
        self._containers: list[nn.Module] = []

    def attach(self, module: nn.Module, layers: Layers) -> bool:
        """Make a module's conversion, whose forwards are traced when they are called.

        Says whether the module takes arguments that a trace can have.
        """
        self._module = weakref.ref(module)
        with as_original(list(module.modules())):
            self._containers = [m for m in module.modules() if not layers[m].leaf]
            forward = type(module).forward
        try:
            return bool(arguments_of(forward)[0])
        except Untraceable:
            return False

    def prepare(self, module: nn.Module, layers: Layers) -> None:
        """Fuse for the training flags as they are, and for those of training and evaluation.

        Raises:
            Untraceable: the first cannot be made.
        """
        self.attach(module, layers)
        self._add(layers)
        now = self._flags()
        try:
            for flag in (True, False):
                for m in self._containers:
                    m.training = flag
                self._find(layers)
        finally:
            for m, flag in zip(self._containers, now, strict=True):
                m.training = flag

    def fuses(self) -> bool:
        """Whether any forward made so far has a pattern."""
        return any(made.patterns for made in self.forwards)

    def opened(self) -> dict[str, bool]:
        """Return the paths of modules that are part of a forward made so far.

        And whether a pattern has a part in them.
        """
        found: dict[str, bool] = {}
        for made in self.forwards:
            found |= {path: fuses or found.get(path, False) for path, fuses in made.opened.items()}
        return found

    def apply(self, module: Any) -> None:
        """Give an attached module its class."""
        original, runs, name = type(module), self.forwards, self.name
        required, optional = arguments_of(original.forward)
        alone = self.options.mode == "infer"  # folded weights are of this module's own

        @constant_result
        def select(training: bool) -> int:
            return self._select()

        def forward(self: Any, *args: Any, **kwargs: Any) -> Any:
            at = select(self.training)
            inputs = bind(required, optional, args, kwargs)
            if (
                at < 0
                or inputs is None
                or torch.jit._trace.is_tracing()
                or (alone and _is_replica(self))
            ):
                return original.forward(self, *args, **kwargs)
            if torch.compiler.is_compiling():
                if not runs[at].holds(self):
                    return original.forward(self, *args, **kwargs)
                return runs[at].run(self, *inputs)
            try:  # not while compiling: dynamo cannot go on behind a graph break within it
                return runs[at].run(self, *inputs)
            except (TypeError, ValueError, RuntimeError) as error:
                blame.raise_again(error, blame.named(error, runs[at], self, name))

        _give_class(module, self, forward)

    def recipe(self) -> tuple[Any, ...]:
        """Return what makes an equal conversion."""
        return type(self), self.name, self.options, self.leaves

    def current(self) -> FusedForward | None:
        """Return what runs with the flags as they are, None where the forward runs as written."""
        at = self._select(warn=False)
        return None if at < 0 else self.forwards[at]

    def why_not(self) -> str:
        """Say why the forward runs as written with the flags as they are."""
        changed = self.changed()
        if changed is not None:
            return f"changed since it was converted: {changed}"
        return f"its forward does not trace: {self._without[self._flags()]}"

    def words(self) -> str:
        """Return what a print says: the pattern that runs as one call, or how many there are."""
        at = self._known()  # a print traces nothing
        if at is None:
            return "traced when called by itself"
        if at < 0 or self.forwards[at].guard.changed() is not None:
            return "not now, see fastcnn.report"
        found = [call.words for call in self.forwards[at].patterns]
        return found[0] if len(found) == 1 else f"{len(found)} calls" if found else "nothing now"

    def changed(self) -> str | None:
        """Say what has changed since the conversion, if anything."""
        return next(filter(None, (made.guard.changed() for made in self.forwards)), None)

    def holds(self) -> bool:
        """Whether nothing has changed since the conversion."""
        return self.changed() is None

    def _select(self, warn: bool = True) -> int:
        at = self._find()
        why = None if at < 0 else self.forwards[at].guard.changed()
        if why is None:
            return at
        if warn and why not in self._warned:
            self._warned.add(why)
            where = self.name or "the model"
            warnings.warn(
                f"fastcnn.convert: {where} has changed since it was converted ({why}): it runs as "
                f"written, its children by themselves; convert it again",
                stacklevel=3,
            )
        return -1

    def _find(self, layers: Layers | None = None) -> int:
        """Return the place of what runs with the flags as they are, made where it is not there."""
        at = self._known()
        if at is None:
            with tracing:  # meanwhile other threads see the modules' original classes
                at = self._known()
                at = self._made(Layers() if layers is None else layers) if at is None else at
        return at

    def _known(self) -> int | None:
        """Return it if it is known, -1 where there is none."""
        for at, made in enumerate(self.forwards):
            if all(m.training == flag for m, flag in made.flags):
                return at
        return -1 if self._flags() in self._without else None

    def _made(self, layers: Layers) -> int:
        try:
            self._add(layers)
        except Untraceable as error:
            self._without[self._flags()] = str(error)
            return -1
        return len(self.forwards) - 1

    def _flags(self) -> tuple[bool, ...]:
        return tuple([m.training for m in self._containers])

    def _add(self, layers: Layers) -> None:
        module = self._module()
        try:
            leaves = {module.get_submodule(path) for path in self.leaves}
        except AttributeError as error:  # a child that is gone
            raise Untraceable(str(error)) from error
        with as_original(list(module.modules())):
            made = trace_and_fuse(module, leaves, self.options, self.name, layers)
        self.forwards.append(made)


class LayerConversion:
    """A layer by itself: its own class runs its kernel."""

    def __init__(self, name: str, options: Options) -> None:
        self.name, self.options = name, options
        self._layer: Layer | None = None

    def attach(self, module: nn.Module, layers: Layers) -> bool:
        """Make a layer's conversion; says whether there is a kernel for it."""
        self._layer = layers[module]
        return self._layer.stands_alone and layers.why_not_alone(module) is None

    def holds(self) -> bool:
        """Whether nothing has changed since the conversion."""
        return True

    def words(self) -> str:
        """Return what a print says: the layer's kind."""
        assert self._layer is not None
        return str(self._layer.kind)

    def apply(self, module: Any) -> None:
        """Give a layer its class."""
        original, name, options = type(module), self.name, self.options
        required, optional = arguments_of(original.forward)
        assert self._layer is not None
        run = runtime.layer_call(module, self._layer)

        def call(self: Any, x: Tensor) -> Any:
            fits = runtime.layer_unfit(self, x, options) is None
            return run(x, self) if fits else original.forward(self, x)

        def forward(self: Any, *args: Any, **kwargs: Any) -> Any:
            inputs = bind(required, optional, args, kwargs)
            if inputs is None or torch.jit._trace.is_tracing():
                return original.forward(self, *args, **kwargs)
            if torch.compiler.is_compiling():
                return call(self, inputs[0])
            try:
                return call(self, inputs[0])
            except (TypeError, ValueError, RuntimeError) as error:
                blame.raise_again(error, blame.named_layer(error, self, name, inputs[0]))

        _give_class(module, self, forward)

    def recipe(self) -> tuple[Any, ...]:
        """Return what makes an equal conversion."""
        return type(self), self.name, self.options


class Converted:
    """Marks the classes that convert makes, each with a conversion of its own."""

    _fastcnn_conversion: Any
    _fastcnn_class: type[nn.Module]

    def __init_subclass__(cls, **_: Any) -> None:
        """Keep the classes made here from the registries that original classes may have."""

    def extra_repr(self) -> str:
        """Return what the original class says, and what runs fused."""
        said = self._fastcnn_class.extra_repr(self)  # type: ignore[arg-type]
        separator = "\n" if "\n" in said else ", "
        return f"{said}{separator if said else ''}fused: {self._fastcnn_conversion.words()}"

    def __copy__(self) -> Any:
        with as_original([self]):
            copied = copy.copy(self)
        convert_copy(self._fastcnn_conversion.recipe(), copied)
        return copied

    def __deepcopy__(self, memo: dict[int, Any]) -> Any:
        with as_original([self]):
            copied = copy.deepcopy(self, memo)
        convert_copy(self._fastcnn_conversion.recipe(), copied)
        return copied

    def __reduce_ex__(self, protocol: Any) -> Any:
        recipe = self._fastcnn_conversion.recipe()
        with as_original([self]):
            make, arguments, *rest = self.__reduce_ex__(protocol)
        state = rest[0] if rest and rest[0] is not None else {}
        if make is getattr(copyreg, "__newobj__"):  # noqa: B009 # pickle asks that it be of the object's own class
            make = _new
        return make, arguments, state, None, None, functools.partial(_restore, recipe)


# By the classes that others have derived from converted modules' classes: the same of the original.
_derived: WeakKeyDictionary[type, type] = WeakKeyDictionary()


def original_class(module: Any) -> type:
    """Return the class that a converted module would have now if it had not been converted.

    It is the original one, or where a parametrization has derived a class since, the same of that.
    """
    cls = type(module)
    if "_fastcnn_class" in cls.__dict__:
        return module._fastcnn_class
    if cls not in _derived:
        _derived[cls] = type(cls.__name__, (module._fastcnn_class,), dict(cls.__dict__))
    return _derived[cls]


@contextmanager
def as_original(modules: Sequence[Any]) -> Iterator[None]:
    """Give modules their original classes for a while."""
    changed: list[Any] = [(m, type(m)) for m in modules if isinstance(m, Converted)]
    for module, _ in changed:
        module.__class__ = original_class(module)
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
    convert_copy(recipe, module)


def convert_copy(recipe: Any, module: Any) -> None:
    """Convert a copy as its original was, as far as that can be done with what it is."""
    make, *arguments = recipe
    conversion = make(*arguments)
    if conversion.attach(module, Layers()):
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


def bind(
    required: list[str], optional: dict[str, Any], args: Any, kwargs: dict[str, Any]
) -> list[Any] | None:
    """Return the tensors for a fused forward's arguments, None where the call is not of that kind.

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
