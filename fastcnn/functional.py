"""The public functions, with the signatures of torch.nn.functional where it has one."""

from collections.abc import Sequence

import torch
from torch import Tensor
from torch.distributed import ProcessGroup

from fastcnn.ops import batch_norm_act as _batch_norm_act
from fastcnn.ops import conv_bn_act as _conv_bn_act
from fastcnn.ops import dropout as _dropout
from fastcnn.ops.activation import Activation
from fastcnn.ops.conv_bn_act_step import ConvBnActStep

__all__ = ["ConvBnActStep", "batch_norm_act", "conv_bn_act", "dropout"]


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
    input: Tensor, steps: Sequence[ConvBnActStep], residual: Tensor | None = None
) -> Tensor:
    r"""Run a chain of convolution, batch normalisation and activation steps with less memory.

    .. math::
        a_0 = x, \quad
        a_i = \mathrm{act}_i(\mathrm{BN}_i(\mathrm{conv}_i(a_{i-1}))), \quad
        y = \mathrm{act}_k(\mathrm{BN}_k(\mathrm{conv}_k(a_{k-1})) + r)

    The chain is one autograd function. For backward it keeps its input and the raw convolution
    outputs; the activations between the steps are rebuilt by one elementwise pass each, so ordinary
    ReLU and ordinary weights need no retraining. Under autocast, input, residual and convolution
    weights are cast to the autocast dtype, as torch.nn.functional.conv2d does.

    Args:
        input: [n, c, h, w], dense in NCHW or channels_last; float32, bfloat16, float16, and on the
            CPU float64.
        steps: at least one; step i takes as many channels as step i - 1 gives.
        residual: added in the last step before its activation; sizes, dtype and layout of the
            last convolution's output.

    Returns:
        The last step's output [n, c_out, h_out, w_out].

    Raises:
        TypeError: an argument that is no Tensor or of another dtype.
        ValueError: no steps; channels or sizes that do not fit, naming the step; and all that
            batch_norm_act refuses.
    """
    return _conv_bn_act.conv_bn_act(input, steps, residual)


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
        input: any number of dimensions, contiguous; with four, [n, c, h, w], also channels_last;
            float32, bfloat16, float16, and on the CPU float64.
        p: probability that an element is zeroed.
        training: False returns the input itself, or input + residual.
        inplace: whether to write y into the input's memory and return the input.
        residual: added after the scaling; sizes, dtype and layout of the input.
        per_channel: one draw for each of the first two dimensions, [n, c, ...], as in
            torch.nn.functional.dropout1d, 2d (which takes [n, c, l] too) and 3d.
        generator: draws the seed in place of the default one; of the input's kind of device.

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
    """
    return _dropout.dropout(input, p, training, inplace, residual, per_channel, generator)
