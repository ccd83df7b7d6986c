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
        if isinstance(model, torch.jit.ScriptModule):
            got += (
                ", whose forward torch.jit has compiled, which leaves no Python to read: pass the "
                "model that it was made of"
            )
        elif isinstance(model, type) and issubclass(model, nn.Module):
            got = f"the class {model.__name__}: make a model of it first, {model.__name__}(...)"
        raise TypeError(f"{function}: model: expected a torch.nn.Module, got {got}")
