"""What convert makes of each module of a model: decided once, for rewriting, report and strict.

`decide` finds it out and changes nothing, `apply` gives the modules their classes. Of a model that
is converted, `parts_of` reads the same record from what it holds.
"""

from typing import NamedTuple

from torch import nn

from fastcnn.convert.converted import (
    Conversion,
    Converted,
    LayerConversion,
    as_original,
    untraceable,
)
from fastcnn.convert.graph.guards import has_hooks
from fastcnn.convert.graph.layers import Layer, Layers
from fastcnn.convert.graph.trace import Untraceable
from fastcnn.convert.options import Options


class Part(NamedTuple):
    """One module; why: the reason for which it is not converted, if there is one."""

    layer: Layer
    conversion: Conversion | LayerConversion | None
    why: str | None


Parts = dict[nn.Module, Part]


def decide(model: nn.Module, options: Options) -> Parts:
    """Return what convert makes of each module, children before parents."""
    layers = Layers()
    parts: Parts = {}
    opaque: set[nn.Module] = set()  # called, not opened, by what is above them
    with as_original(list(model.modules())):
        names = {module: name for name, module in model.named_modules()}
        for module in reversed(names):
            layer = layers[module]
            if layer.leaf:
                parts[module] = _alone(module, layers, options)
            elif isinstance(module, (nn.ModuleList, nn.ModuleDict)):
                parts[module] = Part(layer, None, None)
            else:
                parts[module] = _traced(module, names[module], layers, options, opaque)
                if has_hooks(module):
                    opaque.add(module)
    return parts


def apply(parts: Parts) -> None:
    """Give each converted module its class."""
    for module, part in parts.items():
        if not part.layer.leaf:
            untraceable.pop(module, None)
            if part.why is not None:
                untraceable[module] = part.why
        if part.conversion is not None:
            part.conversion.apply(module)


def parts_of(model: nn.Module) -> Parts:
    """Return the parts of a model as it is: nothing of it is fused that was not converted."""
    layers = Layers()
    return {module: _as_it_is(module, layers) for module in model.modules()}


def _as_it_is(module: nn.Module, layers: Layers) -> Part:
    layer = layers[module]
    if isinstance(module, Converted):
        return Part(layer, module._fastcnn_conversion, None)
    alone = layer.leaf and layer.stands_alone
    return Part(layer, None, layers.why_not_alone(module) if alone else untraceable.get(module))


def _alone(module: nn.Module, layers: Layers, options: Options) -> Part:
    layer, conversion = layers[module], LayerConversion(options)
    if conversion.prepare(module, layers):
        return Part(layer, conversion, None)
    return Part(layer, None, layers.why_not_alone(module) if layer.stands_alone else None)


def _traced(
    module: nn.Module, name: str, layers: Layers, options: Options, opaque: set[nn.Module]
) -> Part:
    """Fuse a module's forward; without a pattern or a trace it stays as it is.

    A child that does not trace by itself, since it is called with a list, may do so from here.
    """
    below = [(path, m) for path, m in module.named_modules() if m is not module and m in opaque]
    hooked = [path for path, m in below if has_hooks(m)]
    attempts = [hooked] if len(hooked) == len(below) else [hooked, [path for path, _ in below]]
    why = ""
    for leaves in attempts:
        conversion = Conversion(name, options, leaves)
        try:
            fuses = conversion.prepare(module, layers)
        except Untraceable as error:
            why = str(error)
        else:
            return Part(layers[module], conversion if fuses else None, None)
    opaque.add(module)
    return Part(layers[module], None, why)
