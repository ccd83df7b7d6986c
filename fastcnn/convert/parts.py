"""What convert makes of each module of a model: decided once, for rewriting, report and strict.

`decide` finds it out and changes nothing, `apply` gives the modules their classes. Of a model that
is converted, `parts_of` reads the same record from what it holds.
"""

from collections.abc import Iterator, Sequence
from typing import NamedTuple

from torch import fx, nn

from fastcnn.convert.converted import (
    Conversion,
    Converted,
    LayerConversion,
    as_original,
    left_alone,
    untraceable,
)
from fastcnn.convert.graph.describe import Left
from fastcnn.convert.graph.guards import has_hooks
from fastcnn.convert.graph.layers import Layer, Layers
from fastcnn.convert.graph.trace import Untraceable, without_gc
from fastcnn.convert.options import Options


class Part(NamedTuple):
    """One module.

    why: the reason for which it is not converted, if there is one. left: what its trace holds of
    convertible calls, where none of them is fused. in_infer: whether mode="infer" would fuse more.
    """

    layer: Layer
    conversion: Conversion | LayerConversion | None
    why: str | None
    left: Sequence[Left] = ()
    in_infer: bool = False


Parts = dict[nn.Module, Part]


def decide(model: nn.Module, options: Options) -> Parts:
    """Return what convert makes of each module.

    Parents first: a trace holds all that the modules it opens do, and tells which of them have
    something to fuse by themselves, for whoever calls those alone; they are traced when that
    happens. Only below a forward that does not trace each module is traced at once. Layers come
    last: those of a traced forward keep their class, which other tools may ask for.
    """
    with as_original(list(model.modules())), without_gc():
        return _Decision(model, options).parts


def apply(parts: Parts) -> None:
    """Give each converted module its class."""
    for module, part in parts.items():
        if not part.layer.leaf:
            untraceable.pop(module, None)
            left_alone.pop(module, None)
            if part.why is not None:
                untraceable[module] = part.why
            if part.left or part.in_infer:
                left_alone[module] = part.left, part.in_infer
        if part.conversion is not None:
            part.conversion.apply(module)


def parts_of(model: nn.Module) -> Parts:
    """Return the parts of a model as it is: nothing of it is fused that was not converted."""
    layers = Layers()
    return {module: _as_it_is(module, layers) for module in model.modules()}


def _as_it_is(module: nn.Module, layers: Layers) -> Part:
    layer = layers[module]
    if isinstance(module, Converted):
        made = module._fastcnn_conversion
        return Part(layer, made, None, in_infer=isinstance(made, Conversion) and made.in_infer())
    alone = layer.leaf and layer.stands_alone
    why = layers.why_not_alone(module) if alone else untraceable.get(module)
    return Part(layer, None, why, *left_alone.get(module, ((), False)))


class _Decision:
    """The parts of a model, each module once."""

    def __init__(self, model: nn.Module, options: Options) -> None:
        self.parts: Parts = {}
        self._options, self._layers = options, Layers()
        self._names = {module: name for name, module in model.named_modules()}
        self._seen: set[nn.Module] = set()
        self._traced: set[nn.Module] = set()  # all of a forward that has a trace
        self._add(model)
        for module, part in self.parts.items():
            if part.layer.leaf and module not in self._traced:
                self.parts[module] = self._alone(module)

    def _add(self, module: nn.Module, within_layer: bool = False) -> None:
        """Decide on a module and all below it; of a layer, its activation is its own."""
        if module in self._seen:
            return
        self._seen.add(module)
        within_layer = within_layer or self._layers[module].leaf
        if within_layer or not self._opens(module):
            self.parts[module] = Part(self._layers[module], None, None)
        elif module not in self.parts:
            self._trace(module)
        for child in module.children():
            self._add(child, within_layer)

    def _alone(self, module: nn.Module) -> Part:
        layer = self._layers[module]
        if not layer.stands_alone:
            return Part(layer, None, None)
        conversion = LayerConversion(self._names[module], self._options)
        try:
            conversion.attach(module, self._layers)
        except Untraceable as error:
            return Part(layer, None, str(error))
        return Part(layer, conversion, None)

    def _trace(self, module: nn.Module) -> None:
        """Fuse a module's forward; without a pattern or a trace it stays as it is.

        Where a trace fails, what it failed in is called and not opened, and the rest traced again.
        """
        below = {path: m for path, m in module.named_modules() if path and self._opens(m)}
        conversion, why = None, None
        closed = {path for path, m in below.items() if has_hooks(m) or _is_compiled_again(m)}
        while True:
            leaves = closed
            made = Conversion(self._names[module], self._options, sorted(leaves))
            try:
                made.prepare(module, self._layers)
                conversion, why = made, None
            except Untraceable as error:
                why, closed = str(error), leaves | self._to_close(module, below, error.at)
                if closed == leaves:
                    closed = leaves | self._to_close(module, below, None)
            if conversion is not None or closed == leaves:
                break
        layer = self._layers[module]
        if conversion is None:
            self.parts[module] = Part(layer, None, why)
            return
        fuses = conversion.fuses()
        left = () if fuses else conversion.forwards[0].left
        in_infer = conversion.in_infer()
        self.parts[module] = Part(layer, conversion if fuses else None, None, left, in_infer)
        called = {below[path] for path in leaves}
        self._traced |= set(_within(module, called))
        opened = conversion.opened()
        holding: dict[str, bool] = {}  # by path: whether anything opened there or below is fused
        for path, fuses in opened.items():
            while path:
                holding[path] = holding.get(path, False) or fuses
                path = path.rpartition(".")[0]
        for path, m in below.items():
            # A Sequential only calls its children, as whoever goes through them instead.
            covered = path in opened or type(m).forward is nn.Sequential.forward
            if covered and path in holding and m not in self.parts:
                self.parts[m] = self._when_called(m, called, holding[path])

    def _to_close(
        self, module: nn.Module, below: dict[str, nn.Module], at: nn.Module | None
    ) -> set[str]:
        """Return the paths of what a trace failed in, and of its kind, that do not trace alone.

        at: the innermost module that was open; where that is not known, or the module itself, all
        below may be to blame.
        """
        of_kind = {p: m for p, m in below.items() if at in (None, module) or type(m) is type(at)}
        for m in of_kind.values():
            self._add(m)
        return {p for p, m in of_kind.items() if m is at or self.parts[m].why is not None}

    def _when_called(self, module: nn.Module, called: set[nn.Module], fuses: bool) -> Part:
        """Return the part of a module that a trace has opened: traced itself when it is called."""
        layer = self._layers[module]
        if not fuses:
            return Part(layer, None, None)
        leaves = [path for path, m in module.named_modules() if path and m in called]
        conversion = Conversion(self._names[module], self._options, sorted(leaves))
        try:
            conversion.attach(module, self._layers)
        except Untraceable as error:
            return Part(layer, None, str(error))
        return Part(layer, conversion, None)

    def _opens(self, module: nn.Module) -> bool:
        """Whether a module has a forward that may become part of a trace."""
        own = "forward" in module.__dict__ or type(module).forward is not nn.Module.forward
        return own and not self._layers[module].leaf


def _within(module: nn.Module, called: set[nn.Module]) -> Iterator[nn.Module]:
    """Yield what a module's trace may run: all below it but for what it calls."""
    for child in module.children():
        if child not in called:
            yield child
            yield from _within(child, called)


def _is_compiled_again(module: nn.Module) -> bool:
    """Whether a module's class gets another forward time and again, as torch.fx's recompile()."""
    return isinstance(module, fx.GraphModule)
