"""A step with fixed statistics where no gradient is required: batch norm folded into the weights.

    y = act(batch_norm(conv2d(x)) + residual)

On the CPU one convolution, of oneDNN or depthwise_conv2d; on CUDA inference_candidates.py. Bytes:
x, weight, residual and y once. The weights are folded at every call, as parameters may change;
folded.py keeps them.
"""

from collections.abc import Sequence

import torch
from torch import Tensor
from torch.autograd.forward_ad import unpack_dual

from fastcnn.common.batch_norm_params import Norm
from fastcnn.common.checks import as_convolved
from fastcnn.ops.conv2d.aten import max_pool
from fastcnn.ops.conv2d.onednn import convolve_onednn, weight_type
from fastcnn.ops.conv_bn_act.step import ConvBnActStep, StepSettings


def is_inference(x: Tensor, steps: Sequence[ConvBnActStep], residual: Tensor | None) -> bool:
    """Whether all statistics are fixed, and no gradient is required."""
    if any(step.training for step in steps):
        return False
    grads = torch.is_grad_enabled()
    tensors = [x, residual, *(t for step in steps for t in step if isinstance(t, Tensor))]
    for t in tensors:
        # oneDNN's operators would drop the tangents of forward-mode differentiation in silence.
        if t is not None and ((grads and t.requires_grad) or unpack_dual(t).tangent is not None):
            return False
    return True


def folded(
    weight: Tensor, conv_bias: Tensor | None, norm: Norm, dtype: torch.dtype
) -> tuple[Tensor, Tensor]:
    """Return a convolution's weight and bias with the batch norm behind it in them, in a dtype.

    weight' = weight * scale and bias' = (conv_bias - mean) * scale + beta per output channel, with
    scale = gamma / sqrt(var + eps), computed in float32 and rounded once.
    """
    scale = torch.rsqrt(norm.var.float() + norm.eps)
    if norm.weight is not None:
        scale = scale * norm.weight
    bias = -norm.mean.float()
    if conv_bias is not None:
        bias = bias + conv_bias
    bias = bias * scale
    if norm.bias is not None:
        bias = bias + norm.bias
    return (weight * scale[:, None, None, None]).to(dtype), bias.to(dtype)


def convolve_folded(
    x: Tensor, step: ConvBnActStep, s: StepSettings, residual: Tensor | None, own: bool
) -> Tensor:
    """Return act(batch_norm(conv2d(x)) + residual), pooled, batch norm folded into the weights.

    own: the residual is of the block's making, and may come in the other layout.

    They are folded at every call, as parameters may change; conv_bn_act/folded.py keeps them.
    """
    x = as_convolved(x, step.weight)
    dtype = weight_type(x, step.weight, s.conv)
    weight, bias = folded(step.weight, step.conv_bias, norm_of_step(step), dtype)
    y = convolve_onednn(x, weight, bias, s.conv, step.act, residual, own)
    return max_pool(y, s.pool)


def norm_of_step(step: ConvBnActStep) -> Norm:
    """Return the batch norm of a step with fixed statistics."""
    assert step.running_mean is not None
    assert step.running_var is not None
    return Norm(step.running_mean, step.running_var, step.bn_weight, step.bn_bias, step.eps)
