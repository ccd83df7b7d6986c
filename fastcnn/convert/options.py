"""What convert, revert, report and verify are called with."""

from typing import Any, NamedTuple

import torch
from torch import nn

from fastcnn.ops.conv_bn_act.step import Memory


class Options(NamedTuple):
    """What was asked of convert."""

    mode: str = "train"
    backend: str = "auto"
    memory: Memory = "default"


def check_module(function: str, model: Any, scripted: bool = False) -> None:
    """Check that a model is a Module, and no ScriptModule but where there is nothing to trace."""
    if not isinstance(model, nn.Module) or (
        isinstance(model, torch.jit.ScriptModule) and not scripted
    ):
        got = type(model).__name__
        raise TypeError(f"{function}: model: expected a torch.nn.Module, got {got}")
