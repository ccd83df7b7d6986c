"""ResNet (He et al. 2015, arXiv 1512.03385) and its kin, torchvision's names and state_dict keys.

ResNeXt (Xie et al. 2016, arXiv 1611.05431): the 3x3 convolution in groups. Wide ResNet (Zagoruyko
and Komodakis 2016, arXiv 1605.07146): the 3x3 convolution twice as wide.
"""

from collections.abc import Callable, Sequence
from typing import Any, cast

from torch import Tensor, nn

from fastcnn.models.init import init_conv_bn
from fastcnn.models.network import Network
from fastcnn.models.registry import register

__all__ = [
    "BasicBlock",
    "Bottleneck",
    "ResNet",
    "resnet18",
    "resnet34",
    "resnet50",
    "resnet101",
    "resnet152",
    "resnext50_32x4d",
    "resnext101_32x8d",
    "wide_resnet50_2",
    "wide_resnet101_2",
]

NormLayer = Callable[[int], nn.Module]


def _conv3x3(
    c_in: int, c_out: int, stride: int = 1, groups: int = 1, dilation: int = 1
) -> nn.Conv2d:
    return nn.Conv2d(c_in, c_out, 3, stride, dilation, dilation, groups, bias=False)


def _conv1x1(c_in: int, c_out: int, stride: int = 1) -> nn.Conv2d:
    return nn.Conv2d(c_in, c_out, 1, stride, bias=False)


class BasicBlock(nn.Module):
    """y = relu(bn2(conv2(relu(bn1(conv1(x))))) + shortcut), both convolutions 3x3.

    x (n, inplanes, h, w) -> y (n, planes, ceil(h / stride), ceil(w / stride)); the shortcut is x,
    or `downsample` of x where the shape changes. As torchvision.models.resnet.BasicBlock.

    Raises:
        ValueError: groups, base_width or dilation other than 1, 64, 1.
    """

    expansion = 1

    def __init__(
        self,
        inplanes: int,
        planes: int,
        stride: int = 1,
        downsample: nn.Module | None = None,
        groups: int = 1,
        base_width: int = 64,
        dilation: int = 1,
        norm_layer: NormLayer = nn.BatchNorm2d,
    ) -> None:
        super().__init__()
        if (groups, base_width, dilation) != (1, 64, 1):
            raise ValueError(
                "groups, base_width, dilation: BasicBlock has only 1, 64, 1, "
                f"got {groups}, {base_width}, {dilation}; Bottleneck takes others"
            )
        self.conv1 = _conv3x3(inplanes, planes, stride)
        self.bn1 = norm_layer(planes)
        self.relu = nn.ReLU(inplace=True)
        self.conv2 = _conv3x3(planes, planes)
        self.bn2 = norm_layer(planes)
        self.downsample = downsample

    def forward(self, x: Tensor) -> Tensor:
        y = self.relu(self.bn1(self.conv1(x)))
        y = self.bn2(self.conv2(y))
        y += x if self.downsample is None else self.downsample(x)
        return self.relu(y)


class Bottleneck(nn.Module):
    """y = relu(bn3(conv3(relu(bn2(conv2(relu(bn1(conv1(x)))))))) + shortcut): 1x1, 3x3, 1x1.

    x (n, inplanes, h, w) -> y (n, 4 planes, ceil(h / stride), ceil(w / stride)). The 3x3
    convolution has the stride ("ResNet v1.5"). As torchvision.models.resnet.Bottleneck.
    """

    expansion = 4

    def __init__(
        self,
        inplanes: int,
        planes: int,
        stride: int = 1,
        downsample: nn.Module | None = None,
        groups: int = 1,
        base_width: int = 64,
        dilation: int = 1,
        norm_layer: NormLayer = nn.BatchNorm2d,
    ) -> None:
        super().__init__()
        width = planes * base_width // 64 * groups
        c_out = planes * self.expansion
        self.conv1 = _conv1x1(inplanes, width)
        self.bn1 = norm_layer(width)
        self.conv2 = _conv3x3(width, width, stride, groups, dilation)
        self.bn2 = norm_layer(width)
        self.conv3 = _conv1x1(width, c_out)
        self.bn3 = norm_layer(c_out)
        self.relu = nn.ReLU(inplace=True)
        self.downsample = downsample

    def forward(self, x: Tensor) -> Tensor:
        y = self.relu(self.bn1(self.conv1(x)))
        y = self.relu(self.bn2(self.conv2(y)))
        y = self.bn3(self.conv3(y))
        y += x if self.downsample is None else self.downsample(x)
        return self.relu(y)


class ResNet(Network):
    """Stem, four stages of blocks at 1/4, 1/8, 1/16, 1/32 of the image, mean, linear classifier.

    x (n, in_chans, h, w) -> logits (n, num_classes). `layers` counts the blocks of each stage;
    `replace_stride_with_dilation` keeps stages 2, 3, 4 at their input's resolution where true;
    `zero_init_residual` starts every block as the identity (Goyal et al. 2017, arXiv 1706.02677).
    As torchvision.models.ResNet: the same keys, and from the same seed the same initial weights.

    Raises:
        ValueError: layers or replace_stride_with_dilation of the wrong length.
    """

    def __init__(
        self,
        block: type[BasicBlock] | type[Bottleneck],
        layers: Sequence[int],
        num_classes: int = 1000,
        zero_init_residual: bool = False,
        groups: int = 1,
        width_per_group: int = 64,
        replace_stride_with_dilation: Sequence[bool] | None = None,
        norm_layer: NormLayer | None = None,
        *,
        in_chans: int = 3,
    ) -> None:
        super().__init__()
        dilate = replace_stride_with_dilation
        if dilate is None:
            dilate = (False, False, False)
        if len(layers) != 4:
            raise ValueError(f"layers: expected 4 block counts, one a stage, got {layers}")
        if len(dilate) != 3:
            raise ValueError(
                "replace_stride_with_dilation: expected None or 3 booleans, for layer2, layer3 "
                f"and layer4, got {replace_stride_with_dilation}"
            )
        self.inplanes = 64
        self.dilation = 1
        self.groups = groups
        self.base_width = width_per_group
        norm = norm_layer or nn.BatchNorm2d

        self.conv1 = nn.Conv2d(in_chans, 64, kernel_size=7, stride=2, padding=3, bias=False)
        self.bn1 = norm(64)
        self.relu = nn.ReLU(inplace=True)
        self.maxpool = nn.MaxPool2d(kernel_size=3, stride=2, padding=1)
        self.layer1 = self._stage(block, 64, layers[0], 1, False, norm)
        self.layer2 = self._stage(block, 128, layers[1], 2, dilate[0], norm)
        self.layer3 = self._stage(block, 256, layers[2], 2, dilate[1], norm)
        self.layer4 = self._stage(block, 512, layers[3], 2, dilate[2], norm)
        self.avgpool = nn.AdaptiveAvgPool2d((1, 1))
        self.fc = nn.Linear(self.inplanes, num_classes)

        init_conv_bn(self)
        if zero_init_residual:
            for module in self.modules():
                if isinstance(module, Bottleneck):
                    nn.init.zeros_(cast(Tensor, module.bn3.weight))
                elif isinstance(module, BasicBlock):
                    nn.init.zeros_(cast(Tensor, module.bn2.weight))

        reduction, c_out = 4, 64 * block.expansion
        self.feature_info = [
            {"num_chs": 64, "reduction": 2, "module": "relu"},
            {"num_chs": c_out, "reduction": reduction, "module": "layer1"},
        ]
        for number, dilated in enumerate(dilate, start=2):
            reduction, c_out = reduction if dilated else 2 * reduction, 2 * c_out
            self.feature_info.append(
                {"num_chs": c_out, "reduction": reduction, "module": f"layer{number}"}
            )

    def _stage(
        self,
        block: type[BasicBlock] | type[Bottleneck],
        planes: int,
        blocks: int,
        stride: int,
        dilate: bool,
        norm: NormLayer,
    ) -> nn.Sequential:
        # The stage's first block still sees the resolution of the stage before it, and so keeps
        # that stage's dilation.
        first_dilation = self.dilation
        if dilate:
            self.dilation *= stride
            stride = 1
        c_out = planes * block.expansion
        downsample = None
        if stride != 1 or self.inplanes != c_out:
            # Made before the block: from one seed the weights are torchvision's.
            downsample = nn.Sequential(_conv1x1(self.inplanes, c_out, stride), norm(c_out))
        width = (self.groups, self.base_width)
        stage = [block(self.inplanes, planes, stride, downsample, *width, first_dilation, norm)]
        self.inplanes = c_out
        for _ in range(1, blocks):
            stage.append(block(c_out, planes, 1, None, *width, self.dilation, norm))
        return nn.Sequential(*stage)

    def forward(self, x: Tensor) -> Tensor:
        x = self.maxpool(self.relu(self.bn1(self.conv1(x))))
        x = self.layer4(self.layer3(self.layer2(self.layer1(x))))
        logits: Tensor = self.fc(self.avgpool(x).flatten(1))
        return logits


@register
def resnet18(**options: Any) -> ResNet:
    """ResNet-18, 11.7M parameters; `options` are ResNet's arguments, weights= and init=."""
    return ResNet(BasicBlock, [2, 2, 2, 2], **options)


@register
def resnet34(**options: Any) -> ResNet:
    """ResNet-34, 21.8M parameters; `options` as resnet18's."""
    return ResNet(BasicBlock, [3, 4, 6, 3], **options)


@register
def resnet50(**options: Any) -> ResNet:
    """ResNet-50, 25.6M parameters; `options` as resnet18's."""
    return ResNet(Bottleneck, [3, 4, 6, 3], **options)


@register
def resnet101(**options: Any) -> ResNet:
    """ResNet-101, 44.5M parameters; `options` as resnet18's."""
    return ResNet(Bottleneck, [3, 4, 23, 3], **options)


@register
def resnet152(**options: Any) -> ResNet:
    """ResNet-152, 60.2M parameters; `options` as resnet18's."""
    return ResNet(Bottleneck, [3, 8, 36, 3], **options)


@register
def resnext50_32x4d(**options: Any) -> ResNet:
    """ResNeXt-50, 32 groups of 4 channels, 25.0M parameters; `options` as resnet18's."""
    return ResNet(Bottleneck, [3, 4, 6, 3], groups=32, width_per_group=4, **options)


@register
def resnext101_32x8d(**options: Any) -> ResNet:
    """ResNeXt-101, 32 groups of 8 channels, 88.8M parameters; `options` as resnet18's."""
    return ResNet(Bottleneck, [3, 4, 23, 3], groups=32, width_per_group=8, **options)


@register
def wide_resnet50_2(**options: Any) -> ResNet:
    """ResNet-50 with 3x3 convolutions twice as wide, 68.9M parameters; `options` as resnet18's."""
    return ResNet(Bottleneck, [3, 4, 6, 3], width_per_group=128, **options)


@register
def wide_resnet101_2(**options: Any) -> ResNet:
    """ResNet-101 with 3x3 convolutions twice as wide, 126.9M; `options` as resnet18's."""
    return ResNet(Bottleneck, [3, 4, 23, 3], width_per_group=128, **options)
