"""What the generated code of a converted forward calls: torch's own modules, run by fused kernels.

A call whose input has no kernel (a layout that is not dense, a dtype or device without one, a
residual of other sizes) runs the modules one by one, and `notes` holds the reason, of a function a
warning; with an explicit backend it raises.
"""

import warnings
from collections.abc import Callable, Sequence
from typing import Any, NamedTuple
from weakref import WeakKeyDictionary

import torch
import torch.nn.functional as F
from torch import Tensor, nn
from torch._C._functorch import TransformType
from torch._functorch.pyfunctorch import retrieve_all_functorch_interpreters
from torch.autograd import forward_ad
from torch.utils._python_dispatch import is_traceable_wrapper_subclass

from fastcnn import _C, functional
from fastcnn.common.activation import ACTIVATIONS
from fastcnn.common.autocast import autocast_dtype
from fastcnn.common.checks import FLOATS, memory_format_of
from fastcnn.common.conv_geometry import output_size, pair
from fastcnn.convert.graph.layers import kind_of, own_act
from fastcnn.convert.graph.patterns import INTERPOLATE
from fastcnn.nn.batch_norm_act import running_statistics, step_momentum, uses_batch_statistics
from fastcnn.ops.conv_bn_act.step import Memory
from fastcnn.ops.group_norm_act import pixel_norm_act
from fastcnn.ops.instance_norm_act import instance_norm_act
from fastcnn.ops.upsample_conv2d.interface import by_taps, resize_of, upsample_conv2d

# conv, batch norm or, in folded chains, None; activation; max pooling or None.
Step = tuple[nn.Conv2d, Any, str, nn.MaxPool2d | None]
Shortcut = Tensor | Sequence[Step] | None
# interpolate's arguments by name, or the module that has them.
Resizing = nn.Upsample | dict[str, Any]

# By the module that a call ends in: why its last unfused call was not fused.
notes: WeakKeyDictionary[nn.Module, str] = WeakKeyDictionary()

_said: set[str] = set()


_RESIZING = INTERPOLATE[1:]  # all but the input
HAS_CUDA = bool(_C.cuda_version)


_is_wrapper: Callable[[Any], bool] = is_traceable_wrapper_subclass


class Options(NamedTuple):
    """What was asked of convert."""

    mode: str = "train"
    backend: str = "auto"
    memory: Memory = "default"


def conv_bn_act(x: Tensor, steps: Sequence[Step], residual: Shortcut, options: Options) -> Tensor:
    """Run a chain; residual: None, a tensor, or the steps of a projection, () for x itself."""
    if runs_one_by_one(x, steps, residual, options):
        return one_by_one(x, steps, residual)
    added = residual if residual is None or isinstance(residual, Tensor) else _steps(residual)
    return functional.conv_bn_act(x, _steps(steps), added, memory=options.memory)


def runs_one_by_one(x: Tensor, steps: Sequence[Step], residual: Shortcut, options: Options) -> bool:
    """Whether a chain has no kernel for its input or its residual, and note why."""
    why = unfit(x, options) or _residual_unfit(x, steps, residual)
    if why is not None:
        conv, bn, *_ = steps[-1]
        _refuse(conv if bn is None else bn, why, options)
    return why is not None


def upsampled_chain(
    x: Tensor,
    concat: Tensor | None,
    concat_last: bool,
    how: Resizing,
    steps: Sequence[Step],
    residual: Shortcut,
    options: Options,
) -> Tensor:
    """Run a chain on an upsampled image, the first convolution where it can on the small one."""
    how = resizing(how)
    conv, bn, act, pool = steps[0]
    if not upsamples_small(x, concat, conv, how, options):
        y = interpolate(x, **how, concat=concat, concat_last=concat_last, options=options)
        return conv_bn_act(y, steps, residual, options)
    beside: Any = {"concat": concat, "concat_last": concat_last}
    raw = upsample_conv2d(x, conv.weight, conv.bias, **beside, **how)
    added = residual if len(steps) == 1 else None
    assert added is None or isinstance(added, Tensor)
    y = norm_act(raw, bn, "batch_norm", act, added, options)
    y = y if pool is None else pool(y)
    return y if len(steps) == 1 else conv_bn_act(y, steps[1:], residual, options)


def upsamples_small(
    x: Tensor, concat: Tensor | None, conv: nn.Conv2d, how: dict[str, Any], options: Options
) -> bool:
    """Whether a convolution of an upsampled image has a kernel that reads the small one."""
    why = unfit(x, options)
    if why is None and concat is not None:
        why = _unlike(concat, None, x, cast=autocast_dtype(x) is not None)
    if why is not None:
        return False
    absent: dict[str, Any] = {**dict.fromkeys(_RESIZING), "mode": "nearest"}
    return by_taps(x, concat, conv.weight, resize_of(x, **(absent | how)))


def resizing(how: Resizing) -> dict[str, Any]:
    """Return interpolate's arguments, given or an Upsample's."""
    if isinstance(how, nn.Upsample):
        return {name: getattr(how, name) for name in _RESIZING}
    return how


def conv_bn_act_blocks(
    x: Tensor, blocks: Sequence[tuple[Sequence[Step], Sequence[Step]]], options: Options
) -> Tensor:
    """Run residual blocks whose inputs are rebuilt in backward."""
    why = unfit(x, options)
    if why is not None:
        _refuse(blocks[-1][0][-1][1], why, options)
        for steps, shortcut in blocks:
            x = one_by_one(x, steps, shortcut)
        return x
    parts = [functional.ConvBnActBlock(_steps(b), _steps(s)) for b, s in blocks]
    return functional.conv_bn_act_blocks(x, parts, memory=options.memory)


def norm_act(
    x: Tensor, norm: Any, kind: str, act: Any, residual: Tensor | None, options: Options
) -> Tensor:
    """Run a norm layer, an addition (of batch norm) and an activation."""
    why = unfit(x, options)
    if why is None and residual is not None:
        why = _unlike(residual, x.shape, x)
    if why is not None:
        _refuse(norm, why, options)
        y = norm(x)
        return ACTIVATIONS[act](y if residual is None else y + residual)
    return run_norm(x, norm, kind, act, residual)


def run_norm(x: Tensor, norm: Any, kind: str, act: Any, residual: Tensor | None = None) -> Tensor:
    """Run a norm layer of a kind (layers.NORMS) that its input fits."""
    if kind == "batch_norm":
        step = _batch_norm(norm)
        return functional.batch_norm_act(x, *step, residual=residual, act=act, **_group(norm))
    if kind == "group_norm":
        return functional.group_norm_act(
            x, norm.num_groups, norm.weight, norm.bias, norm.eps, act=act
        )
    if kind == "layer_norm_2d":
        channels = norm.normalized_shape[0]
        return pixel_norm_act("LayerNorm2d", x, channels, norm.weight, norm.bias, norm.eps, act)
    if norm.training or not norm.track_running_stats:
        momentum = 0.0 if norm.momentum is None else norm.momentum
        return instance_norm_act(
            "InstanceNorm2d", x, norm.running_mean, norm.running_var, norm.weight, norm.bias,
            momentum, norm.eps, act,
        )  # fmt: skip
    return functional.batch_norm_act(
        x, norm.running_mean, norm.running_var, norm.weight, norm.bias, False, 0.0, norm.eps,
        act=act,
    )  # fmt: skip


def interpolate(
    x: Tensor,
    size: Any = None,
    scale_factor: Any = None,
    mode: str = "nearest",
    align_corners: bool | None = None,
    recompute_scale_factor: bool | None = None,
    *,
    concat: Tensor | None,
    concat_last: bool,
    options: Options,
) -> Tensor:
    """Resize, and write the result beside concat's channels where there is one."""
    why = unfit(x, options)
    if why is None and concat is not None:
        why = _unlike(concat, None, x)
    how: Any = (size, scale_factor, mode, align_corners, recompute_scale_factor)
    if why is None:
        return functional.interpolate(x, *how, concat=concat, concat_last=concat_last)
    _refuse(None, why, options)
    y = F.interpolate(x, *how)
    if concat is None:
        return y
    return torch.cat([y, concat] if concat_last else [concat, y], 1)


def upsample(
    x: Tensor, layer: nn.Upsample, concat: Tensor | None, concat_last: bool, options: Options
) -> Tensor:
    """Run an Upsample module, and write the result beside concat's channels."""
    how = resizing(layer)
    return interpolate(x, **how, concat=concat, concat_last=concat_last, options=options)


def dropout(
    x: Tensor, p: float = 0.5, training: bool = True, inplace: bool = False, *, options: Options
) -> Tensor:
    """Run F.dropout."""
    return _dropout(x, p, training, inplace, False, options)


def dropout2d(
    x: Tensor, p: float = 0.5, training: bool = True, inplace: bool = False, *, options: Options
) -> Tensor:
    """Run F.dropout2d."""
    return _dropout(x, p, training, inplace, True, options)


def _dropout(
    x: Tensor, p: float, training: bool, inplace: bool, per_channel: bool, options: Options
) -> Tensor:
    if not training:
        return x
    why = unfit(x, options, dims=4 if per_channel else None)
    if why is None:
        return functional.dropout(x, p, training, inplace, per_channel=per_channel)
    _refuse(None, why, options)
    return (F.dropout2d if per_channel else F.dropout)(x, p, training, inplace)


def unfit(x: Any, options: Options, dims: int | None = 4) -> str | None:
    """Say why there is no kernel for an input, if so; dims: how many it must have, if it must."""
    if not isinstance(x, Tensor):
        return f"its input is a {type(x).__name__}"
    kind = type(x)
    if kind is not Tensor and _is_wrapper(x):  # as DTensor
        return f"its input is a {kind.__name__}"
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
    dense = memory_format_of(x) is not None if x.dim() == 4 else x.is_contiguous()
    return None if dense else f"its input is not dense: strides {x.stride()} of {list(x.shape)}"


def _is_transformed() -> bool:
    """Whether there is a transform that the kernels lack: any but torch.func.grad."""
    if forward_ad._current_level >= 0:
        return True
    if not torch._C._are_functorch_transforms_active():
        return False
    return any(i.key() != TransformType.Grad for i in retrieve_all_functorch_interpreters())


def _residual_unfit(x: Tensor, steps: Sequence[Step], residual: Shortcut) -> str | None:
    if residual is None or (not isinstance(residual, Tensor) and len(residual) > 0):
        return None
    sizes = list(x.shape)
    for conv, _, _, pool in steps:
        kernel, *how = conv.kernel_size, conv.stride, conv.padding, conv.dilation
        sizes = [sizes[0], conv.out_channels, *_reduced(sizes[2:], kernel, *how)]
        if pool is not None:
            stride = pool.stride or pool.kernel_size
            sizes[2:] = _reduced(sizes[2:], pool.kernel_size, stride, pool.padding, 1)
    added = residual if isinstance(residual, Tensor) else x
    return _unlike(added, sizes, x, cast=autocast_dtype(x) is not None)


def _reduced(sizes: Sequence[int], *how: Any) -> list[int]:
    """Return height and width behind a window of a kernel, stride, padding and dilation."""
    return output_size(sizes, *(pair("window", "size", value) for value in how))


def _unlike(t: Any, sizes: Sequence[int] | None, x: Tensor, cast: bool = False) -> str | None:
    """Say why a second input cannot go with x, if so.

    sizes: that it must have, if it must. cast: autocast brings both to one dtype.
    """
    if not isinstance(t, Tensor):
        return f"what is added is a {type(t).__name__}"
    if sizes is not None and list(t.shape) != list(sizes):
        return f"what is added has sizes {list(t.shape)} beside {list(sizes)}"
    if t.dim() != 4 or t.device != x.device:
        return f"its second input has {t.dim()} dimensions and is on {t.device}"
    if t.dtype != x.dtype and not cast:
        return f"its second input is {t.dtype} beside {x.dtype}"
    here, there = memory_format_of(t), memory_format_of(x)
    if here is None:
        return f"its second input is not dense: strides {t.stride()} of {list(t.shape)}"
    if here is not there and not t.is_contiguous(memory_format=there or torch.contiguous_format):
        return f"its second input is {here} beside {there}"
    return None


def _refuse(module: nn.Module | None, why: str, options: Options) -> None:
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
            stacklevel=4,
        )


def one_by_one(x: Tensor, steps: Sequence[Step], residual: Shortcut) -> Tensor:
    """Run the modules as they are."""
    added = residual
    if added is not None and not isinstance(added, Tensor):
        added = one_by_one(x, added, None)
    for i, (conv, bn, act, pool) in enumerate(steps, start=1):
        x = conv(x) if bn is None else bn(conv(x))
        if added is not None and i == len(steps):
            x = x + added
        if bn is None or own_act(bn) == "none":
            x = ACTIVATIONS[act](x)
        x = x if pool is None else pool(x)
    return x


def _steps(steps: Sequence[Step]) -> list[functional.ConvBnActStep]:
    return [_step(*step) for step in steps]


def _step(
    conv: nn.Conv2d, bn: nn.BatchNorm2d, act: str, pool: nn.MaxPool2d | None
) -> functional.ConvBnActStep:
    mean, var, weight, bias, training, momentum, eps = _batch_norm(bn)
    group = _group(bn)
    geometry: Any = (conv.weight, conv.bias, conv.stride, conv.padding, conv.dilation, conv.groups)
    pooling = None
    if pool is not None:
        window: Any = (pool.kernel_size, pool.stride, pool.padding)
        pooling = functional.MaxPool(*window)
    norm: Any = (mean, var, weight, bias, training, momentum, eps, act)
    step = functional.ConvBnActStep(*geometry, *norm)
    return step._replace(pool=pooling, **group)


def _batch_norm(bn: Any) -> tuple[Any, ...]:
    """Return running mean, running var, weight, bias, training, momentum and eps."""
    if not isinstance(bn, nn.modules.batchnorm._BatchNorm):  # torchvision's frozen one
        return bn.running_mean, bn.running_var, bn.weight, bn.bias, False, 0.0, bn.eps
    fixed = (bn.weight, bn.bias, uses_batch_statistics(bn))
    return *running_statistics(bn), *fixed, step_momentum(bn), bn.eps


def _group(bn: nn.Module) -> dict[str, Any]:
    if not isinstance(bn, nn.SyncBatchNorm) or not bn.training:
        return {}
    return {"sync": True, "process_group": bn.process_group}


def layer_unfit(layer: nn.Module, x: Any, options: Options) -> str | None:
    """Say why a layer by itself runs as PyTorch's, if so, and note it."""
    why = unfit(x, options, dims=None if isinstance(layer, nn.Dropout) else 4)
    if why is not None:
        _refuse(layer, why, options)
    return why


def layer_call(layer: nn.Module) -> Callable[[Tensor, Any], Tensor]:
    """Return what runs a layer by itself on an input that fits."""
    kind = kind_of(layer)
    if kind == "dropout":
        per_channel = isinstance(layer, nn.Dropout2d)
        return lambda x, m: _dropout(x, m.p, m.training, m.inplace, per_channel, Options())
    if kind == "upsample":
        return lambda x, m: upsample(x, m, None, False, Options())
    assert kind is not None
    act = own_act(layer) or "none"
    return lambda x, norm: run_norm(x, norm, kind, act)
