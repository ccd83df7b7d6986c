"""U-Net with a ResNet for its way down, as segmentation_models_pytorch.Unet, with its keys."""

from collections.abc import Sequence
from typing import Any, cast

import torch
import torch.nn.functional as F
from torch import Tensor, nn

from fastcnn.models.network import Features, Network
from fastcnn.models.registry import architecture, register

__all__ = [
    "UNetResNet",
    "unet_resnet18",
    "unet_resnet34",
    "unet_resnet50",
    "unet_resnet101",
    "unet_resnet152",
]


def _conv_norm_relu(c_in: int, c_out: int) -> nn.Sequential:
    conv = nn.Conv2d(c_in, c_out, 3, padding=1, bias=False)
    return nn.Sequential(conv, nn.BatchNorm2d(c_out), nn.ReLU(inplace=True))


class DecoderBlock(nn.Module):
    """y = conv2(conv1(cat(up(x), beside))), up nearest to h x w, convs with batch norm and ReLU.

    x (n, c_in, .., ..), beside (n, c_beside, h, w), or None at the image's size.
    """

    def __init__(self, c_in: int, c_beside: int, c_out: int) -> None:
        super().__init__()
        self.conv1 = _conv_norm_relu(c_in + c_beside, c_out)
        self.conv2 = _conv_norm_relu(c_out, c_out)

    def forward(self, x: Tensor, size: Sequence[int], beside: Tensor | None) -> Tensor:
        x = F.interpolate(x, size=size, mode="nearest")
        if beside is not None:
            x = torch.cat([x, beside], 1)
        return cast(Tensor, self.conv2(self.conv1(x)))


class Decoder(nn.Module):
    """Five blocks from the encoder's maps (1/2 ... 1/32 of the image) back to the image's size."""

    def __init__(self, encoder_channels: Sequence[int], channels: Sequence[int]) -> None:
        super().__init__()
        deepest, *beside = reversed(encoder_channels)
        self.blocks = nn.ModuleList(
            DecoderBlock(*sizes)
            for sizes in zip([deepest, *channels[:-1]], [*beside, 0], channels, strict=True)
        )

    def forward(self, maps: Sequence[Tensor], size: Sequence[int]) -> Tensor:
        """`size` is the image's."""
        x, *beside = reversed(maps)
        for i, block in enumerate(self.blocks):
            if i < len(beside):
                x = block(x, beside[i].shape[-2:], beside[i])
            else:
                x = block(x, size, None)
        return x


class UNetResNet(Network):
    """x (n, in_chans, h, w) -> logits (n, num_classes, h, w), h and w of any size.

    `encoder` gives the ResNet's maps at 1/2 ... 1/32; `decoder_channels` are those of the five
    blocks. As segmentation_models_pytorch.Unet with its defaults: the same keys, and from the same
    seed the same initial weights.

    Raises:
        ValueError: decoder_channels are not five.
    """

    heads = ("segmentation_head.0",)
    backbone_name = "encoder"

    def __init__(
        self,
        encoder: Features,
        num_classes: int = 1,
        decoder_channels: Sequence[int] = (256, 128, 64, 32, 16),
    ) -> None:
        super().__init__()
        channels = encoder.feature_info.channels()
        if len(decoder_channels) != len(channels):
            raise ValueError(
                f"decoder_channels: expected {len(channels)} numbers, got {decoder_channels}"
            )
        self.encoder = encoder
        self.decoder = Decoder(channels, decoder_channels)
        head = nn.Conv2d(decoder_channels[-1], num_classes, 3, padding=1)
        self.segmentation_head = nn.Sequential(head)
        for module in self.decoder.modules():
            if isinstance(module, nn.Conv2d):
                nn.init.kaiming_uniform_(module.weight, nonlinearity="relu")
        nn.init.xavier_uniform_(head.weight)
        nn.init.zeros_(cast(Tensor, head.bias))

    def forward(self, x: Tensor) -> Tensor:
        logits: Tensor = self.segmentation_head(self.decoder(self.encoder(x), x.shape[-2:]))
        return logits


def _unet(name: str, in_chans: int = 3, **options: Any) -> UNetResNet:
    return UNetResNet(Features(architecture(name, in_chans=in_chans)), **options)


@register
def unet_resnet18(**options: Any) -> UNetResNet:
    """U-Net on ResNet-18, 14.3M parameters.

    `options`: num_classes=1, in_chans=3, decoder_channels, weights=, init=, and weights_backbone=,
    a checkpoint of the ResNet.
    """
    return _unet("resnet18", **options)


@register
def unet_resnet34(**options: Any) -> UNetResNet:
    """U-Net on ResNet-34, 24.4M parameters; `options` as unet_resnet18's."""
    return _unet("resnet34", **options)


@register
def unet_resnet50(**options: Any) -> UNetResNet:
    """U-Net on ResNet-50, 32.5M parameters; `options` as unet_resnet18's."""
    return _unet("resnet50", **options)


@register
def unet_resnet101(**options: Any) -> UNetResNet:
    """U-Net on ResNet-101, 51.5M parameters; `options` as unet_resnet18's."""
    return _unet("resnet101", **options)


@register
def unet_resnet152(**options: Any) -> UNetResNet:
    """U-Net on ResNet-152, 67.2M parameters; `options` as unet_resnet18's."""
    return _unet("resnet152", **options)
