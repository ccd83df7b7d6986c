"""Converted modules: a class of its own for each, whose forward runs the fused code.

    type(m)        class Bottleneck(Converted, torchvision's Bottleneck), made for this m alone
    m.__class__    torchvision's Bottleneck, as it was
    m.__dict__     as it was

so that parameters, buffers, names, hooks, flags and isinstance are what they were, and taking the
class away again is a revert to the bit. Copies (deepcopy, pickle, torch.save) are made as of the
original class and converted once more.

Who keeps whom: module, class, `Holder`, conversion, the module's descendants; never the module. A
class is freed by the garbage collector alone, so its holder lets go of the conversion when the
module dies. So `del model` frees all weights at once, as without fastcnn, and a model that somebody
has tied into a cycle is collected as any other.
"""

import copy
import functools
import itertools
import sys
import types
import warnings
import weakref
from collections.abc import Callable, Hashable, Iterator, Sequence
from contextlib import contextmanager
from typing import Any, cast
from weakref import WeakKeyDictionary

import torch
from torch import Tensor, fx, nn

from fastcnn.common.constant_result import constant_result
from fastcnn.convert import blame
from fastcnn.convert.codegen import fit, runtime
from fastcnn.convert.fused_forward import FusedForward, trace_and_fuse
from fastcnn.convert.graph.describe import Left
from fastcnn.convert.graph.guards import Guard
from fastcnn.convert.graph.layers import Layer, Layers
from fastcnn.convert.graph.trace import (
    Untraceable,
    arguments_of,
    check_class_runs,
    tensors_of,
    tracing,
)
from fastcnn.convert.options import Options
from fastcnn.nn.conv_bn_act import own_method

# By module: why its forward is not replaced.
untraceable: WeakKeyDictionary[nn.Module, str] = WeakKeyDictionary()
# And where a trace of it has nothing to fuse: what is convertible in it, and why it is not fused.
# And whether mode="infer" would fuse it.
left_alone: WeakKeyDictionary[nn.Module, tuple[Sequence[Left], bool]] = WeakKeyDictionary()


MOST_FORWARDS = 8  # as many as torch.compile keeps of one function; a resnet50's take 3.5 MB each


class Conversion:
    """One module with children: a fused forward for each of the last sets of training flags.

    Traced by prepare() for the flags as they are, for others, and after attach(), when it is called
    with them. forwards: by number; one that is dropped leaves its number to no other, which
    torch.compile has asked for.
    """

    def __init__(self, name: str, options: Options, leaves: Sequence[str]) -> None:
        self.name, self.options, self.leaves = name, options, tuple(leaves)
        self.forwards: dict[int, FusedForward] = {}
        self._numbers, self._used = itertools.count(), dict[int, int]()  # by number: at which call
        self._calls = itertools.count()
        self._without: dict[tuple[bool, ...], str] = {}  # flags, and why it has no trace with them
        self._warned: set[Hashable] = set()
        self._module: Any = None

    def attach(self, module: nn.Module, _: Layers) -> None:
        """Make a module's conversion, whose forwards are traced when they are called.

        Raises:
            Untraceable: the forward is the module's own, or no trace can have its arguments.
        """
        self._module = weakref.ref(module)
        check_class_runs(module)
        tensors_of(original_class(module).forward)

    def prepare(self, module: nn.Module, layers: Layers) -> None:
        """Fuse for the training flags as they are; for others the first call with them does.

        Only where there is nothing to fuse with these, those of training and of evaluation are
        asked at once: each trace of a resnet50 takes 30 ms, of efficientformerv2_l half a second.

        Raises:
            Untraceable: it does not trace with the flags as they are.
        """
        self._module = weakref.ref(module)
        self._add(layers)
        if not self.fuses():
            for flag in (True, False):
                with _all_training(module, flag):
                    self._find(layers)

    def fuses(self) -> bool:
        """Whether any forward made so far has a pattern."""
        return any(made.patterns for made in self.forwards.values())

    def in_infer(self) -> bool:
        """Whether mode="infer" would fuse convolutions that no forward made so far does."""
        return any(made.in_infer for made in self.forwards.values())

    def opened(self) -> dict[str, bool]:
        """Return the paths of modules that are part of a forward made so far.

        And whether a pattern has a part in them.
        """
        found: dict[str, bool] = {}
        for made in self.forwards.values():
            found |= {path: fuses or found.get(path, False) for path, fuses in made.opened.items()}
        return found

    def apply(self, module: Any) -> None:
        """Give an attached module its class."""
        original, name, holder = original_class(module), self.name, Holder(module, self)
        required, optional = arguments_of(original.forward)
        alone = self.options.mode == "infer"  # folded weights are of this module's own

        @constant_result
        def select(training: bool) -> int:
            conversion = holder.conversion
            return -1 if conversion is None or _is_exporting() else conversion._select()

        def forward(self: Any, *args: Any, **kwargs: Any) -> Any:
            if not issubclass(type(self), made_class):  # a copy, to which deepcopy has bound it
                return type(self).forward(self, *args, **kwargs)
            at = select(self.training)
            inputs = bind(required, optional, args, kwargs)
            if (
                at < 0
                or inputs is None
                or torch.jit._trace.is_tracing()
                or (alone and _is_replica(self))
            ):
                return original.forward(self, *args, **kwargs)
            made = holder.conversion.forwards.get(at)
            if made is None:  # dropped by other threads' calls meanwhile
                return original.forward(self, *args, **kwargs)
            if torch.compiler.is_compiling():
                if not made.holds(self):
                    return original.forward(self, *args, **kwargs)
                return made.run(self, *inputs)
            try:  # not while compiling: dynamo cannot go on behind a graph break within it
                return made.run(self, *inputs)
            except (TypeError, ValueError, RuntimeError) as error:
                blame.raise_again(error, blame.named(error, made, self, name))

        made_class = _give_class(module, holder, forward)

    def recipe(self) -> tuple[Any, ...]:
        """Return what makes an equal conversion."""
        return type(self), self.name, self.options, self.leaves

    def current(self) -> FusedForward | None:
        """Return what runs with the flags as they are, None where the forward runs as written."""
        return self.forwards.get(self._select(warn=False))

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
            return "traced at its next call" if self.forwards else "traced when called by itself"
        made = self.forwards.get(at)
        if made is None or made.guard.changed() is not None:
            return "not now, see fastcnn.report"
        found = [call.words for call in made.patterns]
        return found[0] if len(found) == 1 else f"{len(found)} calls" if found else "nothing now"

    def changed(self) -> str | None:
        """Say what has changed since the conversion, if anything."""
        found = filter(None, (made.guard.changed() for made in tuple(self.forwards.values())))
        return next((why for _, why in found), None)

    def holds(self) -> bool:
        """Whether nothing has changed since the conversion."""
        return self.changed() is None

    def _select(self, warn: bool = True) -> int:
        at = self._find()
        made = self.forwards.get(at)  # there may be none, or another thread has dropped it
        changed = None if made is None else made.guard.changed()
        if changed is None:
            return at
        what, why = changed
        if warn and what not in self._warned:
            self._warned.add(what)
            name = self.name or "the model"
            warnings.warn(
                f"fastcnn.convert: {name} has changed since it was converted ({why}): it runs as "
                f"written, its children by themselves; convert it again",
                stacklevel=fit.caller_level(),
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
        for at, made in tuple(self.forwards.items()):
            if made.is_for_flags():
                self._used[at] = next(self._calls)
                return at
        return -1 if self._without and self._flags() in self._without else None

    def _made(self, layers: Layers) -> int:
        try:
            return self._add(layers)
        except Untraceable as error:
            if len(self._without) == MOST_FORWARDS:
                del self._without[next(iter(self._without))]
            self._without[self._flags()] = str(error)
            return -1

    def _flags(self) -> tuple[bool, ...]:
        return tuple([m.training for m in self._module().modules()])

    def _add(self, layers: Layers) -> int:
        module = self._module()
        try:
            leaves = {module.get_submodule(path) for path in self.leaves}
        except AttributeError as error:  # a child that is gone
            raise Untraceable(str(error)) from error
        with as_original(list(module.modules())):
            made = trace_and_fuse(module, leaves, self.options, self.name, layers)
        changed = made.guard.changed()
        if changed is not None:
            raise Untraceable(f"what it reads is another thing at each call: {changed[1]}")
        if len(self.forwards) == MOST_FORWARDS:
            oldest = min(self.forwards, key=self._used.__getitem__)
            del self.forwards[oldest], self._used[oldest]
        at = next(self._numbers)
        self._used[at] = next(self._calls)
        self.forwards[at] = made
        return at


class LayerConversion:
    """A layer by itself: its own class runs its kernel."""

    def __init__(self, name: str, options: Options) -> None:
        self.name, self.options = name, options
        self._layer: Layer | None = None
        self._guard: Guard | None = None

    def attach(self, module: nn.Module, layers: Layers) -> None:
        """Make a layer's conversion.

        Raises:
            Untraceable: there is no kernel for it.
        """
        self._layer = layers[module]
        why = layers.why_not_alone(module)
        if why is not None:
            raise Untraceable(why)
        self._guard = Guard.of_layer(module, layers)

    def holds(self) -> bool:
        """Whether nothing has changed since the conversion."""
        return self._guard is not None and self._guard.changed() is None

    def words(self) -> str:
        """Return what a print says: the layer's kind."""
        assert self._layer is not None
        return str(self._layer.kind)

    def apply(self, module: Any) -> None:
        """Give a layer its class."""
        original, name, options = original_class(module), self.name, self.options
        required, optional = arguments_of(original.forward)
        assert self._layer is not None
        run, holder = runtime.layer_call(module, self._layer), Holder(module, self)

        @constant_result
        def fuses() -> bool:
            conversion = holder.conversion
            return conversion is not None and not _is_exporting() and conversion.holds()

        def call(self: Any, x: Tensor) -> Any:
            fits = runtime.layer_fits(self, x, options)
            return run(x, self) if fits else original.forward(self, x)

        def forward(self: Any, *args: Any, **kwargs: Any) -> Any:
            if not issubclass(type(self), made_class):  # a copy, to which deepcopy has bound it
                return type(self).forward(self, *args, **kwargs)
            inputs = bind(required, optional, args, kwargs)
            if inputs is None or torch.jit._trace.is_tracing() or not fuses():
                return original.forward(self, *args, **kwargs)
            if torch.compiler.is_compiling():
                return call(self, inputs[0])
            try:
                return call(self, inputs[0])
            except (TypeError, ValueError, RuntimeError) as error:
                blame.raise_again(error, blame.named_layer(error, self, name, inputs[0]))

        made_class = _give_class(module, holder, forward)

    def recipe(self) -> tuple[Any, ...]:
        """Return what makes an equal conversion."""
        return type(self), self.name, self.options


class Converted:
    """Marks the classes that convert makes, one for each module."""

    _fastcnn_class: type[nn.Module]
    _fastcnn_holder: "Holder"

    def _set_class(self, cls: type[nn.Module]) -> None:
        """Give the module another class, as parametrizations derive one, and convert it anew."""
        recipe, holder = self._fastcnn_conversion.recipe(), self._fastcnn_holder
        _set_type(self, cls)
        holder.release()
        convert_copy(recipe, self)

    # What the module was written for: super(self.__class__, self), or a class to derive from.
    __class__ = property(lambda self: self._fastcnn_class, _set_class)

    def __setattr__(self, name: str, value: Any) -> None:
        super().__setattr__(name, value)
        if name == "forward":  # as accelerate's unwrap_model sets it
            self._drop_method_of_class()

    def __delattr__(self, name: str) -> None:
        if name != "forward" or name in self.__dict__:  # else one of its class's was set, see below
            super().__delattr__(name)

    def _drop_method_of_class(self: Any) -> None:
        """Take a forward from the instance that is its class's, and would hide the fused one."""
        if own_method(self, "forward") is None:
            self.__dict__.pop("forward", None)

    def __init_subclass__(cls, **_: Any) -> None:
        """Keep the classes made here from the registries that original classes may have."""

    @property
    def _fastcnn_conversion(self) -> Any:
        return self._fastcnn_holder.conversion

    def extra_repr(self) -> str:
        """Return what the original class says, and what runs fused."""
        said = self._fastcnn_class.extra_repr(self)  # type: ignore[arg-type]
        separator = "\n" if "\n" in said else ", "
        return f"{said}{separator if said else ''}fused: {self._fastcnn_conversion.words()}"

    def __copy__(self) -> Any:
        with tracing, as_original([self]):
            copied = copy.copy(self)
        convert_copy(self._fastcnn_conversion.recipe(), copied)
        return copied

    def __deepcopy__(self, memo: dict[int, Any]) -> Any:
        with tracing, as_original([self]):
            copied = copy.deepcopy(self, memo)
        convert_copy(self._fastcnn_conversion.recipe(), copied)
        return copied

    def __reduce_ex__(self, protocol: Any) -> Any:
        recipe = self._fastcnn_conversion.recipe()
        with tracing, as_original([self]):
            make, arguments, *rest = self.__reduce_ex__(protocol)
        state = rest[0] if rest and rest[0] is not None else {}
        return make, arguments, state, None, None, functools.partial(_restore, recipe)

    def __prepare_scriptable__(self) -> Any:
        """Return what torch.jit.script compiles in place of the module: the module as written."""
        written: Any = object.__new__(original_class(self))
        own = self.__dict__ | {"_modules": dict(self.__dict__["_modules"])}  # script writes there
        written.__dict__.update(own)
        prepare = getattr(written, "__prepare_scriptable__", None)
        return written if prepare is None else prepare()


class _ConvertedGraph(Converted):
    """Of a torch.fx GraphModule, whose recompile() gives its class another forward."""

    def recompile(self) -> Any:
        """Recompile it, and convert what it is then."""
        recipe = self._fastcnn_conversion.recipe()
        discard(self)
        code = self.recompile()
        convert_copy(recipe, self)
        return code


class _MadeClass(type):
    """The class of converted modules' classes, which stand for the original ones."""

    _fastcnn_class: type[nn.Module]

    def __new__(cls, name: str, bases: Any, body: dict[str, Any], **options: Any) -> Any:
        """Derive a class from the original one."""
        originals = tuple(getattr(base, "_fastcnn_class", base) for base in bases)
        return types.new_class(name, originals, options, lambda made: made.update(body))

    def __call__(cls, *args: Any, **kwargs: Any) -> Any:
        """Make another module of the original class, as in type(model)(...)."""
        return cls._fastcnn_class(*args, **kwargs)

    def __instancecheck__(cls, instance: Any) -> bool:
        """Say whether it is of the original class."""
        return isinstance(instance, cls._fastcnn_class)


_set_type: Callable[[Any, type], None] = vars(object)["__class__"].__set__


def original_class(module: Any) -> Any:
    """Return the class that a converted module would have now if it had not been converted."""
    return getattr(type(module), "_fastcnn_class", type(module))


@contextmanager
def as_original(modules: Sequence[Any]) -> Iterator[None]:
    """Give modules their original classes for a while."""
    changed: list[Any] = [(m, type(m)) for m in modules if isinstance(m, Converted)]
    for module, _ in changed:
        _set_type(module, original_class(module))
    try:
        yield
    finally:
        for module, cls in changed:
            _set_type(module, cls)


@contextmanager
def _all_training(module: nn.Module, flag: bool) -> Iterator[None]:
    """Give a module and all below it a training flag, and back those that they had."""
    parts = [m for m in module.modules() if not isinstance(m, torch.jit.ScriptModule)]
    now = [m.training for m in parts]
    try:
        for m in parts:
            m.training = flag
        yield
    finally:
        for m, training in zip(parts, now, strict=True):
            m.training = training


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
    try:
        conversion.attach(module, Layers())
    except Untraceable as error:
        untraceable[module] = str(error)
    else:
        conversion.apply(module)


class Holder:
    """What a converted class has of its module's conversion: nothing, when the module is gone."""

    def __init__(self, module: nn.Module, conversion: Any) -> None:
        self.conversion = conversion
        self._module = weakref.ref(module, self.release)

    def release(self, _: Any = None) -> None:
        """Let go of the conversion."""
        self.conversion = None


def _give_class(module: Any, holder: Holder, forward: Callable[..., Any]) -> type[nn.Module]:
    """Make the class whose forward this is, and give it to a module."""
    original = original_class(module)
    # Code of its own: torch.compile counts how often it compiles one code anew, and gives up.
    code, closure = forward.__code__.replace(), forward.__closure__
    forward = types.FunctionType(code, forward.__globals__, "forward", None, closure)
    body = {
        "_fastcnn_class": original,
        "_fastcnn_holder": holder,
        "forward": functools.wraps(original.forward)(forward),
        "__module__": original.__module__,
        "__qualname__": original.__qualname__,
        "__doc__": original.__doc__,
    }
    marks = _ConvertedGraph if issubclass(original, fx.GraphModule) else Converted
    kind: Any = type(original)
    # Not by the class's own class, which may keep a list of those that it has made.
    made = type.__new__(_made_class(kind), original.__name__, (marks, original), body)
    _set_type(module, made)
    made._drop_method_of_class(module)
    return cast(type[nn.Module], made)


@functools.cache
def _made_class(kind: Hashable) -> Any:
    """Return the class of converted classes whose original ones are of a kind, as ABCMeta."""
    assert isinstance(kind, type)
    return _MadeClass if kind is type else type(kind.__name__, (_MadeClass, kind), {})


def discard(module: Any) -> None:
    """Give a converted module its original class, and free what it has run."""
    holder = module._fastcnn_holder
    _set_type(module, original_class(module))
    holder.release()


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


def _is_exporting() -> bool:
    """Whether torch.onnx.export is at work, which knows PyTorch's operators alone."""
    onnx = sys.modules.get("torch.onnx")
    return onnx is not None and onnx.is_in_onnx_export()


def _is_replica(module: Any) -> bool:
    """Whether nn.DataParallel has made a module for one call."""
    return "_is_replica" in module.__dict__
