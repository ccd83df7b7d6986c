"""What convert knows: the layers and functions that its patterns are made of.

A module counts as what its class says, exactly: a subclass may compute anything. The exceptions are
classes of torchvision and timm that are one of torch's layers in another spelling, known by name,
since neither package needs to be there.
"""

from typing import Any

import torch
import torch.nn.functional as F
from torch import fx, nn

from fastcnn.nn.conv_bn_act import differs

_KINDS: dict[type[nn.Module], str] = {
    nn.Conv2d: "conv",
    nn.BatchNorm2d: "batch_norm",
    nn.SyncBatchNorm: "batch_norm",
    nn.GroupNorm: "group_norm",
    nn.InstanceNorm2d: "instance_norm",
    nn.Dropout: "dropout",
    nn.Dropout2d: "dropout",
    nn.Upsample: "upsample",
    nn.UpsamplingBilinear2d: "upsample",
    nn.UpsamplingNearest2d: "upsample",
    nn.MaxPool2d: "max_pool",
    nn.Identity: "identity",
    **dict.fromkeys(
        (nn.ReLU, nn.ReLU6, nn.LeakyReLU, nn.SiLU, nn.GELU, nn.Sigmoid, nn.Hardswish), "act"
    ),
}
# By package and name.
_ELSEWHERE = {
    ("torchvision", "FrozenBatchNorm2d"): "batch_norm",
    ("torchvision", "LayerNorm2d"): "layer_norm_2d",
    ("timm", "LayerNorm2d"): "layer_norm_2d",
    ("timm", "BatchNormAct2d"): "batch_norm",
    ("timm", "GroupNormAct"): "group_norm",
    ("timm", "LayerNormAct2d"): "layer_norm_2d",
}
NORMS = ("batch_norm", "group_norm", "instance_norm", "layer_norm_2d")

_SLOPE = 0.01  # of the "leaky_relu" that the kernels have, and torch's default
_ACTS: dict[type[nn.Module], str] = {
    nn.ReLU: "relu", nn.ReLU6: "relu6", nn.SiLU: "silu", nn.Sigmoid: "sigmoid",
    nn.Hardswish: "hardswish",
}  # fmt: skip
_ACT_FUNCTIONS: dict[Any, str] = {
    F.relu: "relu", F.relu_: "relu", torch.relu: "relu", torch.relu_: "relu",
    F.relu6: "relu6", F.silu: "silu", F.gelu: "gelu", F.hardswish: "hardswish",
    F.sigmoid: "sigmoid", torch.sigmoid: "sigmoid", F.leaky_relu: "leaky_relu",
    "relu": "relu", "relu_": "relu", "sigmoid": "sigmoid", "sigmoid_": "sigmoid",
}  # fmt: skip


def class_of(module: nn.Module) -> type[nn.Module]:
    """Return a module's class, the original one of a converted module."""
    return getattr(type(module), "_fastcnn_class", type(module))


def kind_of(module: nn.Module) -> str | None:
    """Return what a module is, or None where convert does not know its class."""
    cls = class_of(module)
    kind = _KINDS.get(cls)
    if kind is not None:
        return kind
    if cls.__name__.startswith("Parametrized") and hasattr(module, "parametrizations"):
        return _KINDS.get(cls.__bases__[0])
    return _ELSEWHERE.get((cls.__module__.split(".")[0], cls.__name__))


def act_of_module(module: nn.Module) -> str | None:
    """Return the name of an activation module's kernel, "none" for nn.Identity."""
    if isinstance(module, nn.Identity):
        return "none"
    if type(module) is nn.LeakyReLU:
        return "leaky_relu" if module.negative_slope == _SLOPE else None
    if type(module) is nn.GELU:
        return "gelu" if module.approximate == "none" else None
    return _ACTS.get(type(module))


def own_act(norm: nn.Module) -> str | None:
    """Return the activation inside a norm layer, "none" for torch's own; None: no kernel for it."""
    inside = [getattr(norm, name, None) for name in ("drop", "act")]
    drop, act = (m if isinstance(m, nn.Module) else nn.Identity() for m in inside)
    if type(drop) is not nn.Identity or changes(drop) or changes(act):
        return None
    return act_of_module(act)


def changes(module: nn.Module) -> str | None:
    """Say what makes a module do something else than its class, if anything."""
    cls = class_of(module)
    if cls.__name__.startswith("Parametrized") and hasattr(module, "parametrizations"):
        cls = cls.__bases__[0]
    return differs(module, cls)


def called(node: fx.Node, modules: dict[str, nn.Module]) -> nn.Module | None:
    """Return the module that a node calls, if it is one."""
    return modules[str(node.target)] if node.op == "call_module" else None


def act_of_node(node: fx.Node, modules: dict[str, nn.Module]) -> str | None:
    """Return the name of the activation that a node applies to its only input, if it does."""
    module = called(node, modules)
    if module is not None:
        if kind_of(module) != "act" or changes(module):
            return None
        return act_of_module(module)
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
