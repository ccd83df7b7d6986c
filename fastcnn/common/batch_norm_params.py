"""A batch norm as data: what the kernels that apply one before or behind a convolution are given.

    z = (t - mean) * rstd * weight + bias        rstd = 1 / sqrt(var + eps), each per channel

The kernels centre first, in float32: where the mean is 1e4 and the deviation 1 nothing cancels.
"""

from typing import NamedTuple

from torch import Tensor


class Norm(NamedTuple):
    """A batch norm with its statistics, of the batch or fixed; weight and bias None: 1 and 0.

    All are [c], contiguous, each of float32, bfloat16 or float16.
    """

    mean: Tensor
    var: Tensor
    weight: Tensor | None = None
    bias: Tensor | None = None
    eps: float = 1e-5
