"""convert and revert: which modules of a model get a class of their own."""

from typing import Literal, TypeVar

from torch import nn

from fastcnn.convert.converted import Conversion, Converted, LayerConversion, untraceable
from fastcnn.convert.guards import has_hooks
from fastcnn.convert.layers import NORMS, changes, kind_of, own_act
from fastcnn.convert.runtime import Options
from fastcnn.convert.trace import Untraceable, is_leaf
from fastcnn.ops.conv_bn_act_step import Memory

Model = TypeVar("Model", bound=nn.Module)
Mode = Literal["train", "infer"]
Backend = Literal["auto", "cpu", "cuda"]


def convert(
    model: Model,
    mode: Mode = "train",
    backend: Backend = "auto",
    strict: bool = False,
    memory: Memory = "default",
) -> Model:
    """Convert a model."""
    options = Options(backend, memory)
    revert(model)
    conversions: list[tuple[nn.Module, Conversion | LayerConversion]] = []
    opaque: set[nn.Module] = set()
    names = {module: name for name, module in model.named_modules()}
    for module in reversed(names):
        if is_leaf(module):
            if _is_convertible_layer(module):
                conversions.append((module, LayerConversion(options)))
        elif not isinstance(module, (nn.ModuleList, nn.ModuleDict)):
            conversion = _conversion(module, names[module], options, opaque)
            if conversion is not None:
                conversions.append((module, conversion))
            if has_hooks(module):
                opaque.add(module)
    for module, conversion in conversions:
        conversion.apply(module)
    return model


def _conversion(
    module: nn.Module, name: str, options: Options, opaque: set[nn.Module]
) -> Conversion | None:
    """Return a module's plans, None where it has no pattern; note it where it has no trace."""
    below = [(path, m) for path, m in module.named_modules() if m is not module and m in opaque]
    hooked = [path for path, m in below if has_hooks(m)]
    attempts = [hooked] if len(hooked) == len(below) else [hooked, [path for path, _ in below]]
    for leaves in attempts:
        conversion = Conversion(name, options, leaves)
        try:
            return conversion if conversion.prepare(module) else None
        except Untraceable as error:
            reason = str(error)
    untraceable[module] = reason
    opaque.add(module)
    return None


def _is_convertible_layer(module: nn.Module) -> bool:
    kind = kind_of(module)
    if changes(module) is not None:
        return False
    if kind == "upsample":
        return module.mode in ("nearest", "bilinear", "nearest-exact")
    return kind == "dropout" or (kind in NORMS and own_act(module) is not None)


def revert(model: Model) -> Model:
    """Give every module of a model its own class back: bit for bit what it was."""
    for module in model.modules():
        if isinstance(module, Converted):
            module.__class__ = module.original_class
    return model
