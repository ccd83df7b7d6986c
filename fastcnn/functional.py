"""The public functions, with the signatures of torch.nn.functional where it has one."""

from collections.abc import Sequence
from typing import Literal

from torch import Tensor
from torch.distributed import ProcessGroup

from fastcnn.ops import batch_norm_act as _batch_norm_act
from fastcnn.ops import conv_bn_act as _conv_bn_act
from fastcnn.ops import upsample as _upsample
from fastcnn.ops.activation import Activation
from fastcnn.ops.conv_bn_act_step import ConvBnActBlock, ConvBnActStep, MaxPool, Memory

__all__ = [
    "ConvBnActBlock",
    "ConvBnActStep",
    "MaxPool",
    "batch_norm_act",
    "conv_bn_act",
    "conv_bn_act_blocks",
    "interpolate",
]


def batch_norm_act(
    input: Tensor,
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

    Args:
        input: [n, c, h, w], dense in NCHW or channels_last; float32, bfloat16, float16, and on the
            CPU float64. An empty batch gives an empty output and leaves the running statistics.
        running_mean: [c] in the input's dtype, or float32 beside a half input.
        running_var: likewise.
        weight: gamma, [c], likewise; None stands for 1.
        bias: beta, [c], likewise; None stands for 0.
        training: whether to use the batch's statistics.
        momentum: the weight of the new statistics in the running ones, 0 to 1.
        eps: added to the variance.
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
            per channel in training; a process_group beside sync=False.

    Source: Ioffe and Szegedy 2015, arXiv:1502.03167; torch.nn.functional.batch_norm;
    torch.nn.SyncBatchNorm.
    """
    return _batch_norm_act.batch_norm_act(
        input, running_mean, running_var, weight, bias, training, momentum, eps, residual, act,
        sync, process_group,
    )  # fmt: skip


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
    function. For backward it keeps its input and the raw convolution outputs; the activations
    between the steps are rebuilt by one elementwise pass each, to the same bits, so ordinary ReLU
    and ordinary weights need no retraining. Under autocast, input, residual and convolution weights
    are cast to the autocast dtype, as torch.nn.functional.conv2d does. In evaluation on the CPU,
    where nothing requires a gradient, each batch norm is folded into its convolution's weights and
    residual and activation run in the convolution's epilogue (float32 and bfloat16); a NaN does not
    come through oneDNN's "relu" and "relu6" there.

    Args:
        input: [n, c, h, w], dense in NCHW or channels_last; float32, bfloat16, float16, and on the
            CPU float64.
        steps: at least one; step i takes as many channels as step i - 1 gives.
        residual: added in the last step before its activation. A tensor of the sizes, dtype and
            layout of the last convolution's output; or steps, a chain on the same input whose
            output is added, as in a block that changes resolution; no steps add the input itself.
        memory: "lowest" keeps no raw output of a 1x1 convolution to more channels than it takes,
            and runs it again in backward. "default" and "low" are one for a single chain.

    Returns:
        The last step's output [n, c_out, h_out, w_out].

    Raises:
        TypeError: an argument that is no Tensor or of another dtype.
        ValueError: no steps; channels or sizes that do not fit, naming the step; pooling behind a
            residual; and all that batch_norm_act refuses.
    """
    return _conv_bn_act.conv_bn_act(input, steps, residual, memory)


def conv_bn_act_blocks(
    input: Tensor, blocks: Sequence[ConvBnActBlock], *, memory: Memory = "default"
) -> Tensor:
    """Run blocks one after the other: y = conv_bn_act(x, steps, shortcut), whose x is the next y.

    ``memory`` says what is kept for backward, beside the raw convolution outputs: with "default"
    every block's input; with "low" the first one's only, from which backward rebuilds the others by
    one elementwise pass each, for all blocks of this call at once; "lowest" as in
    :func:`conv_bn_act`. Gradients are the same bits in "default" and "low".

    Args:
        input: as conv_bn_act's.
        blocks: at least one. A block's shortcut is None for no residual, () for its input, or the
            steps of a projection of its input.
        memory: "default", "low" or "lowest".

    Raises:
        TypeError, ValueError: as conv_bn_act, naming the block.
    """
    return _conv_bn_act.conv_bn_act_blocks(input, blocks, memory)


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
) -> Tensor:
    r"""Resize images up or down, optionally straight into the buffer that also receives a skip.

    .. math::
        y_{op} = \sum_{ij} R_{oi} C_{pj} x_{ij}, \quad
        z = \mathrm{cat}([\mathrm{concat}, y], \mathrm{dim}=1)

    R and C are the matrices of torch.nn.functional.interpolate: one share of 1 a line in the
    nearest modes, two shares in bilinear. With ``scale_factor`` the output has
    ``floor(size * scale_factor)`` pixels, and coordinates are computed with the factor itself;
    with ``recompute_scale_factor=True`` with the ratio of the sizes. An axis that keeps its size
    is copied, whatever the factor, as PyTorch does on the CPU.

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

    Returns:
        [n, c, h_out, w_out] or, with concat, [n, c_skip + c, h_out, w_out], in the input's dtype
        and memory layout. Nothing but sizes is kept for backward, whose result is bitwise the same
        from run to run; concat's gradient is a view of the output's.

    Raises:
        TypeError: an argument that is no Tensor or no number, or of another dtype.
        ValueError: another rank, memory layout, mode or device; both or none of size and
            scale_factor; align_corners beside a nearest mode; an output without pixels.

    Source: torch.nn.functional.interpolate.
    """
    return _upsample.interpolate(
        input, size, scale_factor, mode, align_corners, recompute_scale_factor, antialias, concat
    )
