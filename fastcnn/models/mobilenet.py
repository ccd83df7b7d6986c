"""MobileNet v2 (Sandler et al. 2018, arXiv 1801.04381) with torchvision's names and keys."""

import re
from collections.abc import Callable, Sequence
from typing import Any

import torch.nn.functional as F
from torch import Tensor, nn

from fastcnn.models.init import init_conv_bn
from fastcnn.models.network import Feature, Network
from fastcnn.models.registry import register

__all__ = ["InvertedResidual", "MobileNetV2", "mobilenet_v2"]

NormLayer = Callable[[int], nn.Module]

# Of each stage: expansion, channels, blocks, stride of the first block. The paper's table 2.
_STAGES = (
    (1, 16, 1, 1),
    (6, 24, 2, 2),
    (6, 32, 3, 2),
    (6, 64, 4, 2),
    (6, 96, 3, 1),
    (6, 160, 3, 2),
    (6, 320, 1, 1),
)


def _conv_norm_relu6(
    c_in: int, c_out: int, kernel_size: int, stride: int, groups: int, norm: NormLayer
) -> nn.Sequential:
    conv = nn.Conv2d(c_in, c_out, kernel_size, stride, kernel_size // 2, groups=groups, bias=False)
    return nn.Sequential(conv, norm(c_out), nn.ReLU6(inplace=True))


class InvertedResidual(nn.Module):
    """1x1 to c_in * expand_ratio, depthwise 3x3, 1x1 to c_out; added to x where shapes agree.

    x (n, c_in, h, w) -> y (n, c_out, ceil(h / stride), ceil(w / stride)).
    """

    def __init__(
        self, c_in: int, c_out: int, stride: int, expand_ratio: float, norm_layer: NormLayer
    ) -> None:
        super().__init__()
        if stride not in (1, 2):
            raise ValueError(f"stride: expected 1 or 2, got {stride}")
        wide = round(c_in * expand_ratio)
        layers: list[nn.Module] = []
        if expand_ratio != 1:
            layers.append(_conv_norm_relu6(c_in, wide, 1, 1, 1, norm_layer))
        layers.append(_conv_norm_relu6(wide, wide, 3, stride, wide, norm_layer))
        layers += [nn.Conv2d(wide, c_out, 1, bias=False), norm_layer(c_out)]
        self.conv = nn.Sequential(*layers)
        self.use_res_connect = stride == 1 and c_in == c_out

    def forward(self, x: Tensor) -> Tensor:
        y: Tensor = self.conv(x)
        return x + y if self.use_res_connect else y


class MobileNetV2(Network):
    """Stem to 1/2, inverted residuals to 1/32, 1x1 to 1280, mean, dropout, linear.

    x (n, in_chans, h, w) -> logits (n, num_classes). `width_mult` scales the channels, rounded to
    multiples of `round_nearest`; `inverted_residual_setting` lists each stage's expansion,
    channels, blocks and first stride. As torchvision.models.MobileNetV2: the same keys, and from
    the same seed the same initial weights.

    Raises:
        ValueError: inverted_residual_setting is no list of four numbers each.
    """

    heads = ("classifier.1",)

    def __init__(
        self,
        num_classes: int = 1000,
        width_mult: float = 1.0,
        inverted_residual_setting: Sequence[Sequence[int]] | None = None,
        round_nearest: int = 8,
        *,
        norm_layer: NormLayer | None = None,
        dropout: float = 0.2,
        in_chans: int = 3,
    ) -> None:
        super().__init__()
        stages = _STAGES if inverted_residual_setting is None else inverted_residual_setting
        if not stages or any(len(stage) != 4 for stage in stages):
            raise ValueError(
                "inverted_residual_setting: expected four numbers for each stage: expansion, "
                f"channels, blocks, stride; got {stages}"
            )
        norm = norm_layer or nn.BatchNorm2d
        channels = _rounded(32 * width_mult, round_nearest)
        self.last_channel = _rounded(1280 * max(1.0, width_mult), round_nearest)
        layers: list[nn.Module] = [_conv_norm_relu6(in_chans, channels, 3, 2, 1, norm)]
        maps: list[Feature] = [{"num_chs": channels, "reduction": 2, "module": "features.0"}]
        for expansion, width, blocks, first_stride in stages:
            c_out = _rounded(width * width_mult, round_nearest)
            for stride in (first_stride, *[1] * (blocks - 1)):
                layers.append(InvertedResidual(channels, c_out, stride, expansion, norm))
                channels = c_out
            reduction = maps[-1]["reduction"] * first_stride
            if first_stride == 1:  # a later map of the same resolution
                maps.pop()
            name = f"features.{len(layers) - 1}"
            maps.append({"num_chs": channels, "reduction": reduction, "module": name})
        layers.append(_conv_norm_relu6(channels, self.last_channel, 1, 1, 1, norm))
        self.features = nn.Sequential(*layers)
        linear = nn.Linear(self.last_channel, num_classes)
        self.classifier = nn.Sequential(nn.Dropout(dropout), linear)
        init_conv_bn(self)
        nn.init.normal_(linear.weight, std=0.01)
        nn.init.zeros_(linear.bias)
        self.feature_info = maps

    def forward(self, x: Tensor) -> Tensor:
        x = F.adaptive_avg_pool2d(self.features(x), (1, 1))
        logits: Tensor = self.classifier(x.flatten(1))
        return logits

    @staticmethod
    def rename(key: str) -> str:
        """Timm's mobilenetv2_100 counts blocks by stage and names their layers by kind."""
        return re.sub(
            r"^(conv_stem|bn1|conv_head|bn2|classifier|blocks\.\d+\.\d+\.\w+)(?=\.\w+$)",
            lambda match: _TIMM.get(match[1], match[1]),
            key,
        )


def _rounded(channels: float, divisor: int) -> int:
    """The nearest multiple, at least one, and at least 90 % of `channels`."""
    rounded = max(divisor, int(channels + divisor / 2) // divisor * divisor)
    return rounded if rounded >= 0.9 * channels else rounded + divisor


def _timm_names() -> dict[str, str]:
    """Timm's name of each layer of mobilenetv2_100: the name here."""
    names = {"conv_stem": "features.0.0", "bn1": "features.0.1"}
    index = 1
    for stage, (expansion, _, blocks, _) in enumerate(_STAGES):
        layers = ["conv_pw", "bn1", "conv_dw", "bn2", "conv_pwl", "bn3"]
        places = ["0.0", "0.1", "1.0", "1.1", "2", "3"]
        if expansion == 1:
            layers = ["conv_dw", "bn1", "conv_pw", "bn2"]
            places = ["0.0", "0.1", "1", "2"]
        for block in range(blocks):
            for layer, place in zip(layers, places, strict=True):
                names[f"blocks.{stage}.{block}.{layer}"] = f"features.{index}.conv.{place}"
            index += 1
    return names | {
        "conv_head": f"features.{index}.0",
        "bn2": f"features.{index}.1",
        "classifier": "classifier.1",
    }


_TIMM = _timm_names()


@register
def mobilenet_v2(**options: Any) -> MobileNetV2:
    """MobileNet v2, 3.5M parameters; `options` are MobileNetV2's arguments, weights= and init=."""
    return MobileNetV2(**options)
