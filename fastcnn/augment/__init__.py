"""Augmentation of uint8 images in one pass, with parameters that are each sample's own."""

from fastcnn.augment.collate import Collate
from fastcnn.augment.module import Augment
from fastcnn.ops.augment.parameters import AugmentParameters

__all__ = ["Augment", "AugmentParameters", "Collate"]


def __dir__() -> list[str]:
    return __all__
