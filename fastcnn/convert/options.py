"""What convert, revert, report and verify are called with."""

from typing import Any, NamedTuple

import torch
from torch import Tensor, nn
from torch.nn.parameter import is_lazy

from fastcnn.common.checks import one_of
from fastcnn.ops.conv_bn_act.step import Memory


class Options(NamedTuple):
    """What was asked of convert."""

    mode: str = "train"
    backend: str = "auto"
    memory: Memory = "auto"


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
    if not scripted:
        _check_initialized(function, model)


def _check_initialized(function: str, model: nn.Module) -> None:
    """Check that no parameter or buffer waits for a first input, as those of nn.LazyConv2d do."""
    for path, module in model.named_modules():
        own = (*module._parameters.values(), *module._buffers.values())
        if any(map(is_lazy, own)):
            name = f"{one_of(type(module))} {path and f'({path}) '}"
            raise ValueError(
                f"{function}: model: expected parameters that have their sizes, got {name}whose "
                f"first input gives them: call the model with a batch first"
            )


def check_inputs(function: str, x: Any) -> tuple[Any, ...]:
    """Return a model's inputs, a tuple or the one there is, and check that some is a Tensor."""
    inputs = x if isinstance(x, tuple) else (x,)
    if not any(map(_holds_tensor, inputs)):
        kinds = [f"{type(one).__module__}.{type(one).__name__}" for one in inputs]
        got = ", ".join(kind.removeprefix("builtins.") for kind in kinds) or "none"
        way = "; torch.from_numpy(array) makes one" if "numpy.ndarray" in got else ""
        raise TypeError(
            f"{function}: x: expected a Tensor, or a tuple of the model's inputs with a Tensor "
            f"among them, got {got}{way}"
        )
    return inputs


def _holds_tensor(value: Any) -> bool:
    """Whether a value is a Tensor, or a list, tuple or dictionary with one in it."""
    nested = value.values() if isinstance(value, dict) else value
    if isinstance(value, (dict, list, tuple)):
        return any(map(_holds_tensor, nested))
    return isinstance(value, Tensor)
