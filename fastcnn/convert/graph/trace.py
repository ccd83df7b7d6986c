"""Tracing of a module's forward, strictly: what a trace would bake in unseen is refused.

torch.fx runs forward once with proxies in place of tensors and records what they meet. Whatever
Python does beside that happens once, in the trace, and never again: a context manager is lost, a
random number or a computed tensor becomes a constant, a counter stays where it is. Such a forward
is `Untraceable`, with the reason; it keeps running as it is written, and its children are converted
by themselves.

What Python may read is its arguments' defaults and the modules' attributes and flags: `reads.py`
notes them, and `guards.py` compares them at every call.
"""

import builtins
import gc
import inspect
import operator
import os
import sys
import threading
import traceback
import weakref
from collections.abc import Callable, Iterator
from contextlib import contextmanager, suppress
from typing import Any, NamedTuple
from unittest.mock import patch

import torch
from torch import Tensor, fx, nn
from torch.overrides import TorchFunctionMode

from fastcnn.convert.graph.layers import Layers
from fastcnn.convert.graph.reads import Reads, recorded
from fastcnn.convert.graph.side_effects import Snapshot
from fastcnn.nn.conv_bn_act import own_method

# Of a parameter or buffer: all that cannot change without the module changing.
_FIXED = {"shape", "ndim", "layout"}  # not dtype and device, which .to() changes
_FIXED_METHODS = {"_assert", "size", "dim", "numel", "ndimension"}
# Their own names are refused while a trace is made.
_is_inference, _is_autocast = torch.is_inference_mode_enabled, torch.is_autocast_enabled
_real_isinstance = isinstance
# While one thread traces, torch.fx's patches and ours are seen by all of them.
tracing = threading.RLock()


class Untraceable(Exception):
    """The forward cannot be replaced by a trace of it; the text says why.

    at: the innermost module that was open, where it is the forward of one that fails.
    """

    def __init__(self, why: str, at: nn.Module | None = None) -> None:
        super().__init__(why)
        self.at = at


def arguments_of(forward: Callable[..., Any]) -> tuple[list[str], dict[str, Any]]:
    """Return the names of a method's arguments without a default, self apart, and the others'.

    Raises:
        Untraceable: it takes any number of them.
    """
    required: list[str] = []
    optional: dict[str, Any] = {}
    for parameter in list(inspect.signature(forward).parameters.values())[1:]:
        if parameter.kind in (parameter.VAR_POSITIONAL, parameter.VAR_KEYWORD):
            raise Untraceable(f"forward takes *{parameter.name}")
        if parameter.default is parameter.empty:
            required.append(parameter.name)
        else:
            optional[parameter.name] = parameter.default
    return required, optional


def tensors_of(forward: Callable[..., Any]) -> list[str]:
    """Return the names of the arguments that a trace has tensors for: those without a default.

    Raises:
        Untraceable: there are none, or any number of them.
    """
    required, _ = arguments_of(forward)
    if not required:
        raise Untraceable("forward has no arguments")
    return required


def check_class_runs(module: nn.Module) -> None:
    """Check that a module runs its class's forward.

    Raises:
        Untraceable: it has one of its own, which its class, and so ours, does not know.
    """
    if own_method(module, "forward") is not None:
        raise Untraceable("has a forward of its own, which its class does not know")


class Traced(NamedTuple):
    """A forward's graph, and what it took from the modules."""

    graph: fx.Graph
    opened: list[nn.Module]  # whose forward is part of it, the module itself first
    reads: Reads


def trace(module: nn.Module, leaves: set[nn.Module], layers: Layers) -> Traced:
    """Return the graph of a module's forward with all arguments that have a default at it.

    leaves: modules that are called, not opened, beside torch's and fastcnn's own layers.

    Raises:
        Untraceable: the forward does what a trace would not repeat.
    """
    check_class_runs(module)
    tracer = _Tracer(module, leaves, layers)
    try:
        with tracing, without_gc():
            return _trace(module, tracer)
    finally:
        tracer.let_go()


def _trace(module: nn.Module, tracer: "_Tracer") -> Traced:
    before = Snapshot(module)
    try:
        with _NoTensorsOfItsOwn(), _no_questions(), recorded() as reads:
            graph = tracer.trace(module)
    except Exception as error:  # whatever somebody's forward raises on meeting a proxy
        lines = str(error).strip().splitlines() or [""]
        kind = "" if isinstance(error, Untraceable) else f"{type(error).__name__}: "
        why = f"{kind}{lines[0]} ({_stopped_at(error, module)})"
        raise Untraceable(why, tracer.failed) from error
    finally:
        changed = before.restore()
    if changed is not None:
        why, owner = changed
        raise Untraceable(f"{why} ({_defined_at(module)})", owner)
    if tracer.keeps():
        raise Untraceable(f"keeps a tensor outside its modules ({_defined_at(module)})")
    return Traced(graph, tracer.opened, reads)


def _stopped_at(error: Exception, module: nn.Module) -> str:
    """Return file and line of the last code before an error that is not ours, torch's or Python's.

    Where none of it ran, those of the module's forward.
    """
    for frame, line in reversed(list(traceback.walk_tb(error.__traceback__))):
        name = frame.f_globals.get("__name__", "")
        package = name.split(".")[0]
        ours = name.startswith("fastcnn.convert.")
        if not ours and package != "torch" and package not in sys.stdlib_module_names:
            return f"{_short(frame.f_code.co_filename)}:{line}"
    return _defined_at(module)


def _defined_at(module: nn.Module) -> str:
    """Return file and line of a module's forward."""
    code = getattr(inspect.unwrap(type(module).forward), "__code__", None)
    if code is None:
        return type(module).__name__
    return f"{_short(code.co_filename)}:{code.co_firstlineno}"


def _short(path: str) -> str:
    """Return a path from the working directory, or from where Python finds its package."""
    roots = sys.path
    with suppress(FileNotFoundError):  # the directory may be gone
        roots = [os.getcwd(), *roots]
    inside = [root for root in roots if root and path.startswith(root + os.sep)]
    return min((os.path.relpath(path, root) for root in inside), key=len, default=path)


def _in_place(target: Any) -> Any:
    def record(self: fx.Proxy, other: Any) -> fx.Proxy:
        return self.tracer.create_proxy("call_function", target, (self, other), {})

    return record


class _Proxy(fx.Proxy):
    """torch.fx's, which would record `a += b` as `a = a + b`: the same for a alone."""

    __iadd__ = _in_place(operator.iadd)
    __isub__ = _in_place(operator.isub)
    __imul__ = _in_place(operator.imul)
    __itruediv__ = _in_place(operator.itruediv)
    __ifloordiv__ = _in_place(operator.ifloordiv)
    __imod__ = _in_place(operator.imod)
    __ipow__ = _in_place(operator.ipow)
    __iand__ = _in_place(operator.iand)
    __ior__ = _in_place(operator.ior)
    __ixor__ = _in_place(operator.ixor)
    __ilshift__ = _in_place(operator.ilshift)
    __irshift__ = _in_place(operator.irshift)


class _TensorProxy(_Proxy):
    """Stands for a tensor, and says so to isinstance: an input, or what a layer returns."""

    stands_for: Any = Tensor


class _ParameterProxy(_TensorProxy):
    """Stands for a parameter."""

    stands_for = nn.Parameter


class _AnyProxy(_Proxy):
    """Stands for anything else, and does not know its type."""


def _isinstance(value: Any, classes: Any) -> bool:
    """What isinstance is while a trace is made.

    A `__class__` of the proxies would answer too, but to PyTorch's C++ as well, which then reads
    the proxy's memory as a tensor's (torch.zeros(x) of a traced x).
    """
    kind = type(value)
    if fx.Proxy not in kind.__mro__:
        return _real_isinstance(value, classes)
    if issubclass(kind, _TensorProxy):
        return _real_isinstance(value, classes) or issubclass(kind.stands_for, classes)
    if not sys._getframe(1).f_globals.get("__name__", "").startswith("torch."):
        raise Untraceable("asks for the type of what an operation returns")
    return _real_isinstance(value, classes)


_OF_MODULES = (
    "root", "opened", "failed", "submodule_paths", "tensor_attrs", "graph", "_leaves", "_layers",
    "_by_path", "_own",
)  # fmt: skip


class _Tracer(fx.Tracer):
    """torch.fx's tracer, with this module's leaves and refusals."""

    proxy_buffer_attributes = True

    def __init__(self, root: nn.Module, leaves: set[nn.Module], layers: Layers) -> None:
        # Not math's functions: wrapping them takes a third of a trace.
        super().__init__(autowrap_modules=())  # type: ignore[arg-type]
        # What classifying a layer asks of it is no read of the forward: all are, before it runs.
        self._leaves = leaves | {m for m in root.modules() if layers[m].leaf}
        self._layers = layers
        self._by_path = dict(root.named_modules(remove_duplicate=False))
        self.opened = [root]
        self.failed = root  # the innermost that an exception has left
        self._thread = threading.get_ident()
        self._proxies: list[weakref.ref[fx.Proxy]] = []
        own = (*root.named_parameters(), *root.named_buffers())
        self._own = {id(t): name for name, t in own}
        self._modes = _modes()

    def let_go(self) -> None:
        """Forget the modules: a tracer is part of cycles, which only a collection ends.

        Other threads may still come through torch.fx's patches, and ask what thread this is of.
        """
        for name in _OF_MODULES:
            vars(self).pop(name, None)

    def is_leaf_module(self, m: nn.Module, module_qualified_name: str) -> bool:
        return m in self._leaves or self._layers[m].leaf

    def keeps(self) -> bool:
        """Whether somebody still has a proxy, when all is traced."""
        if any(ref() is not None for ref in self._proxies):
            gc.collect(0)  # of cycles: all that a trace has made is young, see without_gc
        return any(ref() is not None for ref in self._proxies)

    def getattr(self, attr: str, attr_val: Any, parameter_proxy_cache: dict[str, Any]) -> Any:
        if threading.get_ident() != self._thread or not _real_isinstance(attr_val, Tensor):
            return attr_val
        name = self._own.get(id(attr_val))  # torch.fx would search among all of the root's
        if name is None:
            return attr_val
        if name not in parameter_proxy_cache:
            parameter_proxy_cache[name] = self.create_proxy("get_attr", name, (), {})
        return parameter_proxy_cache[name]

    def call_module(self, m: nn.Module, forward: Any, args: Any, kwargs: Any) -> Any:
        if threading.get_ident() != self._thread:
            return forward(*args, **kwargs)
        if self.is_leaf_module(m, ""):
            return super().call_module(m, forward, args, kwargs)
        if m not in self.opened:
            self.opened.append(m)
        try:
            return super().call_module(m, forward, args, kwargs)
        except Exception:
            if self.failed is self.root:
                self.failed = m
            raise

    def create_args_for_root(
        self, root_fn: Any, is_module: bool, concrete_args: Any = None
    ) -> tuple[Any, list[Any]]:
        names = tensors_of(root_fn)
        proxies = [self.create_proxy("placeholder", name, (), {}) for name in names]
        return root_fn, [self.root, *proxies]

    def proxy(self, node: fx.Node) -> fx.Proxy:
        made = self._proxy(node)
        if node.op != "get_attr":  # which torch.fx keeps
            self._proxies.append(weakref.ref(made))
        return made

    def _proxy(self, node: fx.Node) -> fx.Proxy:
        if node.op == "get_attr":
            owner, _, name = str(node.target).rpartition(".")
            is_parameter = name in self._by_path[owner]._parameters
            return (_ParameterProxy if is_parameter else _TensorProxy)(node, self)
        tensor = node.op == "placeholder"
        if node.op == "call_module":
            tensor = self._layers[self._by_path[str(node.target)]].leaf
        return (_TensorProxy if tensor else _AnyProxy)(node, self)

    def create_arg(self, a: Any) -> Any:
        if issubclass(type(a), fx.Proxy):
            return a.node
        if isinstance(a, Tensor) and id(a) not in self._own:
            raise Untraceable("makes a tensor of its own")
        if isinstance(a, dict) and type(a) is not dict:
            pairs = [[key, value] for key, value in a.items()]
            return self.create_node("call_function", type(a), (self.create_arg(pairs),), {})
        return super().create_arg(a)

    def create_node(self, *args: Any, **kwargs: Any) -> fx.Node:
        if _modes() != self._modes:
            raise Untraceable("computes in a context such as no_grad, autocast or checkpoint")
        return super().create_node(*args, **kwargs)


def _modes() -> tuple[Any, ...]:
    """What context managers around an operation change, and a trace would lose."""
    return (
        torch._C.is_grad_enabled(),
        _is_inference(),
        torch._C._autograd._top_saved_tensors_default_hooks(True) is not None,
        *((_is_autocast(kind), torch.get_autocast_dtype(kind)) for kind in ("cpu", "cuda")),
    )


class _NoTensorsOfItsOwn(TorchFunctionMode):
    """Refuses all computation on tensors that are not proxies: it would not run again."""

    def __torch_function__(
        self, func: Any, types: Any, args: tuple[Any, ...] = (), kwargs: Any = None
    ) -> Any:
        kwargs = kwargs or {}
        if _has_proxy((args, kwargs)):
            return func(*args, **kwargs)
        name = getattr(func, "__name__", str(func))
        if name == "__get__":
            name = getattr(getattr(func, "__self__", None), "__name__", "")
            if name not in _FIXED:
                raise Untraceable(f"reads {name} of a parameter or buffer")
        elif name not in _FIXED_METHODS:
            raise Untraceable(f"computes {name} of parameters, or of no input at all")
        return func(*args, **kwargs)


def _has_proxy(value: Any) -> bool:
    if issubclass(type(value), fx.Proxy):
        return True
    if isinstance(value, (tuple, list)):
        return any(map(_has_proxy, value))
    return isinstance(value, dict) and any(map(_has_proxy, value.values()))


@contextmanager
def without_gc() -> Iterator[None]:
    """Let no garbage be collected, so that all that is made meanwhile stays in the youngest.

    Collecting that takes 5 to 15 ms; the whole process took 0.2 s with timm imported, and each of
    vit_tiny's traces leaves a cycle behind. Of swinv2_small's conversion a third was such a
    collection, for what others had left.
    """
    enabled = gc.isenabled()
    gc.disable()
    try:
        yield
    finally:
        if enabled:
            gc.enable()


@contextmanager
def _no_questions() -> Iterator[None]:
    """Refuse questions about modes that may have another answer at the next call, and prints."""
    thread, why = threading.get_ident(), "asks whether gradients or autocast are on"

    def refusing(function: Callable[..., Any], why: str = why) -> Callable[..., Any]:
        def refuse(*args: Any, **kwargs: Any) -> Any:
            if threading.get_ident() != thread:
                return function(*args, **kwargs)
            raise Untraceable(why)

        return refuse

    with (
        patch.object(torch, "is_grad_enabled", refusing(torch.is_grad_enabled)),
        patch.object(torch, "is_autocast_enabled", refusing(torch.is_autocast_enabled)),
        patch.object(torch, "is_inference_mode_enabled", refusing(_is_inference)),
        patch.object(builtins, "isinstance", _isinstance),
        patch.object(builtins, "print", refusing(print, "prints, which a trace would not repeat")),
    ):
        yield
