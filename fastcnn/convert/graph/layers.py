"""What convert knows: the layers and functions that its patterns are made of.

A module counts as what its class says. A subclass may compute anything, and counts only where it
adds nothing to what its layer does. Classes of torchvision and timm that are one of torch's layers
in another spelling are known by name, since neither package needs to be there.
"""

from typing import Any, NamedTuple

import torch
import torch.nn.functional as F
from torch import fx, nn

from fastcnn.common.conv_geometry import padding_of
from fastcnn.nn.conv_bn_act import differs

_KINDS: dict[type[nn.Module], str] = {
    nn.Conv2d: "conv",
    nn.BatchNorm2d: "batch_norm",
    nn.SyncBatchNorm: "batch_norm",
    nn.GroupNorm: "group_norm",
    nn.InstanceNorm2d: "instance_norm",
    nn.LayerNorm: "layer_norm",  # known, without a kernel
    nn.Linear: "linear",
    nn.Dropout: "dropout",
    nn.Dropout2d: "dropout",
    nn.Upsample: "upsample",
    nn.UpsamplingBilinear2d: "upsample",
    nn.UpsamplingNearest2d: "upsample",
    nn.MaxPool2d: "max_pool",
    nn.AdaptiveAvgPool2d: "adaptive_pool",
    nn.Hardsigmoid: "hardsigmoid",
    nn.Identity: "identity",
    **dict.fromkeys(
        (nn.ReLU, nn.ReLU6, nn.LeakyReLU, nn.SiLU, nn.GELU, nn.Sigmoid, nn.Hardswish), "act"
    ),
}
# By package and name.
_ELSEWHERE = {
    ("torchvision", "FrozenBatchNorm2d"): "batch_norm",
    ("torchvision", "LayerNorm2d"): "layer_norm_2d",
    ("timm", "LayerNorm"): "layer_norm",
    ("timm", "LayerNorm2d"): "layer_norm_2d",
    ("timm", "BatchNormAct2d"): "batch_norm",
    ("timm", "SyncBatchNormAct"): "batch_norm",
    ("timm", "GroupNormAct"): "group_norm",
    ("timm", "LayerNormAct2d"): "layer_norm_2d",
}
NORMS = ("batch_norm", "group_norm", "instance_norm", "layer_norm_2d")
DEPTHWISE = "depthwise_conv2d"  # the kind of an nn.Conv2d that has a filter a channel
CONVS = ("conv", DEPTHWISE)

_SLOPE = 0.01  # of the "leaky_relu" that the kernels have, and torch's default
_ACTS: dict[type[nn.Module], str] = {
    nn.ReLU: "relu",
    nn.ReLU6: "relu6",
    nn.SiLU: "silu",
    nn.Sigmoid: "sigmoid",
    nn.Hardswish: "hardswish",
}
_ACT_FUNCTIONS: dict[Any, str] = {
    F.relu: "relu", F.relu_: "relu", torch.relu: "relu", torch.relu_: "relu",
    F.relu6: "relu6", F.silu: "silu", F.gelu: "gelu", F.hardswish: "hardswish",
    F.sigmoid: "sigmoid", torch.sigmoid: "sigmoid", F.leaky_relu: "leaky_relu",
    "relu": "relu", "relu_": "relu", "sigmoid": "sigmoid", "sigmoid_": "sigmoid",
}  # fmt: skip
_CONTAINERS = (
    nn.Sequential,
    nn.ModuleList,
    nn.ModuleDict,
    nn.DataParallel,
    nn.parallel.DistributedDataParallel,
)
# What a subclass may have of its own, and still compute what its layer does.
_HARMLESS = {
    *vars(type("Empty", (nn.Module,), {"__annotations__": {}})),
    "__init__", "__repr__", "extra_repr", "reset_parameters", "train", "__constants__", "_version",
    "_save_to_state_dict", "_load_from_state_dict", "__orig_bases__", "__parameters__",
    "__firstlineno__", "__static_attributes__", "__abstractmethods__", "_abc_impl",
}  # fmt: skip
_READ = {"weight", "bias", "running_mean", "running_var", "num_batches_tracked", "training"}
RESIZES = ("nearest", "bilinear", "nearest-exact")


class Layer(NamedTuple):
    """What a module is: asked once, of each module of a model.

    kind: its class's, None where convert does not know it. act: of an activation and inside a norm,
    the name of its kernel, "none" where there is none inside, None for one without a kernel.
    differs: what makes the module do something else than its class. leaf: called and not opened.
    parametrized: its class is one that a parametrization has made.
    """

    kind: str | None
    act: str | None
    differs: str | None
    leaf: bool
    parametrized: bool

    @property
    def stands_alone(self) -> bool:
        """Whether there is a kernel for layers of this kind by themselves."""
        return self.kind in (*NORMS, DEPTHWISE, "dropout", "upsample")


class Layers(dict[nn.Module, Layer]):
    """The layer that each module is, found out at the first question."""

    def __missing__(self, module: nn.Module) -> Layer:
        self[module] = layer = _classify(module)
        return layer

    def why_not_alone(self, module: Any) -> str | None:
        """Say why there is no kernel for a layer by itself, None where there is one."""
        layer = self[module]
        if not layer.stands_alone:
            return "there is no kernel for it by itself"
        if layer.differs is not None:
            return f"it has {layer.differs}"
        if layer.kind == "upsample" and module.mode not in RESIZES:
            return f"there is no kernel for mode={module.mode!r}"
        if layer.kind in CONVS and (why := padding_without_kernel(module)) is not None:
            return f"it has {why}"
        if layer.kind in NORMS and layer.act is None:
            return "the activation inside it has no kernel"
        # The parametrization's class comes and goes, and ours would be beside it.
        return "it has a parametrization" if layer.parametrized else None


def _classify(module: nn.Module) -> Layer:
    cls, parametrized = class_of(module), "parametrizations" in module._modules
    if cls.__name__.startswith("Parametrized") and parametrized:
        cls = cls.__bases__[0]
    cls = _layer_class(cls)
    kind, act = _kind_of(cls), None
    if kind == "dropout" and module.p == 0:
        kind, act = "identity", "none"  # it returns its input itself
    elif kind == "conv" and _is_depthwise(module):
        kind, act = DEPTHWISE, "none"
    elif kind in ("act", "identity"):
        act = _act_of_module(module, cls)
    elif kind in NORMS:
        act = act_inside(module)
    return Layer(kind, act, differs(module, cls), _is_leaf(module, cls, kind), parametrized)


def _is_depthwise(conv: Any) -> bool:
    return bool(1 < conv.groups == conv.in_channels == conv.out_channels)


def padding_without_kernel(conv: Any) -> str | None:
    """Say what of a convolution's padding the kernels lack, if so."""
    if conv.padding_mode != "zeros":
        return f"padding_mode={conv.padding_mode!r}"
    if padding_of(conv) is None:
        return f"padding={conv.padding!r} with an even kernel, which pads one side more"
    return None


def _kind_of(cls: type[nn.Module]) -> str | None:
    return _KINDS.get(cls) or _ELSEWHERE.get((cls.__module__.split(".")[0], cls.__name__))


def _layer_class(cls: type[nn.Module]) -> type[nn.Module]:
    """Return the class of a layer that is known, of what adds nothing to it; else the class."""
    known = next((k for k in cls.__mro__ if _kind_of(k) is not None), None)
    if known is None:
        return cls
    read = {*_READ, *getattr(known, "__constants__", ())}
    for k in cls.__mro__[: cls.__mro__.index(known)]:
        for name in vars(k).keys() - _HARMLESS:
            if name in read or hasattr(known, name):
                return cls
    return known


def _is_leaf(module: nn.Module, cls: type[nn.Module], kind: str | None) -> bool:
    """Whether a module is one of the layers that are called and not opened."""
    if isinstance(module, torch.jit.ScriptModule):
        return True
    inside = cls.__module__.split(".")[:2]
    ours = inside in (["torch", "nn"], ["fastcnn", "nn"]) or kind is not None
    return ours and not isinstance(module, _CONTAINERS)


def class_of(module: nn.Module) -> type[nn.Module]:
    """Return a module's class, the original one of a converted module."""
    return getattr(type(module), "_fastcnn_class", type(module))


def _act_of_module(module: Any, cls: type[nn.Module]) -> str | None:
    """Return the name of the kernel of an activation of a class, "none" for nn.Identity."""
    if cls is nn.Identity:
        return "none"
    if cls is nn.LeakyReLU:
        return "leaky_relu" if module.negative_slope == _SLOPE else None
    if cls is nn.GELU:
        return "gelu" if module.approximate == "none" else None
    return _ACTS.get(cls)


def act_inside(norm: nn.Module) -> str | None:
    """Return the activation inside a norm layer, "none" for torch's own; None: no kernel for it."""
    inside = [getattr(norm, name, None) for name in ("drop", "act")]
    drop, act = (m if isinstance(m, nn.Module) else nn.Identity() for m in inside)
    if type(drop) is not nn.Identity or differs(drop, type(drop)) or differs(act, class_of(act)):
        return None
    return _act_of_module(act, _layer_class(class_of(act)))


def called(node: fx.Node, modules: dict[str, nn.Module]) -> nn.Module | None:
    """Return the module that a node calls, if it is one."""
    return modules[str(node.target)] if node.op == "call_module" else None


def act_of_function(node: fx.Node) -> str | None:
    """Return the name of the activation that a function or method applies to its only input."""
    name = _ACT_FUNCTIONS.get(node.target)
    options = {**dict(zip(("1", "2"), node.args[1:], strict=False)), **node.kwargs}
    options.pop("input", None)
    options.pop("inplace", None)
    if name == "leaky_relu":
        slope = options.pop("negative_slope", options.pop("1", _SLOPE))
        options.pop("2", None)
        return name if slope == _SLOPE and not options else None
    if name == "gelu":
        return name if options.pop("approximate", "none") == "none" and not options else None
    if name is not None and set(options) <= {"1"} and isinstance(options.get("1", True), bool):
        return name
    return None
