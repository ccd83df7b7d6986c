"""DenseNet (Huang et al. 2016, arXiv 1608.06993) with torchvision's names and keys."""

import re
from collections import OrderedDict
from collections.abc import Sequence
from typing import Any

import torch
import torch.nn.functional as F
from torch import Tensor, nn
from torch.utils.checkpoint import checkpoint

from fastcnn.models.network import Network
from fastcnn.models.registry import register

__all__ = ["DenseNet", "densenet121"]


class DenseLayer(nn.Module):
    """y = conv2(relu(norm2(conv1(relu(norm1(x)))))), x the maps of all layers before it.

    x: [(n, c, h, w), ...], c_in channels together -> y (n, growth_rate, h, w). `memory_efficient`
    computes everything up to conv1 once more in backward instead of keeping it.
    """

    def __init__(
        self, c_in: int, growth_rate: int, bn_size: int, drop_rate: float, memory_efficient: bool
    ) -> None:
        super().__init__()
        width = bn_size * growth_rate
        self.norm1 = nn.BatchNorm2d(c_in)
        self.relu1 = nn.ReLU(inplace=True)
        self.conv1 = nn.Conv2d(c_in, width, kernel_size=1, bias=False)
        self.norm2 = nn.BatchNorm2d(width)
        self.relu2 = nn.ReLU(inplace=True)
        self.conv2 = nn.Conv2d(width, growth_rate, kernel_size=3, padding=1, bias=False)
        self.drop_rate = drop_rate
        self.memory_efficient = memory_efficient

    def forward(self, features: list[Tensor]) -> Tensor:
        if self.memory_efficient and any(x.requires_grad for x in features):
            y = checkpoint(self._bottleneck, *features, use_reentrant=False)
        else:
            y = self._bottleneck(*features)
        y = self.conv2(self.relu2(self.norm2(y)))
        return F.dropout(y, self.drop_rate, self.training) if self.drop_rate > 0 else y

    def _bottleneck(self, *features: Tensor) -> Tensor:
        y: Tensor = self.conv1(self.relu1(self.norm1(torch.cat(features, 1))))
        return y


class DenseBlock(nn.ModuleDict):
    """y = cat(x, layer1(x), layer2(x, layer1), ...): c_in + layers * growth_rate channels."""

    def __init__(self, layers: int, c_in: int, growth_rate: int, *options: Any) -> None:
        super().__init__()
        for i in range(layers):
            layer = DenseLayer(c_in + i * growth_rate, growth_rate, *options)
            self.add_module(f"denselayer{i + 1}", layer)

    def forward(self, x: Tensor) -> Tensor:
        features = [x]
        for layer in self.values():
            features.append(layer(features))
        return torch.cat(features, 1)


class DenseNet(Network):
    """Stem to 1/4, four dense blocks with halvings between them, mean, linear.

    x (n, in_chans, h, w), h and w at least 29 -> logits (n, num_classes). `block_config` counts
    the layers of each block. As torchvision.models.DenseNet: the same keys, and from the same seed
    the same initial weights.
    """

    heads = ("classifier",)

    def __init__(
        self,
        growth_rate: int = 32,
        block_config: Sequence[int] = (6, 12, 24, 16),
        num_init_features: int = 64,
        bn_size: int = 4,
        drop_rate: float = 0.0,
        num_classes: int = 1000,
        memory_efficient: bool = False,
        *,
        in_chans: int = 3,
    ) -> None:
        super().__init__()
        channels = num_init_features
        self.features = nn.Sequential(
            OrderedDict(
                conv0=nn.Conv2d(in_chans, channels, 7, stride=2, padding=3, bias=False),
                norm0=nn.BatchNorm2d(channels),
                relu0=nn.ReLU(inplace=True),
                pool0=nn.MaxPool2d(kernel_size=3, stride=2, padding=1),
            )
        )
        self.feature_info = [{"num_chs": channels, "reduction": 2, "module": "features.relu0"}]
        for i, layers in enumerate(block_config, start=1):
            if i > 1:
                self.features.add_module(f"transition{i - 1}", _transition(channels))
                channels //= 2
            options = (bn_size, drop_rate, memory_efficient)
            block = DenseBlock(layers, channels, growth_rate, *options)
            self.features.add_module(f"denseblock{i}", block)
            channels += layers * growth_rate
            name = f"features.denseblock{i}" if i < len(block_config) else "relu"
            self.feature_info.append(
                {"num_chs": channels, "reduction": 2 ** (i + 1), "module": name}
            )
        self.features.add_module("norm5", nn.BatchNorm2d(channels))
        self.relu = nn.ReLU(inplace=True)
        self.classifier = nn.Linear(channels, num_classes)
        for module in self.modules():
            if isinstance(module, nn.Conv2d):
                nn.init.kaiming_normal_(module.weight)  # over fan_in, unlike the other networks
        nn.init.zeros_(self.classifier.bias)

    def forward(self, x: Tensor) -> Tensor:
        x = F.adaptive_avg_pool2d(self.relu(self.features(x)), (1, 1))
        logits: Tensor = self.classifier(x.flatten(1))
        return logits

    @staticmethod
    def rename(key: str) -> str:
        """Torchvision's files are of a time when norm1 was norm.1."""
        return re.sub(r"(denselayer\d+\.(?:norm|conv))\.([12]\.\w+)$", r"\1\2", key)


def _transition(c_in: int) -> nn.Sequential:
    """Half the channels, half the size."""
    return nn.Sequential(
        OrderedDict(
            norm=nn.BatchNorm2d(c_in),
            relu=nn.ReLU(inplace=True),
            conv=nn.Conv2d(c_in, c_in // 2, kernel_size=1, bias=False),
            pool=nn.AvgPool2d(kernel_size=2, stride=2),
        )
    )


@register
def densenet121(**options: Any) -> DenseNet:
    """DenseNet-121, 8.0M parameters; `options` are DenseNet's arguments, weights= and init=."""
    return DenseNet(**options)
