"""DepthwiseConv2d."""

from typing import cast

import torch
from torch import Tensor, nn

from fastcnn.common.activation import Activation, act_number
from fastcnn.common.conv_geometry import Pair
from fastcnn.functional import depthwise_conv2d


class DepthwiseConv2d(nn.Conv2d):
    """A convolution of each channel by itself, with an activation.

    ``forward(x) = act(conv2d(x, weight, bias, groups=channels))``. It is a torch.nn.Conv2d, with
    its parameters and state_dict keys. Shapes, dtypes and errors are those of
    :func:`fastcnn.functional.depthwise_conv2d`.

    Args:
        channels: of the input and of the output.
        kernel_size: of torch.nn.Conv2d, as all up to bias.
        stride: likewise.
        padding: numbers.
        dilation: likewise.
        bias: whether there is one.
        act: as in :func:`fastcnn.functional.depthwise_conv2d`.
        device: of the parameters.
        dtype: likewise.

    Example:
        >>> conv = fastcnn.nn.DepthwiseConv2d(8, 3, padding=1, act="silu")
        >>> conv(torch.randn(2, 8, 6, 6)).shape
        torch.Size([2, 8, 6, 6])
        >>> list(conv.state_dict())
        ['weight', 'bias']
    """

    def __init__(
        self,
        channels: int,
        kernel_size: int | tuple[int, int],
        stride: int | tuple[int, int] = 1,
        padding: int | tuple[int, int] = 0,
        dilation: int | tuple[int, int] = 1,
        bias: bool = True,
        act: Activation = "none",
        device: torch.device | str | None = None,
        dtype: torch.dtype | None = None,
    ) -> None:
        act_number("DepthwiseConv2d", act)
        super().__init__(
            channels, channels, kernel_size, stride, padding, dilation, channels, bias,
            device=device, dtype=dtype,
        )  # fmt: skip
        self.act: Activation = act

    def forward(self, input: Tensor) -> Tensor:
        """Return the convolution of the input."""
        return depthwise_conv2d(
            input,
            self.weight,
            self.bias,
            cast(Pair, self.stride),
            cast(Pair, self.padding),
            cast(Pair, self.dilation),
            act=self.act,
        )

    def extra_repr(self) -> str:
        """Return what nn.Conv2d shows, and the activation."""
        return f"{super().extra_repr()}, act={self.act}"
