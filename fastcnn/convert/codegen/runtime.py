"""What the generated code of a converted forward calls: torch's own modules, run by fused kernels.

A call whose input has no kernel (a layout that is not dense, a dtype or device without one, a
residual of other sizes) runs the modules one by one: fit.py says which, and why.
"""

from collections.abc import Callable, Sequence
from typing import Any, NamedTuple

import torch
import torch.nn.functional as F
from torch import Tensor, nn
from torch.autograd import forward_ad
from torch.nn.modules.batchnorm import _BatchNorm

from fastcnn import _C, functional
from fastcnn.common.activation import eager_activation
from fastcnn.common.autocast import autocast_dtype, cast, cast_dtype
from fastcnn.common.checks import as_convolved, is_channels_last
from fastcnn.common.conv_geometry import padding_of
from fastcnn.common.overrides import has_torch_function_variadic
from fastcnn.convert.codegen.fit import (
    Shortcut,
    StepModules,
    linears_unfit,
    notes,
    pieces_unfit,
    refuse,
    residual_unfit,
    resize_unfit,
    shortcuts_unfit,
    squeeze_unfit,
    unfit,
    unlike,
)
from fastcnn.convert.graph.guards import has_hooks
from fastcnn.convert.graph.layers import DEPTHWISE, Layer, act_inside
from fastcnn.convert.graph.patterns import INTERPOLATE
from fastcnn.convert.options import Options
from fastcnn.nn.batch_norm_act import running_statistics, step_momentum, uses_batch_statistics
from fastcnn.ops.batch_norm_act.concat import sizes_of
from fastcnn.ops.conv2d.float32_products import is_slow
from fastcnn.ops.conv_bn_act.composite import CompositeCall, too_small
from fastcnn.ops.conv_bn_act.folded import OF_CONV
from fastcnn.ops.conv_bn_act.interface import TrainingCall, training_call
from fastcnn.ops.conv_bn_act.weight_cache import MOST_SIZES, Attribute, attributes_of
from fastcnn.ops.depthwise_conv2d import is_depthwise, outruns_onednn
from fastcnn.ops.group_norm_act import pixel_norm_act
from fastcnn.ops.instance_norm_act import instance_norm_act
from fastcnn.ops.linear_act.folded import LinearAct
from fastcnn.ops.linear_act.interface import outruns_pytorch
from fastcnn.ops.upsample_conv2d.interface import by_taps, resize_of, upsample_conv2d

# interpolate's arguments by name, or the module that has them.
Resizing = nn.Upsample | dict[str, Any]
_RESIZING = INTERPOLATE[1:]  # all but the input

_OF_NORM = (
    "training", "track_running_stats", "running_mean", "running_var", "num_batches_tracked",
    "weight", "bias", "momentum", "eps",
)  # fmt: skip


def run_chain(
    x: Tensor, steps: Sequence[StepModules], residual: Shortcut, options: Options
) -> Tensor:
    """Run a chain; residual: None, a tensor, or the steps of a projection, () for x itself."""
    if runs_one_by_one(x, steps, residual, options):
        return one_by_one(x, steps, residual)
    added: Any = residual
    if isinstance(residual, Tensor):
        added = as_added(residual, x, steps)
    elif residual is not None:
        added = _steps(residual)
    return functional.conv_bn_act(x, _steps(steps), added, memory=options.memory)


def as_added(residual: Tensor, x: Tensor, steps: Sequence[StepModules]) -> Tensor:
    """Return a residual in the layout of the output to which it is added, as PyTorch adds any."""
    last = is_channels_last(x) or any(is_channels_last(conv.weight) for conv, *_ in steps)
    layout = torch.channels_last if last else torch.contiguous_format
    return residual.contiguous(memory_format=layout)


class Training(NamedTuple):
    """A chain's call in training, and as long as what it may be repeated."""

    call: TrainingCall | CompositeCall
    attributes: list[Attribute]
    parameters: list[Tensor]
    seen: list[tuple[Any, ...]]  # of these, which .to() changes in place
    counts: list[Tensor]  # of the batches

    def holds(self) -> bool:
        """Whether the modules are what they were."""
        unchanged = _C.first_changed(self.attributes, None, 0) < 0
        return unchanged and _kinds_of(self.parameters) == self.seen


class Chain:
    """run_chain() at one place of a model.

    What was asked of the modules and of an input in training is asked again where they are others:
    that was 150 of the 1030 us of a bottleneck's forward and backward (a Xeon with AVX-512).
    """

    def __init__(self, options: Options) -> None:
        self._options = options
        self._known: dict[Any, Training] = {}

    def __call__(self, x: Tensor, steps: Sequence[StepModules], residual: Shortcut) -> Tensor:
        """Run the chain."""
        added = residual if isinstance(residual, Tensor) else None
        images = (x,) if added is None else (x, added)
        if torch.compiler.is_compiling() or not _is_repeatable(images):
            return run_chain(x, steps, residual, self._options)
        shapes = [(t.shape, t.stride(), t.dtype) for t in images]
        key = autocast_dtype(x), steps, residual if added is None else None, *shapes
        known = self._known.get(key)
        if known is None or not known.holds():
            self._known.pop(key, None)
            known = self._made(x, steps, residual)
            if known is None:
                return run_chain(x, steps, residual, self._options)
            if len(self._known) >= MOST_SIZES:
                self._known.clear()
            self._known[key] = known
        if known.counts:
            torch._foreach_add_(known.counts, 1)
        return known.call(x, None if added is None else as_added(added, x, steps))

    def _made(self, x: Tensor, steps: Sequence[StepModules], residual: Shortcut) -> Training | None:
        """Return a call that can be repeated, None where none can."""
        every = (*steps, *(residual if isinstance(residual, tuple) else ()))
        attributes: list[Attribute] = []  # first: another thread may change them meanwhile
        for conv, bn, _, pool in every:
            of_step = _attributes_of(conv, bn, pool)
            if of_step is None or not bn.training:
                return None
            attributes += of_step
        if unfit(x, self._options) or residual_unfit(x, steps, residual):
            return None
        added: Any = _steps(residual, False) if isinstance(residual, tuple) else residual
        given = _steps(steps, False)
        call: TrainingCall | CompositeCall
        call = training_call(x, given, added, self._options.memory)
        why = too_small(cast_dtype(x, autocast_dtype(x)), call.most_values())
        automatic = self._options._replace(mode="train") == Options()
        if why is not None and automatic and not call.outruns_pytorch(x):
            refuse(steps[-1][1], why, self._options)
            call = CompositeCall(given, added if isinstance(residual, tuple) else None)
        norms = [bn for _, bn, _, _ in every]
        counts = [
            bn.num_batches_tracked
            for bn in norms
            if bn.track_running_stats and bn.num_batches_tracked is not None
        ]
        read = [(conv.weight, conv.bias, bn.weight, bn.bias) for conv, bn, _, _ in every]
        parameters = [t for tensors in read for t in tensors if t is not None]
        return Training(call, attributes, parameters, _kinds_of(parameters), counts)


def _is_repeatable(images: Sequence[Any]) -> bool:
    """Whether a call with these may be repeated with others like them."""
    if torch._C._are_functorch_transforms_active() or forward_ad._current_level >= 0:
        return False
    if has_torch_function_variadic(*images):
        return False
    return all([type(t) in (Tensor, nn.Parameter) and t.device.type == "cpu" for t in images])


def _attributes_of(conv: nn.Conv2d, bn: Any, pool: nn.MaxPool2d | None) -> list[Attribute] | None:
    """Return what _step() reads, None where that differs from call to call."""
    if not isinstance(bn, _BatchNorm) or isinstance(bn, nn.SyncBatchNorm) or bn.momentum is None:
        return None
    of_conv, of_norm = attributes_of(conv, OF_CONV), attributes_of(bn, _OF_NORM)
    of_pool = [] if pool is None else attributes_of(pool, ("kernel_size", "stride", "padding"))
    if of_conv is None or of_norm is None or of_pool is None:
        return None
    return of_conv + of_norm + of_pool


def _kinds_of(tensors: Sequence[Tensor]) -> list[tuple[Any, ...]]:
    return [(t.shape, t.dtype, t.device) for t in tensors]


def runs_one_by_one(
    x: Tensor, steps: Sequence[StepModules], residual: Shortcut, options: Options
) -> bool:
    """Whether a chain has no kernel for its input or its residual, and note why."""
    why = unfit(x, options) or residual_unfit(x, steps, residual)
    if why is not None:
        conv, bn, *_ = steps[-1]
        refuse(conv if bn is None else bn, why, options)
    return why is not None


def run_upsampled_chain(
    x: Tensor,
    concat: Tensor | None,
    concat_last: bool,
    how: Resizing,
    steps: Sequence[StepModules],
    residual: Shortcut,
    options: Options,
) -> Tensor:
    """Run a chain on an upsampled image, the first convolution where it can on the small one."""
    how = resizing(how)
    conv, bn, act, pool = steps[0]
    if not upsamples_small(x, concat, conv, how, options):
        y = run_interpolate(x, **how, concat=concat, concat_last=concat_last, options=options)
        return run_chain(y, steps, residual, options)
    beside: Any = {"concat": concat, "concat_last": concat_last}
    x = as_convolved(x, conv.weight)
    beside["concat"] = None if concat is None else as_convolved(concat, conv.weight)
    raw = upsample_conv2d(x, conv.weight, conv.bias, **beside, **how)
    added = residual if len(steps) == 1 else None
    assert added is None or isinstance(added, Tensor)
    y = run_layer_act(raw, bn, "batch_norm", act, added, options)
    y = y if pool is None else pool(y)
    return y if len(steps) == 1 else run_chain(y, steps[1:], residual, options)


def upsamples_small(
    x: Tensor, concat: Tensor | None, conv: nn.Conv2d, how: dict[str, Any], options: Options
) -> bool:
    """Whether a convolution of an upsampled image has a kernel that reads the small one."""
    why = unfit(x, options)
    if why is None and concat is not None:
        why = unlike(concat, None, x, autocast_dtype(x))
    if why is not None:
        return False
    absent: dict[str, Any] = {**dict.fromkeys(_RESIZING), "mode": "nearest"}
    return by_taps(x, concat, conv.weight, resize_of(x, **(absent | how)))


def resizing(how: Resizing) -> dict[str, Any]:
    """Return interpolate's arguments, given or an Upsample's."""
    if isinstance(how, nn.Upsample):
        return {name: getattr(how, name) for name in _RESIZING}
    return how


def run_blocks(
    x: Tensor,
    blocks: Sequence[tuple[Sequence[StepModules], Sequence[StepModules]]],
    options: Options,
) -> Tensor:
    """Run residual blocks whose inputs are recomputed in backward."""
    why = unfit(x, options) or shortcuts_unfit(x, blocks)
    if why is not None:
        refuse(blocks[-1][0][-1][1], why, options)
        for steps, shortcut in blocks:
            x = one_by_one(x, steps, shortcut)
        return x
    parts = [functional.ConvBnActBlock(_steps(b), _steps(s)) for b, s in blocks]
    return functional.conv_bn_act_blocks(x, parts, memory=options.memory)


def run_layer_act(
    x: Tensor, layer: Any, kind: str, act: Any, residual: Tensor | None, options: Options
) -> Tensor:
    """Run a layer of a kind, an addition (of batch norm) and an activation."""
    why = unfit(x, options)
    if why is None and residual is not None:
        why = unlike(residual, x.shape, x)
    if why is not None:
        refuse(layer, why, options)
    if why is not None or is_pytorchs(layer, x, act):
        y = layer(x)
        y = y if residual is None else y + residual
        return eager_activation(y, act) if act_inside(layer) == "none" else y
    return run_layer(x, layer, kind, act, residual)


def run_concat_norm(
    xs: tuple[Tensor, ...], norm: Any, act: Any, residual: Tensor | None, options: Options
) -> Tensor:
    """Run a batch norm of a concatenation, an addition and an activation.

    Pieces of several types or layouts are concatenated, as PyTorch does it.
    """
    why = pieces_unfit(xs, options)
    if why is None and residual is not None:
        why = unlike(residual, sizes_of(xs), xs[0])
    if why is not None:
        return run_layer_act(torch.cat(xs, 1), norm, "batch_norm", act, residual, options)
    return run_layer(xs, norm, "batch_norm", act, residual)


def run_layer(x: Any, norm: Any, kind: str, act: Any, residual: Tensor | None = None) -> Tensor:
    """Run a norm (layers.NORMS) or a depthwise convolution that its input fits.

    x: a tensor, of a batch norm also those whose concatenation it is.
    """
    if kind == DEPTHWISE:
        conv, window = norm, (norm.stride, padding_of(norm), norm.dilation)
        return functional.depthwise_conv2d(x, conv.weight, conv.bias, *window, act=act)
    if kind == "batch_norm":
        step, (sync, group) = _batch_norm(norm), _sharing(norm)
        return functional.batch_norm_act(
            x, *step, residual=residual, act=act, sync=sync, process_group=group
        )
    if kind == "group_norm":
        return functional.group_norm_act(
            x, norm.num_groups, norm.weight, norm.bias, norm.eps, act=act
        )
    if kind == "layer_norm_2d":
        channels = norm.normalized_shape[0]
        return pixel_norm_act("LayerNorm2d", x, channels, norm.weight, norm.bias, norm.eps, act)
    of_input = norm.training or not norm.track_running_stats
    momentum = 0.0 if norm.momentum is None else norm.momentum
    return instance_norm_act(
        "InstanceNorm2d", x, norm.running_mean, norm.running_var, norm.weight, norm.bias,
        of_input, momentum, norm.eps, act,
    )  # fmt: skip


def run_interpolate(
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
    layer: nn.Upsample | None = None,
) -> Tensor:
    """Resize, for a layer or a function, and write beside concat's channels where there is one."""
    why = unfit(x, options) or resize_unfit(x, scale_factor, mode, recompute_scale_factor)
    if why is None and concat is not None:
        why = unlike(concat, None, x)
    how: Any = (size, scale_factor, mode, align_corners, recompute_scale_factor)
    if why is None:
        return functional.interpolate(x, *how, concat=concat, concat_last=concat_last)
    refuse(layer, why, options)
    y = F.interpolate(x, *how)
    if concat is None:
        return y
    return torch.cat([y, concat] if concat_last else [concat, y], 1)


def run_upsample(
    x: Tensor, layer: nn.Upsample, concat: Tensor | None, concat_last: bool, options: Options
) -> Tensor:
    """Run an Upsample module, and write the result beside concat's channels."""
    beside: Any = {"concat": concat, "concat_last": concat_last}
    return run_interpolate(x, **resizing(layer), **beside, options=options, layer=layer)


def run_dropout(
    x: Tensor, p: float = 0.5, training: bool = True, inplace: bool = False, *, options: Options
) -> Tensor:
    """Run F.dropout."""
    return _dropout(x, p, training, inplace, False, options, None)


def run_dropout2d(
    x: Tensor, p: float = 0.5, training: bool = True, inplace: bool = False, *, options: Options
) -> Tensor:
    """Run F.dropout2d."""
    return _dropout(x, p, training, inplace, True, options, None)


def run_dropout_layer(x: Tensor, layer: nn.Dropout | nn.Dropout2d, options: Options) -> Tensor:
    """Run a Dropout or Dropout2d module."""
    per_channel = isinstance(layer, nn.Dropout2d)
    return _dropout(x, layer.p, layer.training, layer.inplace, per_channel, options, layer)


def _dropout(
    x: Tensor,
    p: float,
    training: bool,
    inplace: bool,
    per_channel: bool,
    options: Options,
    layer: nn.Module | None,
) -> Tensor:
    if not training:
        return x
    why = unfit(x, options, dims=4 if per_channel else None)
    if why is None:
        return functional.dropout(x, p, training, inplace, per_channel=per_channel)
    refuse(layer, why, options)
    return (F.dropout2d if per_channel else F.dropout)(x, p, training, inplace)


def run_squeeze_excite(
    x: Tensor,
    fc1: nn.Conv2d,
    fc2: nn.Conv2d | None,
    act: Any,
    gate: Any,
    dims: tuple[int, ...],
    options: Options,
) -> Tensor:
    """Run squeeze-and-excitation; dims: of its mean, () for adaptive_avg_pool2d's."""
    second = (None, None) if fc2 is None else (fc2.weight, fc2.bias)
    parameters = (fc1.weight, fc1.bias, *second)
    why = unfit(x, options) or squeeze_unfit(x, fc1.in_channels, parameters)
    if why is None:
        return functional.squeeze_excite(x, *parameters, act=act, gate=gate)
    refuse(fc1 if fc2 is None else fc2, why, options)
    z = fc1(x.mean(dims, keepdim=True) if dims else F.adaptive_avg_pool2d(x, 1))
    z = z if fc2 is None else fc2(eager_activation(z, act))
    return x * (z.sigmoid() if gate == "sigmoid" else F.hardsigmoid(z))


def run_linears(x: Tensor, steps: Sequence[LinearAct], options: Options) -> Tensor:
    """Run linear layers and activations one behind the other, each by what is faster."""
    # Once, as nn.Linear does: a parametrization computes them, and spectral_norm's moves with it.
    parameters = [(linear.weight, linear.bias) for linear, _ in steps]
    why, fused = linears_unfit(x, parameters, options), False
    if why is None:
        x = cast(x, autocast_dtype(x))
    for (weight, bias), (_, act) in zip(parameters, steps, strict=True):
        if why is None and outruns_pytorch(x, weight, act):
            x, fused = functional.linear_act(x, weight, bias, act=act), True
        else:
            x = eager_activation(F.linear(x, weight, bias), act)
    if why is not None:
        refuse(steps[-1][0], why, options)
    elif not fused and not torch.compiler.is_compiling():
        notes[steps[-1][0]] = "PyTorch's kernel is as fast there"
    return x


def run_linear(x: Any, linear: nn.Linear, options: Options) -> Any:
    """Call a linear layer that nothing is fused with, in float32 where a half type gains by it."""
    plain = type(linear) is nn.Linear and not has_hooks(linear) and "forward" not in vars(linear)
    if not plain or not isinstance(x, Tensor) or not is_slow(cast_dtype(x, autocast_dtype(x))):
        return linear(x)
    if linears_unfit(x, ((linear.weight, linear.bias),), options) is None:
        x = cast(x, autocast_dtype(x))
        if outruns_pytorch(x, linear.weight, "none"):
            return functional.linear_act(x, linear.weight, linear.bias)
    return linear(x)


def one_by_one(x: Tensor, steps: Sequence[StepModules], residual: Shortcut) -> Tensor:
    """Run the modules as they are."""
    added = residual
    if added is not None and not isinstance(added, Tensor):
        added = one_by_one(x, added, None)
    for i, (conv, bn, act, pool) in enumerate(steps, start=1):
        x = conv(x) if bn is None else bn(conv(x))
        if added is not None and i == len(steps):
            x = x + added
        if bn is None or act_inside(bn) == "none":
            x = eager_activation(x, act)
        x = x if pool is None else pool(x)
    return x


def _steps(steps: Sequence[StepModules], counts: bool = True) -> list[functional.ConvBnActStep]:
    """Return what the modules are now; counts: and count one more batch."""
    return [_step(*step, counts) for step in steps]


def _step(
    conv: nn.Conv2d, bn: nn.BatchNorm2d, act: str, pool: nn.MaxPool2d | None, counts: bool
) -> functional.ConvBnActStep:
    moves = (conv.stride, padding_of(conv), conv.dilation)
    geometry: Any = (conv.weight, conv.bias, *moves, conv.groups)
    pooling = None
    if pool is not None:
        window: Any = (pool.kernel_size, pool.stride, pool.padding)
        pooling = functional.MaxPool(*window)
    norm: Any = (*_batch_norm(bn, counts), act, *_sharing(bn), pooling)
    return functional.ConvBnActStep(*geometry, *norm)


def _batch_norm(bn: Any, counts: bool = True) -> tuple[Any, ...]:
    """Return running mean, running var, weight, bias, training, momentum and eps."""
    if not isinstance(bn, _BatchNorm):  # torchvision's frozen one
        return bn.running_mean, bn.running_var, bn.weight, bn.bias, False, 0.0, bn.eps
    fixed = (bn.weight, bn.bias, uses_batch_statistics(bn))
    momentum = step_momentum(bn) if counts else bn.momentum
    return *running_statistics(bn), *fixed, momentum, bn.eps


def _sharing(bn: nn.Module) -> tuple[bool, Any]:
    """Return sync and process_group."""
    if not isinstance(bn, nn.SyncBatchNorm) or not bn.training:
        return False, None
    return True, bn.process_group


def is_pytorchs(layer: Any, x: Tensor, act: str = "none") -> bool:
    """Whether an input has a kernel, but not one that is known to be faster than PyTorch's."""
    if not isinstance(layer, nn.Conv2d):
        return False
    ours = is_depthwise(x, layer.weight, layer.groups)
    if not ours or (act == "none" and not outruns_onednn(x, layer.weight, layer.bias)):
        if not torch.compiler.is_compiling():
            notes[layer] = "PyTorch's kernel is as fast there"
        return True
    return False


def layer_fits(layer: nn.Module, x: Any, options: Options) -> bool:
    """Whether a layer by itself runs by its kernel; note why not."""
    why = unfit(x, options, dims=None if isinstance(layer, nn.Dropout) else 4)
    if why is not None:
        refuse(layer, why, options)
    return why is None and not is_pytorchs(layer, x)


def layer_call(module: nn.Module, layer: Layer) -> Callable[[Tensor, Any], Tensor]:
    """Return what runs a layer by itself on an input that fits."""
    kind, act = layer.kind, layer.act or "none"
    if kind == "dropout":
        return lambda x, m: run_dropout_layer(x, m, Options())
    if kind == "upsample":
        return lambda x, m: run_upsample(x, m, None, False, Options())
    assert kind is not None
    return lambda x, norm: run_layer(x, norm, kind, act)
