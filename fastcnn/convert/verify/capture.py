"""Runs of a model that keep the values and gradients of places inside it.

A place is where a fused call, or a layer that is called by itself, ends: its value is there in the
unconverted model too. Modules that trace are run by an interpreter of their graphs, as they are
written or fused; where a forward does not trace, hooks stand on the layers that it calls.
"""

from collections.abc import Iterator
from contextlib import contextmanager
from typing import Any, NamedTuple

from torch import Tensor, fx, nn

from fastcnn.convert.codegen.rewrite import layer_called
from fastcnn.convert.converted import Conversion, Converted, bind
from fastcnn.convert.fused_forward import FusedForward
from fastcnn.convert.graph.layers import Layers, class_of
from fastcnn.convert.graph.trace import arguments_of
from fastcnn.convert.rows import child_path, place


class Place(NamedTuple):
    """Where a value is; readers: what takes it next, as far as it is known."""

    name: str
    pattern: str
    readers: tuple[str, ...] = ()


class Map(NamedTuple):
    """What to watch: fused forwards by the paths of their modules, and the layers with hooks."""

    forwards: dict[str, FusedForward]
    layers: list[str]
    places: dict[str, Place]  # by key: a node's name behind its module's path, or a layer's path


class Log:
    """Values and gradients by key, in the order in which they came."""

    def __init__(self) -> None:
        self.values: dict[str, Tensor] = {}
        self.gradients: dict[str, Tensor] = {}

    def keep(self, key: str, value: Any) -> None:
        """Keep a value, and its gradient when it comes."""
        if not isinstance(value, Tensor) or not value.is_floating_point():
            return
        calls = 2
        name = key
        while name in self.values:
            name, calls = f"{key} (call {calls})", calls + 1
        self.values[name] = value.detach().clone()
        if value.requires_grad:
            value.register_hook(lambda dy: self.gradients.__setitem__(name, dy.detach().clone()))


def map_of(model: nn.Module) -> Map:
    """Return what to watch of a converted model in its mode of now."""
    found = Map({}, [], {})
    _chart(model, "", found, set(), Layers())
    return found


def _chart(module: nn.Module, path: str, found: Map, seen: set[nn.Module], layers: Layers) -> None:
    if module in seen:
        return
    seen.add(module)
    conversion = module._fastcnn_conversion if isinstance(module, Converted) else None
    made = conversion.current() if isinstance(conversion, Conversion) else None
    if made is not None:
        found.forwards[path] = made
        found.places.update(_places(module, path, made, layers))
        children = made.children()
    else:
        children = [name for name, _ in module.named_children()]
        for name, child in module.named_children():
            full = child_path(path, name)
            if layers[child].leaf:
                found.places[full] = Place(full, _words(child, layers))
                found.layers.append(full)
    for name in children:
        child = module.get_submodule(name)
        if not layers[child].leaf:
            _chart(child, child_path(path, name), found, seen, layers)


def _words(layer: nn.Module, layers: Layers) -> str:
    return layers[layer].kind or class_of(layer).__name__


def _places(
    module: nn.Module, path: str, made: FusedForward, layers: Layers
) -> Iterator[tuple[str, Place]]:
    def title(node: fx.Node) -> str:
        call = made.calls.get(node.name)
        if call is None:
            return child_path(path, layer_called(node) or node.name)
        return place(path, call.where)

    for node in made.fused.nodes:
        call = made.calls.get(node.name)
        readers = tuple(title(user) for user in node.users if user.op != "output")
        if call is not None:
            yield child_path(path, call.last), Place(title(node), call.words, readers)
        elif (called := layer_called(node)) is not None:
            words = _words(module.get_submodule(called), layers)
            yield child_path(path, node.name), Place(title(node), words, readers)


@contextmanager
def watch(model: nn.Module, found: Map, log: Log, fused: bool) -> Iterator[None]:
    """Let a model fill a log when it runs; fused: run the graphs as they are fused."""
    hooks = []
    for path, made in found.forwards.items():
        module: Any = model.get_submodule(path)
        module.forward = _forward(module, path, made, found, log, fused)
    for path in found.layers:
        hook = _kept(log, path)
        hooks.append(model.get_submodule(path).register_forward_hook(hook))
    try:
        yield
    finally:
        for handle in hooks:
            handle.remove()
        for path in found.forwards:
            del model.get_submodule(path).forward


def _kept(log: Log, path: str) -> Any:
    return lambda _module, _inputs, y: log.keep(path, y)


def _forward(
    module: nn.Module, path: str, made: FusedForward, found: Map, log: Log, fused: bool
) -> Any:
    original = class_of(module).forward
    names = arguments_of(original)

    def forward(*args: Any, **kwargs: Any) -> Any:
        inputs = bind(*names, args, kwargs)
        if inputs is None:
            return original(module, *args, **kwargs)
        return _Interpreter(module, path, made, found, log, fused).run(*inputs)

    return forward


class _Interpreter(fx.Interpreter):
    """Runs a module's graph and keeps the values of its places."""

    def __init__(
        self, module: nn.Module, path: str, made: FusedForward, found: Map, log: Log, fused: bool
    ) -> None:
        super().__init__(module, graph=made.fused if fused else made.original)
        self._path, self._places, self._log = path, found.places, log
        self._names = {name: call.last for name, call in made.calls.items()} if fused else {}

    def run_node(self, n: fx.Node) -> Any:
        """Run a node, and keep its value if it is a place's."""
        value = super().run_node(n)
        key = child_path(self._path, self._names.get(n.name, n.name))
        if key in self._places and n.op.startswith("call"):
            self._log.keep(key, value)
        return value
