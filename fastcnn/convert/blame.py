"""Errors that come out of a fused forward: which layer's they are, and what of its input is wrong.

All of it is found out when an exception passes: the fused calls themselves know no paths.
"""

import linecache
import re
import traceback
from collections.abc import Callable
from types import FrameType
from typing import Any, NoReturn

import torch
from torch import Tensor, nn

from fastcnn.common.autocast import autocast_dtype
from fastcnn.common.checks import HALVES
from fastcnn.convert.codegen.rewrite import layer_called
from fastcnn.convert.fused_forward import FusedForward
from fastcnn.convert.graph.describe import Call

# Exactly these: what derives from them is told apart by its type, or made with other arguments.
_KINDS = (TypeError, ValueError, RuntimeError)
# Of ops: "conv_bn_act: block 1: shortcut: step 0: weight: expected ...".
_BY_AN_OP = re.compile(r"^\w+: ((?:(?:block \d+|shortcut|step \d+): )*)(?=\w+: )", re.ASCII)
_LAYERS = (nn.Conv2d, nn.Linear, nn.BatchNorm2d, nn.SyncBatchNorm, nn.GroupNorm, nn.InstanceNorm2d)
_COUNTS = ("in_channels", "num_features", "num_channels")


def named(
    error: Exception, forward: FusedForward, module: nn.Module, name: str
) -> Exception | None:
    """Return the error with its layer's path in a module of this name; None: it is nobody's layer.

    An error of a layer that somebody else wrote stays as it is.
    """
    if type(error) not in _KINDS:
        return None
    frames = [frame for frame, _ in traceback.walk_tb(error.__traceback__)]
    lines = [line for _, line in traceback.walk_tb(error.__traceback__)]
    code = forward.run.__code__
    at = next((i for i, frame in enumerate(frames) if frame.f_code is code), None)
    if at is None:
        return None
    # torch.fx writes a node a line: "run_chain = ...(x, ...)".
    made = linecache.getline(code.co_filename, lines[at]).split("=")[0].split(":")[0].strip()
    node = next((node for node in forward.fused.nodes if node.name == made), None)
    if node is None:
        return None
    x = frames[at].f_locals.get(str(node.args[0])) if node.args else None
    path = layer_called(node)
    if path is not None:
        layer = module.get_submodule(path)
        if not type(layer).__module__.startswith("torch.nn."):
            return None
        return _error(error, _path(name, path), _wrong(layer, x))
    call = forward.calls.get(made)
    if call is None:
        return None
    path, words = _in_call(error, call, module, x, frames[at + 1 :])
    return _error(error, " .. ".join(_path(name, end) for end in path.split(" .. ")), words)


def named_layer(error: Exception, layer: nn.Module, name: str, x: Any) -> Exception | None:
    """Return the error of a layer by itself with its path, see named."""
    if type(error) not in _KINDS:
        return None
    words = _wrong(layer, x) or _BY_AN_OP.sub("", str(error))
    return _error(error, name or type(layer).__name__, words)


def raise_again(error: Exception, told: Exception | None) -> NoReturn:
    """Raise an error that passes as it was told, as it is where there is nothing to tell."""
    try:
        if told is None:
            raise error
        raise told from error
    finally:
        del error, told  # a frame that holds its own error keeps all activations


def _in_call(
    error: Exception, call: Call, module: nn.Module, x: Any, frames: list[FrameType]
) -> tuple[str, str]:
    """Return the path within a module of what a fused call fails in, and why."""
    for path in call.reads:
        words = _wrong(module.get_submodule(path), x, fused=True)
        if words is not None:
            return path, words
    paths = {layer: path for path, layer in module.named_modules()}
    said = str(error)
    by_op = _BY_AN_OP.match(said)
    rest = said if by_op is None else said[by_op.end() :]
    for frame in frames:  # the layers one by one, or folded ones
        holder = frame.f_locals.get("self")
        holder = holder if isinstance(holder, nn.Module) else getattr(holder, "conv", None)
        if isinstance(holder, nn.Module) and holder in paths:
            return paths[holder], rest
    key = "" if by_op is None else by_op[1].removesuffix(": ")
    return call.layers.get(key, call.where), rest


def _wrong(layer: nn.Module, x: Any, fused: bool = False) -> str | None:
    """Say what of an input does not go with a layer, if anything; fused: its kernels take images.

    Of other layers, and of what PyTorch takes as well, PyTorch's own words are as good.
    """
    if not isinstance(x, Tensor) or not isinstance(layer, _LAYERS):
        return None
    sizes = list(x.shape)
    if isinstance(layer, nn.Linear):
        if sizes[-1:] != [layer.in_features]:
            return f"input: expected {layer.in_features} features, got {sizes[-1:]}: {sizes}"
    elif x.dim() == 4:
        channels = next(getattr(layer, count) for count in _COUNTS if hasattr(layer, count))
        if sizes[1] != channels:
            last = sizes[3] == channels
            way = "; x.permute(0, 3, 1, 2) puts the channels before the pixels" if last else ""
            return f"input: expected {channels} channels, got {sizes[1]}: {sizes}{way}"
    elif fused:
        way = "; x[None] is a batch of one image" if x.dim() == 3 else ""
        return f"input: expected 4 dimensions [n, c, h, w], got {x.dim()}: {sizes}{way}"
    tensors = layer.weight, getattr(layer, "running_mean", None)
    own = next((t for t in tensors if t is not None), x)
    if x.device != own.device:
        here = str(own.device)
        return f"input: expected device {here} as its weights, got {x.device}; x.to({here!r})"
    casts = x.is_floating_point() and autocast_dtype(x) is not None
    mixes = x.dtype in HALVES and own.dtype is torch.float32 and not isinstance(layer, nn.Conv2d)
    if x.dtype != own.dtype and not casts and not mixes:
        return f"input: expected {own.dtype} as its weights, got {x.dtype}; x.to({own.dtype})"
    return None


def _error(error: Exception, path: str, words: str | None) -> Exception | None:
    said = str(error)
    if said.startswith((f"{path}: ", f"{path}.")):  # by a converted layer itself
        return None
    kind: Callable[[str], Exception] = type(error)
    return kind(f"{path}: {words or said}")


def _path(name: str, path: str) -> str:
    return f"{name}.{path}" if name and path else name or path
