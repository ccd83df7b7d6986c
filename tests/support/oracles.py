"""Other people's implementations, which tests compare with."""

import importlib.util
from types import ModuleType
from typing import Any

import pytest
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

import timm
from torchvision.transforms import v2 as torchvision_transforms

torchvision_resnet = torchvision.models.resnet


class _Absent:
    """A package that is not installed: the tests that ask anything of it are skipped."""

    def __init__(self, name: str) -> None:
        self._name = name

    def __getattr__(self, _: str) -> Any:
        pytest.skip(f"{self._name} is not installed")


def _optional(name: str) -> ModuleType | _Absent:
    return importlib.import_module(name) if importlib.util.find_spec(name) else _Absent(name)


segmentation_models_pytorch: Any = _optional("segmentation_models_pytorch")


class _Later:
    """A trainer's package, imported when a test first asks it: some take 10 s."""

    def __init__(self, name: str) -> None:
        self._name = name

    def __getattr__(self, name: str) -> Any:
        return getattr(_optional(self._name), name)


accelerate, ignite, monai, pytorch_lightning = map(
    _Later, ("accelerate", "ignite", "monai", "pytorch_lightning")
)

__all__ = [
    "accelerate",
    "ignite",
    "monai",
    "pytorch_lightning",
    "segmentation_models_pytorch",
    "timm",
    "torchvision",
    "torchvision_resnet",
    "torchvision_transforms",
]
