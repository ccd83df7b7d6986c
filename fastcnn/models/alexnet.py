"""AlexNet (Krizhevsky 2014, "One weird trick", arXiv 1404.5997), torchvision's keys."""

from typing import Any

from torch import Tensor, nn

from fastcnn.models.network import Network
from fastcnn.models.registry import register

__all__ = ["AlexNet", "alexnet"]


class AlexNet(Network):
    """Five convolutions, three poolings, three linear layers.

    x (n, in_chans, h, w), h and w at least 63 -> logits (n, num_classes). As
    torchvision.models.AlexNet: the same keys, and from the same seed the same initial weights.
    """

    heads = ("classifier.6",)

    def __init__(self, num_classes: int = 1000, dropout: float = 0.5, *, in_chans: int = 3) -> None:
        super().__init__()
        self.features = nn.Sequential(
            nn.Conv2d(in_chans, 64, kernel_size=11, stride=4, padding=2),
            nn.ReLU(inplace=True),
            nn.MaxPool2d(kernel_size=3, stride=2),
            nn.Conv2d(64, 192, kernel_size=5, padding=2),
            nn.ReLU(inplace=True),
            nn.MaxPool2d(kernel_size=3, stride=2),
            nn.Conv2d(192, 384, kernel_size=3, padding=1),
            nn.ReLU(inplace=True),
            nn.Conv2d(384, 256, kernel_size=3, padding=1),
            nn.ReLU(inplace=True),
            nn.Conv2d(256, 256, kernel_size=3, padding=1),
            nn.ReLU(inplace=True),
            nn.MaxPool2d(kernel_size=3, stride=2),
        )
        self.avgpool = nn.AdaptiveAvgPool2d((6, 6))
        self.classifier = nn.Sequential(
            nn.Dropout(dropout),
            nn.Linear(256 * 6 * 6, 4096),
            nn.ReLU(inplace=True),
            nn.Dropout(dropout),
            nn.Linear(4096, 4096),
            nn.ReLU(inplace=True),
            nn.Linear(4096, num_classes),
        )
        self.feature_info = [
            {"num_chs": 64, "reduction": 4, "module": "features.1"},
            {"num_chs": 192, "reduction": 8, "module": "features.4"},
            {"num_chs": 256, "reduction": 16, "module": "features.11"},
            {"num_chs": 256, "reduction": 32, "module": "features.12"},
        ]

    def forward(self, x: Tensor) -> Tensor:
        x = self.avgpool(self.features(x))
        logits: Tensor = self.classifier(x.flatten(1))
        return logits


@register
def alexnet(**options: Any) -> AlexNet:
    """AlexNet, 61.1M parameters; `options` are AlexNet's arguments, weights= and init=."""
    return AlexNet(**options)
