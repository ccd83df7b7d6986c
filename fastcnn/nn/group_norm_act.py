"""GroupNormAct, LayerNorm2d and InstanceNormAct2d."""

from typing import Any

import torch
from torch import Tensor

from fastcnn.common.activation import Activation, act_number
from fastcnn.functional import group_norm_act
from fastcnn.ops.group_norm_act import pixel_norm_act
from fastcnn.ops.instance_norm_act import instance_norm_act


class GroupNormAct(torch.nn.GroupNorm):
    """Group normalisation and an activation as one fused operation.

    Parameters and state_dict keys are torch.nn.GroupNorm's, which it is an instance of. Shapes,
    dtypes and errors are those of :func:`fastcnn.functional.group_norm_act`.

    Args:
        num_groups: a divisor of num_channels.
        num_channels: channels of the input.
        eps: added to the variance.
        affine: whether there are weight and bias.
        act: "none", "relu", "relu6", "leaky_relu" (slope 0.01), "silu", "gelu" (by erf), "sigmoid"
            or "hardswish".
        device: of the parameters.
        dtype: of the parameters.

    Example:
        >>> fastcnn.nn.GroupNormAct(4, 8, act="silu")(torch.randn(2, 8, 4, 4)).shape
        torch.Size([2, 8, 4, 4])
    """

    def __init__(
        self,
        num_groups: int,
        num_channels: int,
        eps: float = 1e-5,
        affine: bool = True,
        *,
        act: Activation = "relu",
        device: Any = None,
        dtype: torch.dtype | None = None,
    ) -> None:
        super().__init__(num_groups, num_channels, eps, affine, device=device, dtype=dtype)
        act_number("GroupNormAct", act)
        self.act: Activation = act

    def forward(self, input: Tensor) -> Tensor:
        """Return act(group_norm(input))."""
        return group_norm_act(
            input, self.num_groups, self.weight, self.bias, self.eps, act=self.act
        )

    def extra_repr(self) -> str:
        """Return the arguments as torch.nn.GroupNorm prints them, and the activation."""
        return f"{super().extra_repr()}, act={self.act}"


class LayerNorm2d(torch.nn.LayerNorm):
    r"""Normalisation of each pixel over its channels, and an optional activation.

    .. math::
        y = \mathrm{act}\left(\frac{x - \mu}{\sqrt{\sigma^2 + \epsilon}} \gamma + \beta\right)

    with the mean and the biased variance over the channels at each n, h, w: what ConvNeXt of
    torchvision and timm has under this name. A layer norm over a whole sample is
    ``GroupNormAct(1, channels)``. NCHW and channels_last run without a permuted copy. Parameters
    and state_dict keys are torch.nn.LayerNorm's, which it is an instance of.

    Args:
        normalized_shape: channels of the input, as a number or a tuple of one.
        eps: added to the variance. The default is torch.nn.LayerNorm's; ConvNeXt passes 1e-6.
        elementwise_affine: whether there are weight and bias.
        bias: whether there is a bias where there is a weight.
        act: as GroupNormAct's; here "none" unless asked for, since the name has no activation.
        device: of the parameters.
        dtype: of the parameters.

    Input and output are [n, c, h, w] as for :func:`fastcnn.functional.group_norm_act`.

    Raises:
        ValueError: a normalized_shape of more than one dimension, and what group_norm_act refuses.

    Example:
        >>> fastcnn.nn.LayerNorm2d(8, eps=1e-6)(torch.randn(2, 8, 4, 4)).shape
        torch.Size([2, 8, 4, 4])
    """

    def __init__(
        self,
        normalized_shape: int | list[int] | torch.Size,
        eps: float = 1e-5,
        elementwise_affine: bool = True,
        bias: bool = True,
        *,
        act: Activation = "none",
        device: Any = None,
        dtype: torch.dtype | None = None,
    ) -> None:
        super().__init__(
            normalized_shape, eps, elementwise_affine, bias, device=device, dtype=dtype
        )
        if len(self.normalized_shape) != 1:
            raise ValueError(
                f"LayerNorm2d: normalized_shape: expected one number, the channels, got "
                f"{self.normalized_shape}"
            )
        act_number("LayerNorm2d", act)
        self.act: Activation = act

    def forward(self, input: Tensor) -> Tensor:
        """Return act(layer_norm(input)), each pixel over its channels."""
        return pixel_norm_act(
            "LayerNorm2d",
            input,
            self.normalized_shape[0],
            self.weight,
            self.bias,
            self.eps,
            self.act,
        )

    def extra_repr(self) -> str:
        """Return the arguments as torch.nn.LayerNorm prints them, and the activation."""
        return f"{super().extra_repr()}, act={self.act}"


class InstanceNormAct2d(torch.nn.InstanceNorm2d):
    """Instance normalisation and an activation as one fused operation.

    Each channel of each sample is normalised with its own mean and variance; in evaluation with
    track_running_stats=True, with the running ones. Parameters, buffers, state_dict keys and
    running statistics (they move towards the mean over the batch of the samples' statistics) are
    torch.nn.InstanceNorm2d's, which it is an instance of. A batch [n, c, h, w] as for
    :func:`fastcnn.functional.group_norm_act`; torch's unbatched [c, h, w] is an error.

    Args:
        num_features: channels of the input.
        eps: added to the variance.
        momentum: weight of the new running statistics.
        affine: whether there are weight and bias.
        track_running_stats: whether there are running statistics.
        act: "none", "relu", "relu6", "leaky_relu" (slope 0.01), "silu", "gelu" (by erf), "sigmoid"
            or "hardswish".
        device: of parameters and buffers.
        dtype: of parameters and buffers.

    Example:
        >>> fastcnn.nn.InstanceNormAct2d(8, affine=True)(torch.randn(2, 8, 4, 4)).shape
        torch.Size([2, 8, 4, 4])
    """

    def __init__(
        self,
        num_features: int,
        eps: float = 1e-5,
        momentum: float = 0.1,
        affine: bool = False,
        track_running_stats: bool = False,
        *,
        act: Activation = "relu",
        device: Any = None,
        dtype: torch.dtype | None = None,
    ) -> None:
        super().__init__(
            num_features, eps, momentum, affine, track_running_stats, device=device, dtype=dtype
        )
        act_number("InstanceNormAct2d", act)
        self.act: Activation = act

    def forward(self, input: Tensor) -> Tensor:
        """Return act(instance_norm(input))."""
        of_input = self.training or not self.track_running_stats
        momentum = 0.0 if self.momentum is None else self.momentum
        return instance_norm_act(
            "InstanceNormAct2d", input, self.running_mean, self.running_var, self.weight, self.bias,
            of_input, momentum, self.eps, self.act,
        )  # fmt: skip

    def extra_repr(self) -> str:
        """Return the arguments as torch.nn.InstanceNorm2d prints them, and the activation."""
        return f"{super().extra_repr()}, act={self.act}"
