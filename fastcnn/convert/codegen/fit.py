"""Which inputs have a kernel, and what is said of those that have none.

Of a call by a module `notes` holds the reason, of a function a warning; with an explicit backend it
is an error.
"""

import sys
import warnings
from collections.abc import Callable, Sequence
from typing import Any
from weakref import WeakKeyDictionary

import torch
from torch import Tensor, nn
from torch._C._functorch import TransformType
from torch._functorch.pyfunctorch import retrieve_all_functorch_interpreters
from torch.autograd import forward_ad
from torch.utils._python_dispatch import is_traceable_wrapper_subclass

from fastcnn import _C
from fastcnn.common.autocast import autocast_dtype, cast_dtype
from fastcnn.common.checks import FLOATS, HALVES, memory_format_of, one_of
from fastcnn.common.conv_geometry import output_size, padding_of, pair
from fastcnn.convert.options import Options
from fastcnn.ops.batch_norm_act.concat import is_piece

# conv, batch norm or, in folded chains, None; activation; max pooling or None.
StepModules = tuple[nn.Conv2d, Any, str, nn.MaxPool2d | None]
Shortcut = Tensor | Sequence[StepModules] | None
WeightBias = tuple[Tensor, Tensor | None]
HAS_CUDA = bool(_C.cuda_version)

# By the module that a call ends in: why its last unfused call was not fused.
notes: WeakKeyDictionary[nn.Module, str] = WeakKeyDictionary()

_said: set[str] = set()
_is_wrapper: Callable[[Any], bool] = is_traceable_wrapper_subclass


def unfit(x: Any, options: Options, dims: int | None = 4) -> str | None:
    """Say why there is no kernel for an input, if so; dims: how many it must have, if it must."""
    if not isinstance(x, Tensor):
        return f"its input is {one_of(type(x))}"
    if type(x) is not Tensor and _is_wrapper(x):  # as DTensor
        return f"its input is {one_of(type(x))}"
    if not torch.compiler.is_compiling() and _is_transformed():
        return "torch.func.vmap or forward-mode differentiation is on"
    if dims is not None and x.dim() != dims:
        return f"its input has {x.dim()} dimensions, the kernels take {dims}"
    if x.dtype not in FLOATS:
        return f"its input is {x.dtype}"
    device = x.device.type
    if device not in ("cpu", "cuda", "meta") or (device == "cuda" and not HAS_CUDA):
        return f"this build has no kernels for {device}"
    if device == "cuda" and x.dtype is torch.float64:
        return "there are no CUDA kernels for float64"
    if options.backend not in ("auto", device):
        return f"its input is on {device}"
    if x.layout is not torch.strided:
        return f"its input is {x.layout}"
    dense = memory_format_of(x) is not None if x.dim() == 4 else x.is_contiguous()
    return None if dense else f"its input is not dense: strides {x.stride()} of {list(x.shape)}"


def _is_transformed() -> bool:
    """Whether there is a transform that the kernels lack: any but torch.func.grad."""
    if forward_ad._current_level >= 0:
        return True
    if not torch._C._are_functorch_transforms_active():
        return False
    return any(i.key() != TransformType.Grad for i in retrieve_all_functorch_interpreters())


def residual_unfit(x: Tensor, steps: Sequence[StepModules], residual: Shortcut) -> str | None:
    """Say why what a chain adds cannot go with its output, if so."""
    if residual is None:
        return None
    if isinstance(residual, (tuple, list)):
        return shortcuts_unfit(x, [(steps, residual)])
    return unlike(residual, _sizes_behind(x.shape, steps), x, autocast_dtype(x))


def shortcuts_unfit(
    x: Tensor, blocks: Sequence[tuple[Sequence[StepModules], Sequence[StepModules]]]
) -> str | None:
    """Say why what the shortcuts of blocks give cannot be added by the kernels, if so."""
    sizes: Sequence[int] = x.shape
    for steps, shortcut in blocks:
        added, sizes = _sizes_behind(sizes, shortcut), _sizes_behind(sizes, steps)
        if added != sizes:  # which PyTorch may broadcast
            return f"what is added has sizes {added} beside {sizes}"
    return None


def _sizes_behind(sizes: Sequence[int], steps: Sequence[StepModules]) -> list[int]:
    """Return the sizes of what steps make of an input."""
    sizes = list(sizes)
    for conv, _, _, pool in steps:
        window: Any = conv.kernel_size, conv.stride, padding_of(conv), conv.dilation
        sizes = [sizes[0], conv.out_channels, *_reduced(sizes[2:], window)]
        if pool is not None:
            stride = pool.stride or pool.kernel_size
            sizes[2:] = _reduced(sizes[2:], (pool.kernel_size, stride, pool.padding))
    return sizes


def _reduced(sizes: Sequence[int], window: Sequence[Any]) -> list[int]:
    """Return height and width behind a window, whose numbers are pairs or one for both sides."""
    pairs = [v if type(v) is tuple and len(v) == 2 else pair("window", "size", v) for v in window]
    return output_size(sizes, *pairs)


def unlike(
    t: Any, sizes: Sequence[int] | None, x: Tensor, dtype: torch.dtype | None = None
) -> str | None:
    """Say why a second input cannot go with x, if so.

    sizes: that it must have, if it must. dtype: what autocast casts both to, if it does.
    """
    if not isinstance(t, Tensor):
        return f"what is added is {one_of(type(t))}"
    if sizes is not None and list(t.shape) != list(sizes):
        return f"what is added has sizes {list(t.shape)} beside {list(sizes)}"
    if t.dim() != 4 or t.device != x.device:
        return f"its second input has {t.dim()} dimensions and is on {t.device}"
    if cast_dtype(t, dtype) != cast_dtype(x, dtype):
        return f"its second input is {t.dtype} beside {x.dtype}"
    here, there = memory_format_of(t), memory_format_of(x)
    if here is None:
        return f"its second input is not dense: strides {t.stride()} of {list(t.shape)}"
    if here is not there and not t.is_contiguous(memory_format=there or torch.contiguous_format):
        return f"its second input is {here} beside {there}"
    return None


def pieces_unfit(xs: Sequence[Any], options: Options) -> str | None:
    """Say why there is no kernel for tensors that are read as one along their channels, if so."""
    why = unfit(xs[0], options)
    if why is not None:
        return why
    first, (n, _, h, w), layout = xs[0], xs[0].shape, memory_format_of(xs[0])
    for x in xs[1:]:
        if type(x) is not Tensor or not is_piece(x, first, layout):
            why = unfit(x, options) or unlike(x, [n, x.shape[1], h, w], first)
        if why is not None:
            return why
    return None


def resize_unfit(x: Tensor, scale_factor: Any, mode: str, recomputes: bool | None) -> str | None:
    """Say why a resize by a factor is not the kernels', if so.

    By nearest pixels with a factor just above 1, which keeps a side as it is. PyTorch's kernel on
    the CPU copies such images up to h + w = 128, and shifts larger ones by a pixel.
    """
    if mode != "nearest" or scale_factor is None or recomputes:
        return None
    factors = scale_factor if isinstance(scale_factor, (tuple, list)) else [scale_factor] * 2
    for side, factor in zip(x.shape[2:], factors, strict=False):
        if 1 < factor < 2 and int(side * factor) == side:
            return f"its factor keeps a side as it is: {factor} of {side} pixels"
    return None


def squeeze_unfit(x: Tensor, c: int, parameters: Sequence[Tensor | None]) -> str | None:
    """Say why squeeze-and-excitation of c channels is PyTorch's own, if so: its errors too.

    Autocast casts the gate, and the product of it and x is of the larger type.
    """
    on, own = autocast_dtype(x), x.dtype
    if on is not None and own not in (on, torch.float32, torch.float64):
        return f"its input is {own} where autocast casts to {on}"
    if x.shape[1] != c:
        return f"its input has {x.shape[1]} channels where its weights take {c}"
    for t in parameters:
        if t is None or (t.dtype is own and t.device == x.device):
            continue
        if on is None or t.dtype is not torch.float32 or own not in HALVES or t.device != x.device:
            return f"its weights are {t.dtype} on {t.device}, its input {own} on {x.device}"
    return None


def linears_unfit(x: Any, parameters: Sequence[WeightBias], options: Options) -> str | None:
    """Say why linear layers of an input are PyTorch's own, if so: its errors too."""
    why = unfit(x, options, dims=None)
    if why is not None:
        return why
    if x.device.type == "cuda":
        return "it runs fused on the CPU alone"
    on, sizes = autocast_dtype(x), x.shape[-1:]
    for weight, bias in parameters:
        if sizes != weight.shape[1:]:
            return f"its input ends in sizes {list(sizes)}, its weight has {list(weight.shape)}"
        sizes = weight.shape[:1]
        if bias is not None and bias.shape != sizes:  # which PyTorch may broadcast
            return f"its bias has sizes {list(bias.shape)}, its weight {list(weight.shape)}"
        for t in (weight, bias):
            if t is None:
                continue
            if t.layout is not torch.strided:
                return f"its weights are {t.layout}"
            if cast_dtype(t, on) != cast_dtype(x, on) or t.device != x.device or _is_wrapper(t):
                return f"its weights are {t.dtype} on {t.device}, its input {x.dtype} on {x.device}"
    return None


def refuse(module: nn.Module | None, why: str, options: Options) -> None:
    """Note that a call is not fused, or raise where a backend was asked for."""
    if options.backend != "auto":
        raise ValueError(
            f"convert: backend={options.backend!r}: expected an input for its kernels, but {why}"
        )
    if torch.compiler.is_compiling():
        return
    if module is not None:
        notes[module] = why
    elif (kind := why.split(":")[0]) not in _said:  # of a function, which report cannot ask
        _said.add(kind)
        warnings.warn(
            f"fastcnn.convert: an interpolate or a dropout runs as PyTorch's, since {why}",
            stacklevel=caller_level(),
        )


def caller_level() -> int:
    """Return the stacklevel, for who asks, of the code that has called a converted module.

    Between them is PyTorch's code, and that of convert, whose fused forwards have no module.
    """
    level, frame = 1, sys._getframe(1)
    between = ("torch.", "fastcnn.convert.")
    while frame.f_back and frame.f_globals.get("__name__", between[1]).startswith(between):
        level, frame = level + 1, frame.f_back
    return level
