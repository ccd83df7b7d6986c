"""The baseline of every comparison: the same network, run by plain PyTorch operations."""

import copy
from typing import TypeVar

from torch import nn

from fastcnn.convert import revert
from fastcnn.convert.converted import Converted

__all__ = ["eager_baseline"]

Model = TypeVar("Model", bound=nn.Module)


def eager_baseline(model: Model) -> Model:
    """A copy of a converted model as it was before, with its own parameters of the same values.

    Raises:
        TypeError: nothing in `model` is converted, so that its copy would be no baseline.
    """
    if not any(isinstance(module, Converted) for module in model.modules()):
        raise TypeError(f"model: expected a converted model, got {type(model).__name__} as it was")
    return revert(copy.deepcopy(model))
