"""Models that fastcnn did not write, for the tests of convert and the table in docs/conversion.md.

Of each family the smallest member that is usual, with fresh weights: torchvision's classification
and segmentation families, some of timm's, and segmentation_models_pytorch's decoders.
"""

import re
import warnings
from typing import Any, NamedTuple

import torch
from support.oracles import segmentation_models_pytorch, timm, torchvision
from support.seeds import seed_all, seeded
from torch import Tensor, nn

from fastcnn import convert
from fastcnn.convert.converted import untraceable
from fastcnn.convert.graph.layers import NORMS, Layers
from fastcnn.convert.report import rows

_segmentation = torchvision.models.segmentation

# By family: the model, and what it is made with.
_TORCHVISION: dict[str, dict[str, Any]] = {
    "alexnet": {},
    "convnext_tiny": {},
    "densenet121": {},
    "efficientnet_b0": {},
    "efficientnet_v2_s": {},
    "googlenet": {"init_weights": False},
    "inception_v3": {"init_weights": False, "aux_logits": False},
    "maxvit_t": {},
    "mnasnet0_5": {},
    "mobilenet_v2": {},
    "mobilenet_v3_small": {},
    "regnet_x_400mf": {},
    "regnet_y_400mf": {},
    "resnet18": {},
    "resnet50": {},
    "resnext50_32x4d": {},
    "shufflenet_v2_x0_5": {},
    "squeezenet1_1": {},
    "swin_t": {},
    "swin_v2_t": {},
    "vgg11_bn": {},
    "vit_b_32": {"image_size": 64},
    "wide_resnet50_2": {},
    "deeplabv3_mobilenet_v3_large": {"weights_backbone": None, "aux_loss": True},
    "deeplabv3_resnet50": {"weights_backbone": None},
    "fcn_resnet50": {"weights_backbone": None, "aux_loss": True},
    "lraspp_mobilenet_v3_large": {"weights_backbone": None},
}
_TIMM = (
    "convnext_atto", "cs3darknet_s", "densenet121", "dla46_c", "dpn48b", "efficientnet_lite0",
    "efficientvit_b0", "edgenext_xx_small", "ese_vovnet19b_slim_dw", "fastvit_t8", "ghostnet_050",
    "hrnet_w18_small", "lcnet_035", "legacy_seresnet18", "mixnet_s", "mobilenetv3_small_050",
    "mobilenetv4_conv_small_035", "mobileone_s0", "nf_resnet26", "regnety_002", "repvgg_a0",
    "repvit_m0_9", "res2net50_26w_4s", "resnest14d", "resnet26d", "resnetv2_50x1_bit",
    "rexnet_100", "selecsls42", "skresnet18", "starnet_s1", "xception41",
)  # fmt: skip
_DECODERS = ("DeepLabV3Plus", "FPN", "Linknet", "MAnet", "PAN", "PSPNet", "Unet", "UnetPlusPlus")

# What cannot be 64, the smallest that most take: windows, and what is left of the last maps.
_SIZES = {
    "torchvision/alexnet": 64,
    "torchvision/inception_v3": 80,
    "torchvision/maxvit_t": 56,
    "torchvision/vit_b_32": 64,
    "smp/PAN": 128,
}

NAMES = (
    *(f"torchvision/{name}" for name in _TORCHVISION),
    *(f"timm/{name}" for name in _TIMM),
    *(f"smp/{name}" for name in _DECODERS),
)


# Batch norms that see a pixel an image: of two values they amplify what rounds by any factor.
_BATCHES = {"timm/rexnet_100": 4, "timm/selecsls42": 4, "timm/skresnet18": 4}


def make(name: str, small: bool = False) -> nn.Module:
    """Return a model in train mode, with the same weights in every process.

    small: with fewer layers and channels where it is large and repeats itself, for tests.
    """
    package, _, model = name.partition("/")
    with torch.random.fork_rng():
        seed_all(0)
        if small and model in _SMALL:
            return _SMALL[model]()
        if package == "torchvision":
            return torchvision.models.get_model(model, weights=None, **_TORCHVISION[model])
        if package == "timm":
            return timm.create_model(model)
        decoder = getattr(segmentation_models_pytorch, model)
        return decoder("resnet18", encoder_weights=None)


def images(name: str) -> Tensor:
    """Return a small batch for a model."""
    size = _SIZES.get(name, 64)
    generator = seeded(0)
    return torch.randn(_BATCHES.get(name, 2), 3, size, size, generator=generator)


def _narrow_head(model: Any) -> nn.Module:
    """Give AlexNet and VGG a head of few parameters."""
    model.avgpool = nn.AdaptiveAvgPool2d(1)
    sizes = iter(((512 if len(model.features) > 20 else 256, 32), (32, 32), (32, 10)))
    for i, layer in enumerate(model.classifier):
        if isinstance(layer, nn.Linear):
            model.classifier[i] = nn.Linear(*next(sizes))
    return model


def _swin(block: str, merging: str) -> nn.Module:
    models = torchvision.models.swin_transformer
    return models.SwinTransformer(
        [4, 4], 24, [2, 2], [3, 6], [7, 7], block=getattr(models, block),
        downsample_layer=getattr(models, merging),
    )  # fmt: skip


def _convnext() -> nn.Module:
    block = torchvision.models.convnext.CNBlockConfig
    return torchvision.models.ConvNeXt([block(24, 48, 2), block(48, None, 2)])


def _dilated() -> nn.Module:
    block = torchvision.models.resnet.Bottleneck
    dilated = [False, True, True]
    return torchvision.models.ResNet(block, [1, 1, 1, 1], replace_stride_with_dilation=dilated)


_SMALL: dict[str, Any] = {
    "deeplabv3_resnet50": lambda: _segmentation.deeplabv3._deeplabv3_resnet(_dilated(), 21, None),
    "fcn_resnet50": lambda: _segmentation.fcn._fcn_resnet(_dilated(), 21, True),
    "alexnet": lambda: _narrow_head(torchvision.models.alexnet()),
    "convnext_tiny": _convnext,
    "maxvit_t": lambda: torchvision.models.MaxVit((56, 56), 16, 7, [16, 32], [1, 1], 16, 0.2),
    "swin_t": lambda: _swin("SwinTransformerBlock", "PatchMerging"),
    "swin_v2_t": lambda: _swin("SwinTransformerBlockV2", "PatchMergingV2"),
    "vgg11_bn": lambda: _narrow_head(torchvision.models.vgg11_bn(init_weights=False)),
    "vit_b_32": lambda: torchvision.models.VisionTransformer(64, 32, 2, 4, 64, 128),
    "wide_resnet50_2": lambda: torchvision.models.ResNet(
        torchvision.models.resnet.Bottleneck, [1, 1, 1, 1], width_per_group=128
    ),
}


class Summary(NamedTuple):
    """How much of a model runs fused, counted in layers and calls."""

    steps: int  # batch norms that run with their convolution
    alone: int  # by themselves, or with an activation or addition behind them
    batch_norms: int  # of all
    norms: int  # group, instance and layer norms by fastcnn's kernels
    all_norms: int
    resizes: int
    dropouts: int
    untraced: list[str]  # classes whose forward does not trace, and why


def summary(model: nn.Module) -> Summary:
    """Count what of a converted model runs fused."""
    fused = [row.pattern for row in rows(model) if row.fused]
    first = [re.split("[- ]", pattern)[0] for pattern in fused]
    layers = Layers()
    kinds = [layers[module].kind for module in model.modules()]
    others = [kind for kind in NORMS if kind != "batch_norm"]
    untraced = {type(m).__name__: untraceable[m] for m in model.modules() if m in untraceable}
    return Summary(
        steps=sum(p.count("conv-bn") + p.count("projection") for p in fused),
        alone=first.count("batch_norm") + first.count("cat"),
        batch_norms=kinds.count("batch_norm"),
        norms=sum(kind in others for kind in first),
        all_norms=sum(kind in others for kind in kinds) + _plain_layer_norms(model),
        resizes=sum(p.count("interpolate") for p in fused) + first.count("upsample"),
        dropouts=first.count("dropout"),
        untraced=[f"{name}: {why}" for name, why in untraced.items()],
    )


def _plain_layer_norms(model: nn.Module) -> int:
    """Count those over the last dimension, which have no kernel here."""
    return sum(type(m) is nn.LayerNorm or type(m).__name__ == "LayerNorm" for m in model.modules())


HEADER = (
    "| model | batch norms fused with their convolution | other batch norms | of all "
    "| other norms | resizes | dropouts | forwards that do not trace |\n"
    "| --- | --: | --: | --: | --: | --: | --: | --- |"
)
# Parts of torch.fx's messages, and what they say of a forward.
_WORDS = {
    "used as inputs to control flow": "branches on values",
    "'len' is not supported": "takes a list",
    "cannot be iterated": "takes a list",
    "item assignment": "takes a list",
    "tuple of Tensors": "takes a list",
    "list index": "takes a list",
}


def line(name: str) -> str:
    """Return a model's line of the table in docs/conversion.md."""
    with warnings.catch_warnings():
        warnings.filterwarnings("ignore", "fastcnn.convert: nothing in")  # the table says so
        s = summary(convert(make(name)))
    words = []
    for text in s.untraced:
        cls, _, why = text.rpartition(" (")[0].partition(": ")  # without the line of its code
        words.append(f"`{cls}` {next((w for part, w in _WORDS.items() if part in why), why)}")
    norms = f"{s.norms} of {s.all_norms}" if s.all_norms else "-"
    counts = (s.steps, s.alone, s.batch_norms, norms, s.resizes or "-", s.dropouts or "-")
    return f"| {name} | {' | '.join(map(str, counts))} | {', '.join(words) or '-'} |"
