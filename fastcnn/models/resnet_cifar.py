"""ResNet for small images, with and without shortcuts (He et al. 2015, section 4.2).

depth = 6n + 2: a 3x3 stem, three stages of n blocks of two 3x3 convolutions, mean, linear.

    stage      stem   layer1  layer2  layer3
    channels   16     16      32      64
    size       h      h       h / 2   h / 4

Shortcuts are the paper's option A: subsample and pad with zero channels; they have no parameters.
"""

from typing import Any

import torch.nn.functional as F
from torch import Tensor, nn

from fastcnn.models.init import init_conv_bn
from fastcnn.models.network import Network
from fastcnn.models.registry import register

__all__ = [
    "CifarBlock",
    "CifarResNet",
    "plain20",
    "plain32",
    "plain44",
    "plain56",
    "plain110",
    "resnet20",
    "resnet32",
    "resnet44",
    "resnet56",
    "resnet110",
]


class CifarBlock(nn.Module):
    """y = relu(bn2(conv2(relu(bn1(conv1(x))))) + residual), without residual if not `shortcut`.

    x (n, c_in, h, w) -> y (n, c_out, ceil(h / stride), ceil(w / stride)); residual is
    x[:, :, ::stride, ::stride] followed by c_out - c_in channels of zeros.
    """

    def __init__(self, c_in: int, c_out: int, stride: int = 1, shortcut: bool = True) -> None:
        super().__init__()
        self.conv1 = nn.Conv2d(c_in, c_out, 3, stride=stride, padding=1, bias=False)
        self.bn1 = nn.BatchNorm2d(c_out)
        self.relu = nn.ReLU(inplace=True)
        self.conv2 = nn.Conv2d(c_out, c_out, 3, padding=1, bias=False)
        self.bn2 = nn.BatchNorm2d(c_out)
        self.stride = stride
        self.new_channels = c_out - c_in
        self.shortcut = shortcut

    def residual(self, x: Tensor) -> Tensor:
        """Return what the shortcut adds to the last convolution."""
        if self.stride == 1 and self.new_channels == 0:
            return x
        # Pooling with a 1x1 window subsamples and, unlike a slice with steps, keeps x's layout.
        subsampled = F.avg_pool2d(x, kernel_size=1, stride=self.stride)
        # F.pad counts from the last dimension: none for w and h, new channels after c.
        return F.pad(subsampled, (0, 0, 0, 0, 0, self.new_channels))

    def forward(self, x: Tensor) -> Tensor:
        y = self.relu(self.bn1(self.conv1(x)))
        y = self.bn2(self.conv2(y))
        if self.shortcut:
            y += self.residual(x)
        return self.relu(y)


class CifarResNet(Network):
    """The paper's network of `depth` layers with weights; a plain network if not `shortcut`.

    x (n, in_chans, h, w) -> logits (n, num_classes). Source: He et al. 2015, arXiv 1512.03385,
    section 4.2.

    Raises:
        ValueError: depth is not 6n + 2 with n >= 1.
    """

    def __init__(
        self, depth: int, shortcut: bool = True, num_classes: int = 10, in_chans: int = 3
    ) -> None:
        super().__init__()
        blocks, rest = divmod(depth - 2, 6)
        if blocks < 1 or rest:
            raise ValueError(f"depth: expected 6n + 2 with n >= 1 (8, 14, 20, ...), got {depth}")
        self.conv1 = nn.Conv2d(in_chans, 16, 3, padding=1, bias=False)
        self.bn1 = nn.BatchNorm2d(16)
        self.relu = nn.ReLU(inplace=True)
        self.layer1 = _stage(16, 16, 1, blocks, shortcut)
        self.layer2 = _stage(16, 32, 2, blocks, shortcut)
        self.layer3 = _stage(32, 64, 2, blocks, shortcut)
        self.fc = nn.Linear(64, num_classes)
        init_conv_bn(self)
        self.feature_info = [
            {"num_chs": 16, "reduction": 1, "module": "layer1"},
            {"num_chs": 32, "reduction": 2, "module": "layer2"},
            {"num_chs": 64, "reduction": 4, "module": "layer3"},
        ]

    def forward(self, x: Tensor) -> Tensor:
        x = self.relu(self.bn1(self.conv1(x)))
        x = self.layer3(self.layer2(self.layer1(x)))
        logits: Tensor = self.fc(x.mean((2, 3)))
        return logits


def _stage(c_in: int, c_out: int, stride: int, blocks: int, shortcut: bool) -> nn.Sequential:
    first = CifarBlock(c_in, c_out, stride, shortcut)
    return nn.Sequential(first, *(CifarBlock(c_out, c_out, 1, shortcut) for _ in range(1, blocks)))


@register
def resnet20(**options: Any) -> CifarResNet:
    """ResNet-20, 0.27M parameters; the paper's test error on CIFAR-10 is 8.75 %."""
    return CifarResNet(20, True, **options)


@register
def resnet32(**options: Any) -> CifarResNet:
    """ResNet-32, 0.46M parameters; the paper's test error on CIFAR-10 is 7.51 %."""
    return CifarResNet(32, True, **options)


@register
def resnet44(**options: Any) -> CifarResNet:
    """ResNet-44, 0.66M parameters; the paper's test error on CIFAR-10 is 7.17 %."""
    return CifarResNet(44, True, **options)


@register
def resnet56(**options: Any) -> CifarResNet:
    """ResNet-56, 0.85M parameters; the paper's test error on CIFAR-10 is 6.97 %."""
    return CifarResNet(56, True, **options)


@register
def resnet110(**options: Any) -> CifarResNet:
    """ResNet-110, 1.7M parameters; the paper's test error on CIFAR-10 is 6.43 % (best of 5)."""
    return CifarResNet(110, True, **options)


@register
def plain20(**options: Any) -> CifarResNet:
    """resnet20 without its shortcuts."""
    return CifarResNet(20, False, **options)


@register
def plain32(**options: Any) -> CifarResNet:
    """resnet32 without its shortcuts."""
    return CifarResNet(32, False, **options)


@register
def plain44(**options: Any) -> CifarResNet:
    """resnet44 without its shortcuts."""
    return CifarResNet(44, False, **options)


@register
def plain56(**options: Any) -> CifarResNet:
    """resnet56 without its shortcuts."""
    return CifarResNet(56, False, **options)


@register
def plain110(**options: Any) -> CifarResNet:
    """resnet110 without its shortcuts."""
    return CifarResNet(110, False, **options)
