"""The public functions, with the signatures of torch.nn.functional where it has one."""

from collections.abc import Sequence
from typing import Any, Literal

import torch
from torch import Tensor
from torch.distributed import ProcessGroup

from fastcnn.common.activation import Activation
from fastcnn.common.overrides import (
    has_override_inside,
    has_torch_function_variadic,
    overridable,
    overridden,
)
from fastcnn.ops import (
    depthwise_conv2d as _depthwise_conv2d,
    dropout as _dropout,
    group_norm_act as _group_norm_act,
    squeeze_excite as _squeeze_excite,
)
from fastcnn.ops.augment import interface as _augment
from fastcnn.ops.augment.parameters import AugmentParameters
from fastcnn.ops.batch_norm_act import interface as _batch_norm_act
from fastcnn.ops.conv2d_int8 import interface as _conv2d_int8
from fastcnn.ops.conv2d_int8.packed_weight import (
    PackedConv2dInt8,
    pack_conv2d_int8 as _pack_conv2d_int8,
)
from fastcnn.ops.conv_bn_act import interface as _conv_bn_act
from fastcnn.ops.conv_bn_act.step import ConvBnActBlock, ConvBnActStep, MaxPool, Memory
from fastcnn.ops.linear_act import interface as _linear_act
from fastcnn.ops.squeeze_excite import Gate
from fastcnn.ops.upsample import interface as _upsample

__all__ = [
    "AugmentParameters",
    "ConvBnActBlock",
    "ConvBnActStep",
    "MaxPool",
    "PackedConv2dInt8",
    "augment",
    "batch_norm_act",
    "conv2d_int8",
    "conv_bn_act",
    "conv_bn_act_blocks",
    "depthwise_conv2d",
    "dropout",
    "group_norm_act",
    "interpolate",
    "linear_act",
    "pack_conv2d_int8",
    "squeeze_excite",
]


def __dir__() -> list[str]:
    return __all__


@overridable
def augment(
    images: Tensor,
    parameters: AugmentParameters,
    *,
    masks: Tensor | None = None,
    size: Sequence[int] | None = None,
    mean: float | Sequence[float] = 0.0,
    std: float | Sequence[float] = 1.0,
    dtype: torch.dtype = torch.float32,
    memory_format: torch.memory_format = torch.contiguous_format,
    fill: float | Sequence[float] = 0.0,
    mask_fill: int = 255,
    erase_value: float | Sequence[float] = 0.0,
) -> Any:
    r"""Augment and normalise a batch of uint8 images, each sample in its own way, in one pass.

    .. math::
        y_o = \frac{1}{\sigma} \left(\frac{1}{255}\,
              \mathrm{noise}(\mathrm{colour}(x_{A(\mathrm{crop}(\mathrm{flip}(o)))})) - \mu\right)

    The same as this torchvision.transforms.v2.Compose on each sample, with the parameters that its
    transforms draw: RandomAffine (bilinear), RandomCrop or RandomResizedCrop (bilinear,
    antialias=False), RandomHorizontalFlip, RandomVerticalFlip, ToDtype(float32, scale=True),
    ColorJitter in the order brightness, contrast, saturation, hue, GaussianNoise, Normalize,
    RandomErasing. The image is interpolated once, at the composed coordinates, and grey levels are
    not rounded between the steps. Contrast blends with the mean grey of the image as it enters that
    step, after geometry and brightness, and costs one more read of the image. On grey images
    saturation and hue change nothing. At the border of the source the levels blend with fill.

    Not differentiable: there is no gradient with respect to images or parameters.

    Args:
        images: [n, c, h_in, w_in], uint8, c = 1 or 3, dense in NCHW or channels_last. A batch may
            be empty.
        parameters: of n samples, on the CPU or the images' device.
        masks: [n, h_in, w_in] or [n, 1, h_in, w_in], uint8 or int64, dense. They follow the
            geometry with nearest sampling, halves rounding up as in "nearest-exact", and are not
            erased.
        size: height and width of the output; None for the images' own.
        mean: of levels from 0 to 1, for all channels or one each.
        std: likewise.
        dtype: of y: float32, bfloat16 or float16.
        memory_format: of y: torch.contiguous_format or torch.channels_last.
        fill: grey levels, 0 to 255, outside of the image.
        mask_fill: masks there; 255 is what many data sets ignore.
        erase_value: y within the erased rectangle, after normalisation.

    Returns:
        y [n, c, h, w]; with masks (y, masks), in the masks' dtype and rank. Bitwise the same from
        run to run, on any number of threads, for images in either layout, and for a sample in any
        batch. Noise is drawn by Philox4x32-10 from the sample's seed and the pixel's place, the
        same draws on every device.

    Raises:
        TypeError: images or masks of another dtype, an argument of another type.
        ValueError: another rank, size, device or memory layout; parameters of another number of
            samples; std 0; a fill that the masks' dtype does not hold.

    Source: torchvision.transforms.v2; Salmon et al. 2011 (Philox).

    Example:
        >>> images = torch.randint(0, 256, (2, 3, 32, 32), dtype=torch.uint8)
        >>> drawn = fastcnn.augment.Augment((24, 24), horizontal_flip=0.5).draw(2, (32, 32))
        >>> fastcnn.functional.augment(images, drawn, size=(24, 24), mean=0.5, std=0.25).shape
        torch.Size([2, 3, 24, 24])
    """
    if has_torch_function_variadic(images, parameters, masks):
        return overridden(locals())
    return _augment.augment(
        images=images, parameters=parameters, masks=masks, size=size, mean=mean, std=std,
        dtype=dtype, memory_format=memory_format, fill=fill, mask_fill=mask_fill,
        erase_value=erase_value,
    )  # fmt: skip


@overridable
def batch_norm_act(
    input: Tensor | tuple[Tensor, ...] | list[Tensor],
    running_mean: Tensor | None,
    running_var: Tensor | None,
    weight: Tensor | None = None,
    bias: Tensor | None = None,
    training: bool = False,
    momentum: float = 0.1,
    eps: float = 1e-5,
    *,
    residual: Tensor | None = None,
    act: Activation = "relu",
    sync: bool = False,
    process_group: ProcessGroup | None = None,
) -> Tensor:
    r"""Batch normalisation, an optional residual and an activation as one fused operation.

    .. math::
        y = \mathrm{act}\left(\frac{x - \mu}{\sqrt{\sigma^2 + \epsilon}} \gamma + \beta + r\right)

    With ``training=True`` the mean and the biased variance are the batch's, over n, h and w, and
    ``running_mean`` and ``running_var`` (unless None) move towards them by ``momentum``, the
    variance made unbiased; else they are ``running_mean`` and ``running_var`` themselves.
    Differentiable once, in reverse mode.

    Args:
        input: [n, c, h, w], dense in NCHW or channels_last; float32, bfloat16, float16, and on the
            CPU float64. An empty batch gives an empty output and leaves the running statistics.
            Several tensors, alike in all but c, stand for torch.cat(input, 1); on the CPU, without
            sync, each is read where it lies, and none is concatenated.
        running_mean: [c] in the input's dtype, or float32 beside a half input.
        running_var: likewise.
        weight: gamma, [c], likewise; None stands for 1.
        bias: beta, [c], likewise; None stands for 0.
        training: whether to use the batch's statistics.
        momentum: the weight of the new statistics in the running ones, 0 to 1.
        eps: added to the variance, above 0.
        residual: added before the activation; sizes, dtype and layout of the input.
        act: "none", "relu", "relu6", "leaky_relu" (slope 0.01), "silu", "gelu" (by erf), "sigmoid"
            or "hardswish". A NaN comes through; at -inf each has its limit.
        sync: whether the batch is spread over processes, each with an input of its own, also of
            another n or an empty one. In training the statistics are then those of all inputs, and
            each process must make the same calls, forward and backward. Without an initialised
            torch.distributed, or alone in its group, a process is the whole batch.
        process_group: with sync=True, whose processes; None for all, as in torch.nn.SyncBatchNorm.

    Returns:
        y in the input's sizes, dtype and memory layout. Results are bitwise the same from run to
        run and on any number of threads.

    Raises:
        TypeError: an argument that is no Tensor, or of another dtype than named above; a
            process_group that is none, or that this process is not in.
        ValueError: another rank, size, device or memory layout; an unknown activation; one value
            per channel in training; eps or momentum out of bounds; a process_group beside
            sync=False.

    Source: Ioffe and Szegedy 2015, arXiv:1502.03167; torch.nn.functional.batch_norm;
    torch.nn.SyncBatchNorm.

    Example:
        >>> x, mean, var = torch.randn(2, 8, 4, 4), torch.zeros(8), torch.ones(8)
        >>> fastcnn.functional.batch_norm_act(x, mean, var, training=True, residual=x).shape
        torch.Size([2, 8, 4, 4])
        >>> mean.abs().min() > 0  # it has moved towards the batch's
        tensor(True)
    """
    if has_torch_function_variadic(
        *(input if isinstance(input, (tuple, list)) else (input,)),
        running_mean, running_var, weight, bias, residual,
    ):  # fmt: skip
        return overridden(locals())
    return _batch_norm_act.batch_norm_act(
        input=input, running_mean=running_mean, running_var=running_var, weight=weight,
        bias=bias, training=training, momentum=momentum, eps=eps, residual=residual,
        act=act, sync=sync, process_group=process_group,
    )  # fmt: skip


@overridable
def conv2d_int8(
    x: Tensor,
    weight: Tensor | PackedConv2dInt8,
    *,
    x_scale: float,
    x_zero_point: int,
    weight_scale: Tensor | float,
    bias: Tensor | None = None,
    stride: int | tuple[int, int] = 1,
    padding: int | tuple[int, int] = 0,
    dilation: int | tuple[int, int] = 1,
    groups: int = 1,
    residual: Tensor | None = None,
    residual_scale: float | None = None,
    residual_zero_point: int | None = None,
    act: Literal["none", "relu", "relu6"] = "none",
    out_dtype: torch.dtype = torch.uint8,
    out_scale: float | None = None,
    out_zero_point: int | None = None,
) -> Tensor:
    r"""Convolution of 8-bit integers with bias, residual, activation and requantisation.

    .. math::
        z = s_x s_o \sum (x - z_x) w + \mathrm{bias}_o + r, \quad
        y = \mathrm{saturate}\left(\mathrm{round}\left(
            \frac{\mathrm{act}(z)}{s_y}\right) + z_y\right)

    A quantised number q stands for (q - zero_point) * scale, a weight for w * weight_scale[o].
    Sums are int32 and exact, rounding is to nearest even. fastcnn/ops/conv2d_int8/interface.py
    writes down every operation with the type it is done in: y is the same integers on every
    backend, and without a residual those of onnxruntime's QLinearConv. There is no backward.

    Args:
        x: [n, c, h, w] uint8 or int8, dense in channels_last or NCHW. channels_last is faster: NCHW
            is copied to and fro. An empty batch gives an empty output.
        weight: [c_out, c / groups, kh, kw] int8, at most 14336 products in a sum; or what
            pack_conv2d_int8 made of it, which saves preparing it in every call. On CUDA that is a
            kernel that adds up each channel's weights, and a copy of one not in channels_last.
        x_scale: above 0; a float32, as all scales.
        x_zero_point: the number in x that stands for 0, in x's range, and what padding adds.
        weight_scale: [c_out] float32, or one number. The data of weight_scale and bias is checked
            in the first call with them and in the first after either changed in place, which on
            CUDA waits for the device and cannot be while a CUDA graph is captured; of tensors made
            in inference mode, which do not count their changes, in the first call alone. Other
            calls wait for nothing.
        bias: [c_out] float32. Where y is quantised it is rounded to x_scale * weight_scale[o] first
            and at most 2^26 of that.
        stride: of torch.nn.functional.conv2d, a number or a pair.
        padding: likewise.
        dilation: likewise.
        groups: likewise; c of them are a depthwise convolution.
        residual: added before the activation, in y's sizes and x's layout: uint8 or int8; or in
            out_dtype where that is a float.
        residual_scale: of an 8-bit residual, None for a float one.
        residual_zero_point: likewise.
        act: "none", "relu" or "relu6", of real numbers, before the rounding.
        out_dtype: uint8, int8, float32, bfloat16 or float16.
        out_scale: of an 8-bit y, None for a float one.
        out_zero_point: likewise.

    Returns:
        y [n, c_out, h_out, w_out] in x's memory layout, the same bits on any number of threads.

    Raises:
        TypeError: an argument that is no Tensor or number, or of another dtype.
        ValueError: sizes, groups, layouts or devices that do not fit; a scale that is no finite
            number above 0; a zero point out of range; a tensor that requires grad; on CUDA 2^31
            pixels or more, or above 65535 groups of several channels.
        RuntimeError: data that was not checked before a CUDA graph is captured.

    Source: ONNX's QLinearConv; Jacob et al. 2018, arXiv:1712.05877; torch.nn.functional.conv2d.

    Example:
        >>> x = torch.randint(0, 256, (1, 8, 6, 6), dtype=torch.uint8)
        >>> weight = torch.randint(-127, 128, (4, 8, 3, 3), dtype=torch.int8)
        >>> numbers = {"x_scale": 0.02, "x_zero_point": 128, "weight_scale": 0.01}
        >>> numbers |= {"out_scale": 0.1, "out_zero_point": 128}
        >>> y = fastcnn.functional.conv2d_int8(x, weight, **numbers)
        >>> y.shape, y.dtype
        (torch.Size([1, 4, 4, 4]), torch.uint8)
    """
    if has_torch_function_variadic(x, weight, weight_scale, bias, residual):
        return overridden(locals())
    return _conv2d_int8.conv2d_int8(
        x=x, weight=weight, weight_scale=weight_scale, x_scale=x_scale,
        x_zero_point=x_zero_point, bias=bias, stride=stride, padding=padding,
        dilation=dilation, groups=groups, residual=residual, residual_scale=residual_scale,
        residual_zero_point=residual_zero_point, act=act, out_dtype=out_dtype,
        out_scale=out_scale, out_zero_point=out_zero_point,
    )  # fmt: skip


def pack_conv2d_int8(weight: Tensor) -> PackedConv2dInt8:
    """Copy a weight of conv2d_int8 into an object that keeps what the backend makes of it.

    It takes the weight's place in any number of calls, also compiled ones. On CUDA that is the sum
    of each output channel's weights. On the CPU the first call with a size of images and a geometry
    prepares the weight for it; the last 8 are kept, each of the size of the weight.
    ``packed.weight`` is the copied weight, in channels_last; after a change in place it is prepared
    anew. Copying and pickling copy that alone. ``packed.to(device)`` packs it on another device.

    Args:
        weight: [c_out, c / groups, kh, kw] int8, on the device of the images.

    Returns:
        What conv2d_int8 takes as its weight.

    Raises:
        TypeError: a weight that is no int8 Tensor.
        ValueError: another rank, an empty one, or one on a device without kernels.

    Example:
        >>> packed = fastcnn.functional.pack_conv2d_int8(torch.ones(4, 8, 3, 3, dtype=torch.int8))
        >>> x = torch.ones(1, 8, 3, 3, dtype=torch.uint8)
        >>> scales = {"x_scale": 1.0, "x_zero_point": 0, "weight_scale": 1.0}
        >>> y = fastcnn.functional.conv2d_int8(x, packed, **scales, out_dtype=torch.float32)
        >>> y.flatten()
        tensor([72., 72., 72., 72.])
    """
    return _pack_conv2d_int8(weight)


@overridable
def conv_bn_act(
    input: Tensor,
    steps: Sequence[ConvBnActStep],
    residual: Tensor | Sequence[ConvBnActStep] | None = None,
    *,
    memory: Memory = "default",
) -> Tensor:
    r"""Run a chain of convolution, batch normalisation and activation steps with less memory.

    .. math::
        a_0 = x, \quad
        a_i = \mathrm{act}_i(\mathrm{BN}_i(\mathrm{conv}_i(a_{i-1}))), \quad
        y = \mathrm{act}_k(\mathrm{BN}_k(\mathrm{conv}_k(a_{k-1})) + r)

    A step with a ``pool`` ends in torch.nn.functional.max_pool2d. The chain is one autograd
    function. For backward it keeps its input and the convolution outputs; the activations between
    the steps are recomputed by one elementwise pass each, to the same bits, so ordinary ReLU and
    ordinary weights need no retraining. Under autocast, input, residual and convolution weights are
    cast to the autocast dtype, as torch.nn.functional.conv2d does. In evaluation on the CPU, where
    nothing requires a gradient, each batch norm is folded into its convolution's weights and
    residual and activation run in the convolution's epilogue (float32 and bfloat16); a NaN does not
    come through oneDNN's "relu" and "relu6" there. Differentiable once, in reverse mode.

    Args:
        input: [n, c, h, w], dense in NCHW or channels_last; float32, bfloat16, float16, and on the
            CPU float64.
        steps: at least one; step i takes as many channels as step i - 1 gives.
        residual: added in the last step before its activation. A tensor of the sizes, dtype and
            layout of the last convolution's output; or steps, a chain on the same input whose
            output is added, as in a block that changes resolution; no steps add the input itself.
        memory: "full" saves the activations too, and a pooling's indices, as PyTorch does, and
            recomputes nothing. "lowest" saves no output of a 1x1 convolution to more channels than
            it takes, and recomputes it in backward. "default" and "low" are one for a single chain.
            "auto" is "full" on the CPU and "default" elsewhere.

    Returns:
        The last step's output [n, c_out, h_out, w_out].

    Raises:
        TypeError: an argument that is no Tensor or of another dtype.
        ValueError: no steps; channels or sizes that do not fit, naming the step; pooling behind a
            residual; and all that batch_norm_act refuses.

    Source: Ioffe and Szegedy 2015, arXiv:1502.03167; Chen et al. 2016, arXiv:1604.06174
    (recomputing); torch.nn.functional.conv2d, batch_norm and max_pool2d.

    Example:
        >>> weight, statistics = torch.randn(8, 8, 3, 3), {"running_var": torch.ones(8)}
        >>> statistics["running_mean"] = torch.zeros(8)
        >>> step = fastcnn.functional.ConvBnActStep(weight, padding=1, training=True, **statistics)
        >>> fastcnn.functional.conv_bn_act(torch.randn(2, 8, 6, 6), [step], residual=()).shape
        torch.Size([2, 8, 6, 6])
    """
    if has_torch_function_variadic(input, residual) or has_override_inside(
        ConvBnActStep, (steps, residual)
    ):
        return overridden(locals())
    return _conv_bn_act.conv_bn_act(x=input, steps=steps, residual=residual, memory=memory)


@overridable
def conv_bn_act_blocks(
    input: Tensor, blocks: Sequence[ConvBnActBlock], *, memory: Memory = "default"
) -> Tensor:
    """Run blocks one after the other: y = conv_bn_act(x, steps, shortcut), whose x is the next y.

    ``memory`` says what is saved for backward, beside the convolution outputs: with "default"
    every block's input; with "full" all activations as well, so that backward recomputes nothing;
    with "low" the first one's only, from which backward recomputes the others
    by one elementwise pass each, for all blocks of this call at once; "lowest" as in
    :func:`conv_bn_act`. Gradients are the same bits in all but "lowest".

    Args:
        input: as conv_bn_act's.
        blocks: at least one. A block's shortcut is None for no residual, () for its input, or the
            steps of a projection of its input.
        memory: "auto", "full", "default", "low" or "lowest".

    Returns:
        The last block's output [n, c_out, h_out, w_out].

    Raises:
        TypeError, ValueError: as conv_bn_act, naming the block.

    Source: He et al. 2016, arXiv:1512.03385; as conv_bn_act.

    Example:
        >>> weight, ones = torch.randn(8, 8, 1, 1), torch.ones(8)
        >>> step = fastcnn.functional.ConvBnActStep(weight, running_mean=0 * ones, running_var=ones)
        >>> block = fastcnn.functional.ConvBnActBlock([step], shortcut=())
        >>> x = torch.randn(2, 8, 6, 6)
        >>> fastcnn.functional.conv_bn_act_blocks(x, [block, block], memory="low").shape
        torch.Size([2, 8, 6, 6])
    """
    if has_torch_function_variadic(input) or has_override_inside(ConvBnActStep, (blocks,)):
        return overridden(locals())
    return _conv_bn_act.conv_bn_act_blocks(x=input, blocks=blocks, memory=memory)


@overridable
def depthwise_conv2d(
    input: Tensor,
    weight: Tensor,
    bias: Tensor | None = None,
    stride: int | tuple[int, int] = 1,
    padding: int | tuple[int, int] = 0,
    dilation: int | tuple[int, int] = 1,
    *,
    act: Activation = "none",
) -> Tensor:
    r"""Convolve each channel with a filter of its own, add a bias, and apply an activation.

    .. math::
        y_{cij} = \mathrm{act}\left(\mathrm{bias}_c + \sum_{ab} w_{cab}\,
                  x_{c,\; i s_h + a d_h - p_h,\; j s_w + b d_w - p_w}\right)

    As torch.nn.functional.conv2d with groups = c and as many channels out as in; other groups are
    that function's. Under autocast input, weight and bias are cast as there. Saved for backward are
    the input and the parameters: an activation's backward computes the convolution once more.
    Differentiable once, in reverse mode.

    Args:
        input: [n, c, h, w], dense in NCHW or channels_last; float32, bfloat16, float16, and on the
            CPU float64. An empty batch gives an empty
            output.
        weight: [c, 1, kh, kw] in the input's dtype, or float32 beside a half input.
        bias: [c], likewise; None stands for 0.
        stride: a number, or one for the height and one for the width.
        padding: likewise: pixels of 0 on each side.
        dilation: likewise: the distance between a kernel's elements.
        act: "none", "relu", "relu6", "leaky_relu" (slope 0.01), "silu", "gelu" (by erf), "sigmoid"
            or "hardswish". A NaN comes through; at -inf each has its limit.

    Returns:
        y [n, c, h_out, w_out] in the input's dtype, in channels_last where the input or on the CPU
        the weight is, as conv2d's. Sums are float32 (float64 for float64). Results and gradients
        are bitwise the same from run to run and on any number of threads.

    Raises:
        TypeError: an argument that is no Tensor, or of another dtype than named above.
        ValueError: another rank, size, device or memory layout; a kernel that does not fit into the
            padded input; an unknown activation.

    Source: Howard et al. 2017, arXiv:1704.04861; torch.nn.functional.conv2d.

    Example:
        >>> x, weight = torch.randn(2, 8, 6, 6), torch.randn(8, 1, 3, 3)
        >>> fastcnn.functional.depthwise_conv2d(x, weight, stride=2, padding=1, act="relu6").shape
        torch.Size([2, 8, 3, 3])
    """
    if has_torch_function_variadic(input, weight, bias):
        return overridden(locals())
    return _depthwise_conv2d.depthwise_conv2d(
        input=input, weight=weight, bias=bias, stride=stride, padding=padding, dilation=dilation,
        act=act,
    )  # fmt: skip


@overridable
def group_norm_act(
    input: Tensor,
    num_groups: int,
    weight: Tensor | None = None,
    bias: Tensor | None = None,
    eps: float = 1e-5,
    *,
    act: Activation = "relu",
) -> Tensor:
    r"""Group normalisation and an activation as one fused operation.

    .. math::
        y = \mathrm{act}\left(\frac{x - \mu}{\sqrt{\sigma^2 + \epsilon}} \gamma + \beta\right)

    The mean and the biased variance are those of c / num_groups neighbouring channels of a sample,
    over h and w too. num_groups = 1 normalises a whole sample, num_groups = c each channel of it
    (instance normalisation). Differentiable once, in reverse mode.

    Args:
        input: [n, c, h, w], dense in NCHW or channels_last; float32, bfloat16, float16, and on the
            CPU float64. An empty batch gives an empty output.
        num_groups: a divisor of c.
        weight: gamma, [c] in the input's dtype, or float32 beside a half input; None stands for 1.
        bias: beta, likewise; None stands for 0.
        eps: added to the variance, above 0.
        act: "none", "relu", "relu6", "leaky_relu" (slope 0.01), "silu", "gelu" (by erf), "sigmoid"
            or "hardswish". A NaN comes through; at -inf each has its limit.

    Returns:
        y in the input's sizes, dtype and memory layout. Results are bitwise the same from run to
        run and on any number of threads.

    Raises:
        TypeError: an argument that is no Tensor, or of another dtype than named above.
        ValueError: another rank, size, device or memory layout; num_groups that does not divide c;
            an unknown activation; one sample with one value per group; eps not above 0.

    Source: Wu and He 2018, arXiv:1803.08494; torch.nn.functional.group_norm.

    Example:
        >>> x = torch.randn(2, 8, 4, 4)
        >>> fastcnn.functional.group_norm_act(x, num_groups=4, act="silu").shape
        torch.Size([2, 8, 4, 4])
    """
    if has_torch_function_variadic(input, weight, bias):
        return overridden(locals())
    y, _, _ = _group_norm_act.group_norm_act(
        input=input, num_groups=num_groups, weight=weight, bias=bias, eps=eps, act=act
    )
    return y


@overridable
def interpolate(
    input: Tensor,
    size: int | Sequence[int] | None = None,
    scale_factor: float | Sequence[float] | None = None,
    mode: Literal["nearest", "nearest-exact", "bilinear"] = "nearest",
    align_corners: bool | None = None,
    recompute_scale_factor: bool | None = None,
    antialias: bool = False,
    *,
    concat: Tensor | None = None,
    concat_last: bool = False,
) -> Tensor:
    r"""Resize images up or down, optionally straight into the buffer that also receives a skip.

    .. math::
        y_{op} = \sum_{ij} R_{oi} C_{pj} x_{ij}, \quad
        z = \mathrm{cat}([\mathrm{concat}, y], \mathrm{dim}=1)

    R and C are the matrices of torch.nn.functional.interpolate: one share of 1 a line in the
    nearest modes, two shares in bilinear. With ``scale_factor`` the output has
    ``floor(size * scale_factor)`` pixels, and coordinates are computed with the factor itself;
    with ``recompute_scale_factor=True`` with the ratio of the sizes. An axis that keeps its size
    is copied, whatever the factor; PyTorch's "nearest" does so on the CPU up to h + w = 128, and
    shifts larger images by a pixel. Differentiable once, in reverse mode.

    Args:
        input: [n, c, h, w], dense in NCHW or channels_last; float32, bfloat16, float16, and on the
            CPU float64. An empty batch gives an empty output.
        size: the output's h and w, or one number for both.
        scale_factor: the factors of h and w, or one for both; exactly one of size and scale_factor.
        mode: "nearest", "nearest-exact" or "bilinear".
        align_corners: bilinear alone: whether corner pixels' centres, and not images' edges, meet.
        recompute_scale_factor: see above; with scale_factor alone.
        antialias: False; PyTorch has it, this function does not.
        concat: [n, c_skip, h_out, w_out], as a U-Net's skip connection: its channels come first in
            the output, then the resized ones. dtype and layout of the input.
        concat_last: whether concat's channels come last instead.

    Returns:
        [n, c, h_out, w_out] or, with concat, [n, c_skip + c, h_out, w_out], in the input's dtype
        and memory layout. Nothing but sizes is saved for backward, whose result is bitwise the same
        from run to run; concat's gradient is a view of the output's.

    Raises:
        TypeError: an argument that is no Tensor or no number, or of another dtype.
        ValueError: another rank, memory layout, mode or device; both or none of size and
            scale_factor; align_corners beside a nearest mode; an output without pixels or with
            2^31 and more a side.

    Source: torch.nn.functional.interpolate.

    Example:
        >>> x, skip = torch.randn(2, 8, 4, 4), torch.randn(2, 3, 8, 8)
        >>> fastcnn.functional.interpolate(x, scale_factor=2, mode="bilinear", concat=skip).shape
        torch.Size([2, 11, 8, 8])
    """
    if has_torch_function_variadic(input, concat):
        return overridden(locals())
    return _upsample.interpolate(
        input=input, size=size, scale_factor=scale_factor, mode=mode,
        align_corners=align_corners, recompute_scale_factor=recompute_scale_factor,
        antialias=antialias, concat=concat, concat_last=concat_last,
    )  # fmt: skip


@overridable
def dropout(
    input: Tensor,
    p: float = 0.5,
    training: bool = True,
    inplace: bool = False,
    *,
    residual: Tensor | None = None,
    per_channel: bool = False,
    generator: torch.Generator | None = None,
) -> Tensor:
    r"""Set elements or channels to zero at random, scale the others, and add a residual.

    .. math::
        y = x \cdot \frac{k}{1 - p} + r, \quad k \in \{0, 1\}, \quad P(k = 0) = p

    The draw k is Philox4x32-10's for a seed and the element's logical index (n, c, h, w order), so
    one seed gives the same mask on CPU and CUDA, in NCHW and channels_last, on any number of
    threads, eager and compiled. The seed is an int64 from the generator of the input's device:
    torch.manual_seed makes it reproducible, and a captured CUDA graph draws a new one at every
    replay. Backward keeps it and no mask. p is rounded to a multiple of 2^-32 (but never to 0 or
    1), and the scale is that of the rounded one. Zeros are made by multiplication, so a dropped NaN
    or infinity shows as NaN, as in PyTorch.

    Args:
        input: any number of dimensions, contiguous; with four, [n, c, h, w], also channels_last.
            Other strides, which torch.nn.functional.dropout copies unasked, raise a ValueError that
            says how to copy. float32, bfloat16, float16, and on the CPU float64.
        p: probability that an element is zeroed.
        training: False returns the input itself, or input + residual.
        inplace: whether to write y into the input's memory and return the input.
        residual: added after the scaling; sizes, dtype and layout of the input.
        per_channel: one draw for each of the first two dimensions, [n, c, ...], as in
            torch.nn.functional.dropout1d, 2d (which takes [n, c, l] too) and 3d.
        generator: draws the seed in place of the default one; of the input's kind of device. With
            one, torch.compile does not trace the call with fullgraph=True.

    Returns:
        y in the input's sizes, dtype and memory layout; the input itself where there is nothing to
        do (p = 0 or training=False, without a residual).

    Raises:
        TypeError: an argument that is no Tensor, or of another dtype than named above.
        ValueError: p outside 0 ... 1; another rank, size, device or memory layout; a generator of
            another device.
        RuntimeError: inplace on a leaf that requires grad, as PyTorch has it, or on a view that
            autograd cannot follow; called under torch.vmap(randomness="error").

    Source: Srivastava et al. 2014; Tompson et al. 2015, arXiv:1411.4280 (per channel); Salmon et
    al. 2011 (Philox); torch.nn.functional.dropout, dropout2d.

    Example:
        >>> y = fastcnn.functional.dropout(torch.ones(4, 8, 8, 8), p=0.5)
        >>> y.unique()
        tensor([0., 2.])
    """
    if has_torch_function_variadic(input, residual):
        return overridden(locals())
    return _dropout.dropout(
        input=input, p=p, training=training, inplace=inplace, residual=residual,
        per_channel=per_channel, generator=generator,
    )  # fmt: skip


@overridable
def linear_act(
    input: Tensor,
    weight: Tensor,
    bias: Tensor | None = None,
    *,
    act: Activation = "none",
) -> Tensor:
    r"""Apply a linear layer and an activation.

    .. math::
        y_{\ldots o} = \mathrm{act}\left(\sum_c W_{oc}\, x_{\ldots c} + b_o\right)

    On the CPU half types are multiplied in float32 where the processor is slower at them, and by a
    float32 weight as it is: under autocast, which leaves such weights to this function, it is not
    rounded there, and its gradient neither. Elsewhere the product is PyTorch's, on CUDA too.
    Differentiable twice, in reverse mode.

    Args:
        input: [..., c_in], contiguous, or with four dimensions in channels_last, of which the
            product makes a copy, as PyTorch's does; float32, bfloat16, float16, and on the CPU
            float64. An empty batch gives an empty output.
        weight: [c_out, c_in] in the input's dtype, or float32 beside a half input.
        bias: [c_out], likewise; None stands for 0.
        act: "none", "relu", "relu6", "leaky_relu" (slope 0.01), "silu", "gelu" (by erf), "sigmoid"
            or "hardswish".

    Returns:
        y [..., c_out], contiguous, in the input's dtype, under autocast in that which it casts to.

    Raises:
        TypeError: an argument that is no Tensor, or of another dtype than named above.
        ValueError: other sizes, another device or memory layout; an unknown activation.

    Source: torch.nn.functional.linear; Hendrycks and Gimpel 2016, arXiv:1606.08415 (GELU).

    Example:
        >>> x, weight, bias = torch.randn(2, 7, 8), torch.randn(32, 8), torch.randn(32)
        >>> fastcnn.functional.linear_act(x, weight, bias, act="gelu").shape
        torch.Size([2, 7, 32])
    """
    if has_torch_function_variadic(input, weight, bias):
        return overridden(locals())
    return _linear_act.linear_act(input=input, weight=weight, bias=bias, act=act)


@overridable
def squeeze_excite(
    input: Tensor,
    fc1_weight: Tensor,
    fc1_bias: Tensor | None = None,
    fc2_weight: Tensor | None = None,
    fc2_bias: Tensor | None = None,
    *,
    act: Activation = "relu",
    gate: Gate = "sigmoid",
) -> Tensor:
    r"""Scale each channel of each image by a gate made of the means of the image's channels.

    .. math::
        y_{ncij} = x_{ncij}\, \mathrm{gate}\left(W_2\, \mathrm{act}(W_1 m_n + b_1) + b_2\right)_c
        \qquad m_{nc} = \frac{1}{h w} \sum_{ij} x_{ncij}

    Squeeze-and-excitation, with 1x1 convolutions fc1 and fc2 of images of one pixel; without fc2
    the gate is that of fc1's output (effective squeeze-and-excitation). Under autocast nothing is
    cast: what lies between the means and the product is float32. Differentiable once, in reverse
    mode.

    Args:
        input: [n, c, h, w], dense in NCHW or channels_last; float32, bfloat16, float16, and on the
            CPU float64. An empty batch gives an empty output.
        fc1_weight: [c_mid, c, 1, 1] in the input's dtype, or float32 beside a half input; without
            fc2 [c, c, 1, 1].
        fc1_bias: [c_mid], likewise; None stands for 0.
        fc2_weight: [c, c_mid, 1, 1], likewise; None for no second convolution.
        fc2_bias: [c], likewise.
        act: behind fc1 where there is an fc2: "none", "relu", "relu6", "leaky_relu" (slope 0.01),
            "silu", "gelu" (by erf), "sigmoid" or "hardswish".
        gate: "sigmoid", or "hardsigmoid", which is clamp(z / 6 + 1 / 2, 0, 1).

    Returns:
        y [n, c, h, w] in the input's dtype and memory layout. Means and sums are float32 (float64
        for float64) and bitwise the same from run to run and on any number of threads; the small
        products are PyTorch's.

    Raises:
        TypeError: an argument that is no Tensor, or of another dtype than named above.
        ValueError: another rank, size, device or memory layout; an unknown activation or gate.

    Source: Hu et al. 2018, arXiv:1709.01507; Lee and Park 2020, arXiv:1911.06667;
    torchvision.ops.SqueezeExcitation.

    Example:
        >>> x, fc1, fc2 = torch.randn(2, 8, 6, 6), torch.randn(4, 8, 1, 1), torch.randn(8, 4, 1, 1)
        >>> fastcnn.functional.squeeze_excite(x, fc1, None, fc2, act="silu").shape
        torch.Size([2, 8, 6, 6])
    """
    if has_torch_function_variadic(input, fc1_weight, fc1_bias, fc2_weight, fc2_bias):
        return overridden(locals())
    return _squeeze_excite.squeeze_excite(
        input=input, fc1_weight=fc1_weight, fc1_bias=fc1_bias, fc2_weight=fc2_weight,
        fc2_bias=fc2_bias, act=act, gate=gate,
    )  # fmt: skip
