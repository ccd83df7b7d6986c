"""Other people's implementations, which tests compare with."""

import torch

try:
    import torchvision
except RuntimeError as error:
    # torchvision's wheel beside CPU torch: its C++ operators do not load, and the import then fails
    # on schemas that they should have defined. Its models call neither.
    if "torchvision::nms" not in str(error):
        raise
    schemas = torch.library.Library("torchvision", "FRAGMENT")  # gone again if not kept
    for name in ("nms", "qnms"):
        schemas.define(f"{name}(Tensor dets, Tensor scores, float iou_threshold) -> Tensor")
    import torchvision

import segmentation_models_pytorch
import timm
from torchvision.transforms import v2 as torchvision_transforms

torchvision_resnet = torchvision.models.resnet

__all__ = [
    "segmentation_models_pytorch",
    "timm",
    "torchvision",
    "torchvision_resnet",
    "torchvision_transforms",
]
