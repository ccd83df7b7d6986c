"""GoogLeNet (Szegedy et al. 2014, arXiv 1409.4842), with batch norm and torchvision's keys."""

from typing import Any, NamedTuple

import torch
import torch.nn.functional as F
from torch import Tensor, nn

from fastcnn.models.inception import BasicConv2d, init_truncated, input_transform
from fastcnn.models.network import Network
from fastcnn.models.registry import register

__all__ = ["GoogLeNet", "GoogLeNetOutputs", "googlenet"]


class GoogLeNetOutputs(NamedTuple):
    """What training gives: logits (n, num_classes) three times."""

    logits: Tensor
    aux_logits2: Tensor
    aux_logits1: Tensor


class Inception(nn.Module):
    """1x1; 3x3; 3x3 once more; maximum, side by side: c1 + c3 + c5 + pool channels.

    `r3` and `r5` are the channels of the 1x1 convolutions before. The paper's 5x5 is a 3x3 in
    torchvision's weights.
    """

    def __init__(self, c_in: int, c1: int, r3: int, c3: int, r5: int, c5: int, pool: int) -> None:
        super().__init__()
        self.branch1 = BasicConv2d(c_in, c1, kernel_size=1)
        self.branch2 = nn.Sequential(
            BasicConv2d(c_in, r3, kernel_size=1), BasicConv2d(r3, c3, kernel_size=3, padding=1)
        )
        self.branch3 = nn.Sequential(
            BasicConv2d(c_in, r5, kernel_size=1), BasicConv2d(r5, c5, kernel_size=3, padding=1)
        )
        self.branch4 = nn.Sequential(
            nn.MaxPool2d(kernel_size=3, stride=1, padding=1, ceil_mode=True),
            BasicConv2d(c_in, pool, kernel_size=1),
        )

    def forward(self, x: Tensor) -> Tensor:
        return torch.cat([self.branch1(x), self.branch2(x), self.branch3(x), self.branch4(x)], 1)


class InceptionAux(nn.Module):
    """A classifier on 14x14 maps, for training."""

    def __init__(self, c_in: int, num_classes: int, dropout: float) -> None:
        super().__init__()
        self.conv = BasicConv2d(c_in, 128, kernel_size=1)
        self.fc1 = nn.Linear(2048, 1024)
        self.fc2 = nn.Linear(1024, num_classes)
        self.dropout = nn.Dropout(dropout)

    def forward(self, x: Tensor) -> Tensor:
        x = self.conv(F.adaptive_avg_pool2d(x, (4, 4))).flatten(1)
        logits: Tensor = self.fc2(self.dropout(F.relu(self.fc1(x), inplace=True)))
        return logits


class GoogLeNet(Network):
    """Stem to 1/8, nine blocks at 1/8, 1/16, 1/32, mean, dropout, linear.

    x (n, in_chans, h, w), h and w at least 15 -> logits (n, num_classes); in training with
    `aux_logits` GoogLeNetOutputs. `transform_input` takes images with ImageNet's normalisation, for
    weights that want [-1, 1]. As torchvision.models.GoogLeNet: the same keys, and from the same
    seed the same initial weights.

    Raises:
        ValueError: transform_input where in_chans is not 3.
    """

    heads = ("fc", "aux1.fc2", "aux2.fc2")
    auxiliary = ("aux1", "aux2")

    def __init__(
        self,
        num_classes: int = 1000,
        aux_logits: bool = True,
        transform_input: bool = False,
        *,
        init_weights: bool = True,
        dropout: float = 0.2,
        dropout_aux: float = 0.7,
        in_chans: int = 3,
    ) -> None:
        super().__init__()
        self.aux_logits = aux_logits
        self.transform = input_transform(transform_input, in_chans)
        self.conv1 = BasicConv2d(in_chans, 64, kernel_size=7, stride=2, padding=3)
        self.maxpool1 = nn.MaxPool2d(3, stride=2, ceil_mode=True)
        self.conv2 = BasicConv2d(64, 64, kernel_size=1)
        self.conv3 = BasicConv2d(64, 192, kernel_size=3, padding=1)
        self.maxpool2 = nn.MaxPool2d(3, stride=2, ceil_mode=True)
        self.inception3a = Inception(192, 64, 96, 128, 16, 32, 32)
        self.inception3b = Inception(256, 128, 128, 192, 32, 96, 64)
        self.maxpool3 = nn.MaxPool2d(3, stride=2, ceil_mode=True)
        self.inception4a = Inception(480, 192, 96, 208, 16, 48, 64)
        self.inception4b = Inception(512, 160, 112, 224, 24, 64, 64)
        self.inception4c = Inception(512, 128, 128, 256, 24, 64, 64)
        self.inception4d = Inception(512, 112, 144, 288, 32, 64, 64)
        self.inception4e = Inception(528, 256, 160, 320, 32, 128, 128)
        self.maxpool4 = nn.MaxPool2d(2, stride=2, ceil_mode=True)
        self.inception5a = Inception(832, 256, 160, 320, 32, 128, 128)
        self.inception5b = Inception(832, 384, 192, 384, 48, 128, 128)
        self.aux1 = InceptionAux(512, num_classes, dropout_aux) if aux_logits else None
        self.aux2 = InceptionAux(528, num_classes, dropout_aux) if aux_logits else None
        self.avgpool = nn.AdaptiveAvgPool2d((1, 1))
        self.dropout = nn.Dropout(dropout)
        self.fc = nn.Linear(1024, num_classes)
        if init_weights:
            init_truncated(self, std=0.01)
        self.feature_info = [
            {"num_chs": 64, "reduction": 2, "module": "conv1"},
            {"num_chs": 192, "reduction": 4, "module": "conv3"},
            {"num_chs": 480, "reduction": 8, "module": "inception3b"},
            {"num_chs": 832, "reduction": 16, "module": "inception4e"},
            {"num_chs": 1024, "reduction": 32, "module": "inception5b"},
        ]

    def forward(self, x: Tensor) -> Tensor | GoogLeNetOutputs:
        x = self.maxpool1(self.conv1(self.transform(x)))
        x = self.maxpool2(self.conv3(self.conv2(x)))
        x = self.maxpool3(self.inception3b(self.inception3a(x)))
        x = self.inception4a(x)
        aux1 = self.aux1(x) if self.training and self.aux1 is not None else None
        x = self.inception4d(self.inception4c(self.inception4b(x)))
        aux2 = self.aux2(x) if self.training and self.aux2 is not None else None
        x = self.maxpool4(self.inception4e(x))
        x = self.inception5b(self.inception5a(x))
        logits: Tensor = self.fc(self.dropout(self.avgpool(x).flatten(1)))
        if aux1 is None or aux2 is None:
            return logits
        return GoogLeNetOutputs(logits, aux2, aux1)


@register
def googlenet(**options: Any) -> GoogLeNet:
    """GoogLeNet, 13.0M parameters, 6.6M without aux_logits.

    `options` are GoogLeNet's arguments, weights= and init=.
    torchvision's own weights want transform_input=True and ImageNet's normalisation, or images in
    [-1, 1]; their auxiliary classifiers are not trained.
    """
    return GoogLeNet(**options)
