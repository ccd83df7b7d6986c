"""VGG (Simonyan and Zisserman 2014, arXiv 1409.1556) with torchvision's names and keys."""

from collections.abc import Sequence
from typing import Any

from torch import Tensor, nn

from fastcnn.models.init import init_conv_bn
from fastcnn.models.network import Feature, Network
from fastcnn.models.registry import register

__all__ = [
    "VGG",
    "make_layers",
    "vgg11",
    "vgg11_bn",
    "vgg13",
    "vgg13_bn",
    "vgg16",
    "vgg16_bn",
    "vgg19",
    "vgg19_bn",
]

_CHANNELS = (64, 128, 256, 512, 512)
# How many 3x3 convolutions stand before each of the five poolings.
_CONVOLUTIONS = {11: (1, 1, 2, 2, 2), 13: (2, 2, 2, 2, 2), 16: (2, 2, 3, 3, 3), 19: (2, 2, 4, 4, 4)}

_TIMM = {
    "pre_logits.fc1": "classifier.0",
    "pre_logits.fc2": "classifier.3",
    "head.fc": "classifier.6",
}


def make_layers(
    convolutions: Sequence[int], batch_norm: bool = False, in_chans: int = 3
) -> nn.Sequential:
    """Five times: so many of [conv 3x3, (batch norm,) ReLU], then a pooling by 2."""
    layers: list[nn.Module] = []
    c_in = in_chans
    for c_out, count in zip(_CHANNELS, convolutions, strict=True):
        for _ in range(count):
            layers.append(nn.Conv2d(c_in, c_out, kernel_size=3, padding=1))
            if batch_norm:
                layers.append(nn.BatchNorm2d(c_out))
            layers.append(nn.ReLU(inplace=True))
            c_in = c_out
        layers.append(nn.MaxPool2d(kernel_size=2, stride=2))
    return nn.Sequential(*layers)


class VGG(Network):
    """`features` (see make_layers), mean over a 7x7 grid, three linear layers.

    x (n, in_chans, h, w), h and w at least 32 -> logits (n, num_classes). As
    torchvision.models.VGG: the same keys, and from the same seed the same initial weights.
    """

    heads = ("classifier.6",)

    def __init__(
        self,
        features: nn.Sequential,
        num_classes: int = 1000,
        init_weights: bool = True,
        dropout: float = 0.5,
    ) -> None:
        super().__init__()
        self.features = features
        self.avgpool = nn.AdaptiveAvgPool2d((7, 7))
        self.classifier = nn.Sequential(
            nn.Linear(512 * 7 * 7, 4096),
            nn.ReLU(inplace=True),
            nn.Dropout(dropout),
            nn.Linear(4096, 4096),
            nn.ReLU(inplace=True),
            nn.Dropout(dropout),
            nn.Linear(4096, num_classes),
        )
        if init_weights:
            init_conv_bn(self)
            for layer in self.classifier:
                if isinstance(layer, nn.Linear):
                    nn.init.normal_(layer.weight, std=0.01)
                    nn.init.zeros_(layer.bias)
        self.feature_info = _maps(features)

    def forward(self, x: Tensor) -> Tensor:
        x = self.avgpool(self.features(x))
        logits: Tensor = self.classifier(x.flatten(1))
        return logits

    @staticmethod
    def rename(key: str) -> str:
        """Timm's linear layers are convolutions with names of their own."""
        layer, _, leaf = key.rpartition(".")
        return f"{_TIMM.get(layer, layer)}.{leaf}"


def _maps(features: nn.Sequential) -> list[Feature]:
    """What goes into each pooling, and what comes out of the last."""
    maps: list[Feature] = []
    channels = 0
    for i, layer in enumerate(features):
        if isinstance(layer, nn.Conv2d):
            channels = layer.out_channels
        elif isinstance(layer, nn.MaxPool2d):
            before = f"features.{i - 1}"
            maps.append({"num_chs": channels, "reduction": 2 ** len(maps), "module": before})
    last = f"features.{len(features) - 1}"
    return [*maps, {"num_chs": channels, "reduction": 2 ** len(maps), "module": last}]


def _vgg(depth: int, batch_norm: bool, in_chans: int = 3, **options: Any) -> VGG:
    return VGG(make_layers(_CONVOLUTIONS[depth], batch_norm, in_chans), **options)


@register
def vgg11(**options: Any) -> VGG:
    """VGG-11, 132.9M parameters; `options` are VGG's arguments, in_chans, weights= and init=."""
    return _vgg(11, False, **options)


@register
def vgg11_bn(**options: Any) -> VGG:
    """VGG-11 with batch norm, 132.9M parameters; `options` as vgg11's."""
    return _vgg(11, True, **options)


@register
def vgg13(**options: Any) -> VGG:
    """VGG-13, 133.0M parameters; `options` as vgg11's."""
    return _vgg(13, False, **options)


@register
def vgg13_bn(**options: Any) -> VGG:
    """VGG-13 with batch norm, 133.1M parameters; `options` as vgg11's."""
    return _vgg(13, True, **options)


@register
def vgg16(**options: Any) -> VGG:
    """VGG-16, 138.4M parameters; `options` as vgg11's."""
    return _vgg(16, False, **options)


@register
def vgg16_bn(**options: Any) -> VGG:
    """VGG-16 with batch norm, 138.4M parameters; `options` as vgg11's."""
    return _vgg(16, True, **options)


@register
def vgg19(**options: Any) -> VGG:
    """VGG-19, 143.7M parameters; `options` as vgg11's."""
    return _vgg(19, False, **options)


@register
def vgg19_bn(**options: Any) -> VGG:
    """VGG-19 with batch norm, 143.7M parameters; `options` as vgg11's."""
    return _vgg(19, True, **options)
