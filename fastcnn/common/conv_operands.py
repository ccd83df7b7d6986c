"""What a fused convolution is given beside its weight: one record each, from the op to the launch.

    a = act(norm(x)), or x                                    Input
    y = act(norm(conv2d(a, weight)) + residual), or + bias    Output
    g = the gradient of conv2d(a, weight)                     Gradient

Formulas, floors in bytes and kernels: fastcnn/ops/conv2d/fused.py.
"""

from typing import NamedTuple

from torch import Tensor

from fastcnn.common.batch_norm_params import Norm


class Input(NamedTuple):
    """A convolution's input: x [n, c, h, w], or act(norm(x)), which is not written.

    Outside of the image stands 0 in either case. act: the schema's number (activation.py).
    """

    x: Tensor
    norm: Norm | None = None
    act: int = 0


class Output(NamedTuple):
    """What stands behind a convolution; without a norm a bias [c_out] may.

    statistics: also the mean and biased variance of the convolution itself.
    """

    norm: Norm | None = None
    residual: Tensor | None = None
    act: int = 0
    statistics: bool = False
    bias: Tensor | None = None


class Sums(NamedTuple):
    """Per channel, over the batch: of the gradient, and of the gradient times xhat."""

    gradient: Tensor
    times_xhat: Tensor


class Gradient(NamedTuple):
    """The gradient g of a convolution: dy, or with a norm behind the convolution, not written.

        dz = dy * act'(norm(raw))                  raw: the convolution's output; act 0: dy is dz
        g  = rstd * weight * (dz - (sums.gradient + xhat * sums.times_xhat) / count)

    with sums of dz over all count pixels of the batch; of fixed statistics, without sums,
    g = rstd * weight * dz.
    """

    dy: Tensor
    raw: Tensor | None = None
    norm: Norm | None = None
    act: int = 0
    sums: Sums | None = None
