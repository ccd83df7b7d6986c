"""Names and builders: create_model, list_models, and the one way a network is put together.

Networks are written in plain PyTorch; what fused kernels run of them, `fastcnn.convert` finds.
"""

import fnmatch
import functools
import re
from collections.abc import Callable, Sequence
from typing import Any, TypeVar

from fastcnn.convert.api import convert_built
from fastcnn.models.checkpoint import WEIGHTS, PathLike
from fastcnn.models.init import initialise
from fastcnn.models.network import Features, Network
from fastcnn.models.weights import load_weights
from fastcnn.ops.conv_bn_act.step import Memory, check_memory

__all__ = ["architecture", "create_model", "list_models", "register"]

Model = TypeVar("Model", bound=Network)

_ARCHITECTURES: dict[str, Callable[..., Network]] = {}


def register(layers: Callable[..., Model]) -> Callable[..., Model]:
    """Make a function that puts layers together a builder, with create_model's other arguments."""

    @functools.wraps(layers)
    def builder(
        *unnamed: Any,
        weights: PathLike | None = None,
        weights_backbone: PathLike | None = None,
        init: str | None = None,
        memory: Memory = "auto",
        **options: Any,
    ) -> Model:
        if unnamed:  # torchvision's pretrained came first
            raise TypeError(
                f"{layers.__name__}: expected arguments by name, got {unnamed[0]!r}; {WEIGHTS}"
            )
        check_memory(layers.__name__, memory)  # before the weights are drawn
        _check_options(options)
        return _build(layers(**options), options, weights, weights_backbone, init, memory)

    _ARCHITECTURES[layers.__name__] = layers
    return builder


def create_model(
    name: str,
    num_classes: int | None = None,
    in_chans: int | None = None,
    features_only: bool = False,
    out_indices: int | Sequence[int] | None = None,
    *,
    weights: PathLike | None = None,
    weights_backbone: PathLike | None = None,
    init: str | None = None,
    memory: Memory = "auto",
    **options: Any,
) -> Network:
    """Build the network `name`, see list_models, and convert it, see fastcnn.convert.

    Args:
        name: of list_models.
        num_classes: outputs of the classifier; None for the architecture's.
        in_chans: channels of the images x [n, in_chans, h, w]; None for the architecture's.
        features_only: whether to return fastcnn.models.Features, which gives feature maps.
        out_indices: which of them; a number for the last so many, None for all.
        weights: a local .pth or .safetensors of torchvision's, timm's or this package's network,
            see load_weights; where num_classes or in_chans are given, a checkpoint with others is
            adapted.
        weights_backbone: the same for the ResNet inside fcn_* and unet_resnet*.
        init: "kaiming", "xavier", "normal" or "zeros"; None is torchvision's.
        memory: fastcnn.convert's.
        **options: the architecture's.

    Returns:
        The network, in training mode.

    Raises:
        TypeError: an option that the architecture does not have, as pretrained.
        ValueError: an unknown name, init or memory; num_classes or in_chans below 1; out_indices
            without features_only or out of range; features_only of a network without feature maps;
            a checkpoint that does not fit.

    Example:
        >>> model = fastcnn.create_model("resnet20", num_classes=7, in_chans=1)
        >>> model(torch.randn(2, 1, 32, 32)).shape
        torch.Size([2, 7])
    """
    if num_classes is not None:
        options["num_classes"] = num_classes
    if in_chans is not None:
        options["in_chans"] = in_chans
    check_memory(name, memory)
    if out_indices is not None and not features_only:
        raise ValueError(f"out_indices: expected None without features_only, got {out_indices}")
    model = architecture(name, **options)
    if features_only:
        model = Features(model, out_indices)
    return _build(model, options, weights, weights_backbone, init, memory)


def architecture(name: str, **options: Any) -> Network:
    """Return the layers of the network `name` alone: for networks that are made of it."""
    if not isinstance(name, str):
        raise TypeError(f"create_model: name: expected a str, got {type(name).__name__}")
    if name not in _ARCHITECTURES:
        stem = name.split("_")[0].rstrip("0123456789").lower()
        close = list_models(f"*{stem}*") or list_models()
        raise ValueError(f"create_model: name: expected one of {', '.join(close)}, got {name!r}")
    _check_options(options)
    return _ARCHITECTURES[name](**options)


def list_models(filter: str | Sequence[str] = "") -> list[str]:
    """Return the names that create_model knows.

    Args:
        filter: a pattern as fnmatch has them, "resnet*", or several, of which any fits.

    Returns:
        The names, numbers in them by size.

    Example:
        >>> fastcnn.list_models(["resnet1*", "plain2*"])
        ['plain20', 'resnet18', 'resnet101', 'resnet110', 'resnet152']
    """
    several = isinstance(filter, Sequence) and all(isinstance(one, str) for one in filter)
    if not several:
        got = type(filter).__name__
        raise TypeError(f"list_models: filter: expected a str or several, got {got}")
    patterns = [filter] if isinstance(filter, str) else filter
    names = {n for p in patterns for n in fnmatch.filter(_ARCHITECTURES, p or "*")}
    # resnet18 before resnet101: digits by value.
    return sorted(names, key=lambda n: [(s, int(d or -1)) for s, d in re.findall(r"(\D*)(\d*)", n)])


def _check_options(options: dict[str, Any]) -> None:
    if "pretrained" in options:
        raise TypeError(
            f"pretrained: expected no such argument, got {options['pretrained']!r}; {WEIGHTS}"
        )
    for name in ("num_classes", "in_chans"):
        count = options.get(name, 1)
        if isinstance(count, bool):  # timm's create_model(name, pretrained)
            raise TypeError(f"{name}: expected an integer above 0, got {count}; {WEIGHTS}")
        if not isinstance(count, int) or count < 1:
            raise ValueError(f"{name}: expected an integer above 0, got {count!r}")


def _build(
    model: Model,
    options: dict[str, Any],
    weights: PathLike | None,
    weights_backbone: PathLike | None,
    init: str | None,
    memory: Memory,
) -> Model:
    """Everything behind the layers: initial weights, then loaded ones, conversion."""
    in_chans, num_classes = "in_chans" in options, "num_classes" in options
    if init is not None:
        initialise(model, init)
    if weights_backbone is not None:
        if not model.backbone_name:
            raise ValueError(f"weights_backbone: {type(model).__name__} has no backbone")
        backbone = model.get_submodule(model.backbone_name)
        load_weights(backbone, weights_backbone, adapt_in_chans=in_chans)
    if weights is not None:
        load_weights(model, weights, adapt_in_chans=in_chans, adapt_num_classes=num_classes)
    return convert_built(model, memory)
