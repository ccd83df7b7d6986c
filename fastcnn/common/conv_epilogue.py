"""What stands behind a convolution in the same kernel: one record, from the op to the launch.

    y = act(norm(conv2d(x, weight)) + residual)

Kernels: fastcnn/triton/conv2d_kernels.py.
"""

from typing import NamedTuple

from torch import Tensor

from fastcnn.common.batch_norm_params import Norm


class Epilogue(NamedTuple):
    """Each part is optional.

    act: the schema's number (activation.py). statistics: also the mean and biased variance of the
    convolution itself.
    """

    norm: Norm | None = None
    residual: Tensor | None = None
    act: int = 0
    statistics: bool = False
