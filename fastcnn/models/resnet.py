"""ResNet (He et al. 2015, arXiv 1512.03385) with torchvision's names and state_dict keys.

A residual block is one call, where every step is act(bn(conv(.))):

    y = chain(x, [(conv1, bn1), (conv2, bn2), ...], shortcut)       ReLU after the addition
    shortcut                                                        x, or [downsample] on x
"""

from collections.abc import Sequence
from typing import Any, Protocol, cast

from torch import Tensor, nn

from fastcnn.nn import BatchNormAct2d, Block, conv_bn_act, conv_bn_act_blocks
from fastcnn.nn.conv_bn_act import Step
from fastcnn.ops.conv_bn_act_step import Memory, check_memory

__all__ = [
    "BasicBlock",
    "Bottleneck",
    "ResNet",
    "resnet18",
    "resnet34",
    "resnet50",
    "resnet101",
    "resnet152",
]


class Chain(Protocol):
    """Runs act(bn(conv(.))) step by step, adding `residual` before the last activation."""

    def __call__(
        self,
        x: Tensor,
        steps: Sequence[Step],
        residual: Tensor | Sequence[Step] | None = None,
        memory: Memory = "default",
    ) -> Tensor: ...


class Chained(nn.Module):
    """A module that runs its convolutions through `self.chain`.

    The one place that says who runs them: `fastcnn.lab.eager_twin` puts plain PyTorch there.
    """

    chain: Chain = staticmethod(conv_bn_act)
    memory: Memory = "default"


def _conv3x3(
    c_in: int, c_out: int, stride: int = 1, groups: int = 1, dilation: int = 1
) -> nn.Conv2d:
    return nn.Conv2d(
        c_in,
        c_out,
        kernel_size=3,
        stride=stride,
        padding=dilation,
        dilation=dilation,
        groups=groups,
        bias=False,
    )


def _conv1x1(c_in: int, c_out: int, stride: int = 1) -> nn.Conv2d:
    return nn.Conv2d(c_in, c_out, kernel_size=1, stride=stride, bias=False)


def init_conv_bn(model: nn.Module) -> None:
    """Conv weights ~ N(0, 2 / fan_out) (He et al. 2015, arXiv 1502.01852); bn: gamma 1, beta 0."""
    for module in model.modules():
        if isinstance(module, nn.Conv2d):
            nn.init.kaiming_normal_(module.weight, mode="fan_out", nonlinearity="relu")
        elif isinstance(module, nn.BatchNorm2d):
            nn.init.ones_(module.weight)
            nn.init.zeros_(module.bias)


class _ResidualBlock(Chained):
    """What both blocks share: the shortcut is x, or its projection where the shape changes."""

    downsample: nn.Sequential | None

    def steps(self) -> list[Step]:
        """Return the steps beside the shortcut."""
        raise NotImplementedError

    def block(self) -> Block:
        """Return the block's steps and its shortcut's."""
        if self.downsample is None:
            return Block(self.steps(), ())
        return Block(self.steps(), [cast(Step, tuple(self.downsample))])

    def forward(self, x: Tensor) -> Tensor:
        """Run the block: one chain."""
        return self.chain(x, *self.block(), memory=self.memory)


class Stage(nn.Sequential, Chained):
    """Residual blocks one after the other, in one call where memory is "low".

    Backward then rebuilds the blocks' inputs. Hooks on the blocks do not run in that call.
    """

    def forward(self, x: Tensor) -> Tensor:
        """Run the blocks."""
        if self.memory != "low":
            return cast(Tensor, super().forward(x))
        return conv_bn_act_blocks(x, [cast(_ResidualBlock, m).block() for m in self], self.memory)


class BasicBlock(_ResidualBlock):
    """y = relu(bn2(conv2(relu(bn1(conv1(x))))) + residual), both convolutions 3x3.

    x (n, inplanes, h, w) -> y (n, planes, ceil(h / stride), ceil(w / stride)). As
    torchvision.models.resnet.BasicBlock.

    Raises:
        ValueError: groups, base_width or dilation other than 1, 64, 1.
    """

    expansion = 1

    def __init__(
        self,
        inplanes: int,
        planes: int,
        stride: int = 1,
        downsample: nn.Sequential | None = None,
        groups: int = 1,
        base_width: int = 64,
        dilation: int = 1,
    ) -> None:
        super().__init__()
        if (groups, base_width, dilation) != (1, 64, 1):
            raise ValueError(
                "groups, base_width, dilation: BasicBlock has only 1, 64, 1, "
                f"got {groups}, {base_width}, {dilation}; Bottleneck takes others"
            )
        self.conv1 = _conv3x3(inplanes, planes, stride)
        self.bn1 = BatchNormAct2d(planes, act="relu")
        self.conv2 = _conv3x3(planes, planes)
        self.bn2 = BatchNormAct2d(planes, act="relu")
        self.downsample = downsample

    def steps(self) -> list[Step]:
        """Return the steps beside the shortcut."""
        return [(self.conv1, self.bn1), (self.conv2, self.bn2)]


class Bottleneck(_ResidualBlock):
    """y = relu(bn3(conv3(relu(bn2(conv2(relu(bn1(conv1(x)))))))) + residual): 1x1, 3x3, 1x1.

    x (n, inplanes, h, w) -> y (n, 4 planes, ceil(h / stride), ceil(w / stride)). The 3x3
    convolution has the stride ("ResNet v1.5"). As torchvision.models.resnet.Bottleneck.
    """

    expansion = 4

    def __init__(
        self,
        inplanes: int,
        planes: int,
        stride: int = 1,
        downsample: nn.Sequential | None = None,
        groups: int = 1,
        base_width: int = 64,
        dilation: int = 1,
    ) -> None:
        super().__init__()
        width = planes * base_width // 64 * groups
        c_out = planes * self.expansion
        self.conv1 = _conv1x1(inplanes, width)
        self.bn1 = BatchNormAct2d(width, act="relu")
        self.conv2 = _conv3x3(width, width, stride, groups, dilation)
        self.bn2 = BatchNormAct2d(width, act="relu")
        self.conv3 = _conv1x1(width, c_out)
        self.bn3 = BatchNormAct2d(c_out, act="relu")
        self.downsample = downsample

    def steps(self) -> list[Step]:
        """Return the steps beside the shortcut."""
        return [(self.conv1, self.bn1), (self.conv2, self.bn2), (self.conv3, self.bn3)]


class ResNet(Chained):
    """Stem, four stages of blocks at 1/4, 1/8, 1/16, 1/32 of the image, mean, linear classifier.

    x (n, 3, h, w) -> logits (n, num_classes). `layers` counts the blocks of each stage;
    `replace_stride_with_dilation` keeps stages 2, 3, 4 at their input's resolution where true;
    `zero_init_residual` starts every block as the identity (Goyal et al. 2017, arXiv 1706.02677);
    `memory` says what is kept for backward: "default", "low" or "lowest", see
    fastcnn.functional.conv_bn_act_blocks; it may be set later too.
    As torchvision.models.ResNet: the same keys, and from the same seed the same initial weights.

    Raises:
        ValueError: layers or replace_stride_with_dilation of the wrong length, an unknown memory.
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
        *,
        memory: Memory = "default",
    ) -> None:
        super().__init__()
        check_memory("ResNet", memory)  # before the weights are drawn
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

        self.conv1 = nn.Conv2d(3, 64, kernel_size=7, stride=2, padding=3, bias=False)
        self.bn1 = BatchNormAct2d(64, act="relu")
        self.maxpool = nn.MaxPool2d(kernel_size=3, stride=2, padding=1)
        self.layer1 = self._make_layer(block, 64, layers[0], stride=1, dilate=False)
        self.layer2 = self._make_layer(block, 128, layers[1], stride=2, dilate=dilate[0])
        self.layer3 = self._make_layer(block, 256, layers[2], stride=2, dilate=dilate[1])
        self.layer4 = self._make_layer(block, 512, layers[3], stride=2, dilate=dilate[2])
        self.avgpool = nn.AdaptiveAvgPool2d((1, 1))
        self.fc = nn.Linear(512 * block.expansion, num_classes)

        self.memory = memory
        init_conv_bn(self)
        if zero_init_residual:
            for module in self.modules():
                if isinstance(module, Bottleneck):
                    nn.init.zeros_(module.bn3.weight)
                elif isinstance(module, BasicBlock):
                    nn.init.zeros_(module.bn2.weight)

    @property
    def memory(self) -> Memory:
        """What is kept for backward; setting it sets it in every stage and block."""
        return self._memory

    @memory.setter
    def memory(self, memory: Memory) -> None:
        check_memory("ResNet", memory)
        self._memory: Memory = memory
        for module in self.modules():
            if isinstance(module, Chained) and module is not self:
                module.memory = memory

    def _make_layer(
        self,
        block: type[BasicBlock] | type[Bottleneck],
        planes: int,
        blocks: int,
        stride: int,
        dilate: bool,
    ) -> Stage:
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
            downsample = nn.Sequential(
                _conv1x1(self.inplanes, c_out, stride), BatchNormAct2d(c_out, act="none")
            )
        width = (self.groups, self.base_width)
        stage = [block(self.inplanes, planes, stride, downsample, *width, first_dilation)]
        self.inplanes = c_out
        for _ in range(1, blocks):
            stage.append(block(c_out, planes, 1, None, *width, self.dilation))
        return Stage(*stage)

    def forward(self, x: Tensor) -> Tensor:
        """Map images x (n, 3, h, w) to logits (n, num_classes)."""
        x = self.chain(x, [(self.conv1, self.bn1, self.maxpool)], memory=self.memory)
        x = self.layer4(self.layer3(self.layer2(self.layer1(x))))
        logits: Tensor = self.fc(self.avgpool(x).flatten(1))
        return logits


def resnet18(**options: Any) -> ResNet:
    """ResNet-18, 11.7M parameters; `options` are ResNet's keyword arguments."""
    return ResNet(BasicBlock, [2, 2, 2, 2], **options)


def resnet34(**options: Any) -> ResNet:
    """ResNet-34, 21.8M parameters; `options` are ResNet's keyword arguments."""
    return ResNet(BasicBlock, [3, 4, 6, 3], **options)


def resnet50(**options: Any) -> ResNet:
    """ResNet-50, 25.6M parameters; `options` are ResNet's keyword arguments."""
    return ResNet(Bottleneck, [3, 4, 6, 3], **options)


def resnet101(**options: Any) -> ResNet:
    """ResNet-101, 44.5M parameters; `options` are ResNet's keyword arguments."""
    return ResNet(Bottleneck, [3, 4, 23, 3], **options)


def resnet152(**options: Any) -> ResNet:
    """ResNet-152, 60.2M parameters; `options` are ResNet's keyword arguments."""
    return ResNet(Bottleneck, [3, 8, 36, 3], **options)
