"""The public functions, with the signatures of torch.nn.functional where it has one."""

from collections.abc import Sequence

from torch import Tensor
from torch.distributed import ProcessGroup

from fastcnn.ops import batch_norm_act as _batch_norm_act
from fastcnn.ops import conv_bn_act as _conv_bn_act
from fastcnn.ops import group_norm_act as _group_norm_act
from fastcnn.ops.activation import Activation
from fastcnn.ops.conv_bn_act_step import ConvBnActStep

__all__ = ["ConvBnActStep", "batch_norm_act", "conv_bn_act", "group_norm_act"]


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
    (instance normalisation).

    Args:
        input: [n, c, h, w], dense in NCHW or channels_last; float32, bfloat16, float16, and on the
            CPU float64. An empty batch gives an empty output.
        num_groups: a divisor of c.
        weight: gamma, [c] in the input's dtype, or float32 beside a half input; None stands for 1.
        bias: beta, likewise; None stands for 0.
        eps: added to the variance.
        act: "none", "relu", "relu6", "leaky_relu" (slope 0.01), "silu", "gelu" (by erf), "sigmoid"
            or "hardswish". A NaN comes through; at -inf each has its limit.

    Returns:
        y in the input's sizes, dtype and memory layout. Results are bitwise the same from run to
        run and on any number of threads.

    Raises:
        TypeError: an argument that is no Tensor, or of another dtype than named above.
        ValueError: another rank, size, device or memory layout; num_groups that does not divide c;
            an unknown activation; one sample with one value per group.

    Source: Wu and He 2018, arXiv:1803.08494; torch.nn.functional.group_norm.
    """
    y, _, _ = _group_norm_act.group_norm_act(input, num_groups, weight, bias, eps, act)
    return y
