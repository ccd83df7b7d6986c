"""FCN (Long et al. 2014, arXiv 1411.4038) on dilated ResNets, torchvision's names and keys."""

from collections import OrderedDict
from typing import Any

import torch.nn.functional as F
from torch import Tensor, nn

from fastcnn.models.network import Features, Network
from fastcnn.models.registry import architecture, register

__all__ = ["FCN", "FCNHead", "fcn_resnet50", "fcn_resnet101"]


class FCNHead(nn.Sequential):
    """3x3 to a quarter of the channels, batch norm, ReLU, dropout, 1x1 to the classes."""

    def __init__(self, c_in: int, num_classes: int) -> None:
        super().__init__(
            nn.Conv2d(c_in, c_in // 4, 3, padding=1, bias=False),
            nn.BatchNorm2d(c_in // 4),
            nn.ReLU(),
            nn.Dropout(0.1),
            nn.Conv2d(c_in // 4, num_classes, 1),
        )


class FCN(Network):
    """`classifier` on the backbone's last map, `aux_classifier` on the one before, resized to x.

    x (n, in_chans, h, w) -> {"out": logits (n, num_classes, h, w), "aux": the same}, "aux" where
    there is an aux_classifier. `backbone` gives two maps, or one without aux_classifier. As
    torchvision.models.segmentation.FCN: the same keys.
    """

    heads = ("classifier.4", "aux_classifier.4")
    backbone_name = "backbone"
    auxiliary = ("aux_classifier",)

    def __init__(
        self, backbone: nn.Module, classifier: nn.Module, aux_classifier: nn.Module | None = None
    ) -> None:
        super().__init__()
        self.backbone = backbone
        self.classifier = classifier
        self.aux_classifier = aux_classifier

    def forward(self, x: Tensor) -> OrderedDict[str, Tensor]:
        size = x.shape[-2:]
        maps = self.backbone(x)
        out = F.interpolate(self.classifier(maps[-1]), size=size, mode="bilinear")
        result = OrderedDict(out=out)
        if self.aux_classifier is not None:
            aux = self.aux_classifier(maps[0])
            result["aux"] = F.interpolate(aux, size=size, mode="bilinear")
        return result


def _fcn(name: str, num_classes: int = 21, aux_loss: bool | None = None, in_chans: int = 3) -> FCN:
    # 1/8 of the image instead of 1/32: the last two stages are dilated.
    resnet = architecture(name, in_chans=in_chans, replace_stride_with_dilation=(False, True, True))
    backbone = Features(resnet, (3, 4) if aux_loss else (4,))
    # From one seed torchvision draws this one first.
    aux_classifier = FCNHead(1024, num_classes) if aux_loss else None
    return FCN(backbone, FCNHead(2048, num_classes), aux_classifier)


@register
def fcn_resnet50(**options: Any) -> FCN:
    """FCN on ResNet-50, 33.0M parameters, 35.3M with aux_loss=True.

    `options`: num_classes=21, aux_loss=False, in_chans=3, weights=, init=, and weights_backbone=, a
    ResNet-50's checkpoint.
    """
    return _fcn("resnet50", **options)


@register
def fcn_resnet101(**options: Any) -> FCN:
    """FCN on ResNet-101, 51.9M parameters (54.3M with aux_loss); `options` as fcn_resnet50's."""
    return _fcn("resnet101", **options)
