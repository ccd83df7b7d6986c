"""SqueezeExcite."""

import torch
from torch import Tensor, nn

from fastcnn.common.activation import Activation, act_number
from fastcnn.common.checks import check_choice
from fastcnn.functional import squeeze_excite
from fastcnn.ops.squeeze_excite import GATE_NUMBER, Gate


class SqueezeExcite(nn.Module):
    """A gate for each channel of each image, made of the means of its channels.

    ``forward(x) = x * gate(fc2(act(fc1(mean of x over h and w))))``. Parameters and state_dict keys
    are those of torchvision.ops.SqueezeExcitation. Shapes, dtypes and errors are those of
    :func:`fastcnn.functional.squeeze_excite`.

    Args:
        channels: of the input and of the output.
        squeeze_channels: between fc1 and fc2.
        act: behind fc1, as in :func:`fastcnn.functional.squeeze_excite`.
        gate: "sigmoid" or "hardsigmoid".
        device: of the parameters.
        dtype: likewise.

    Example:
        >>> block = fastcnn.nn.SqueezeExcite(8, 2, act="silu")
        >>> block(torch.randn(2, 8, 6, 6)).shape
        torch.Size([2, 8, 6, 6])
        >>> list(block.state_dict())
        ['fc1.weight', 'fc1.bias', 'fc2.weight', 'fc2.bias']
    """

    def __init__(
        self,
        channels: int,
        squeeze_channels: int,
        act: Activation = "relu",
        gate: Gate = "sigmoid",
        device: torch.device | str | None = None,
        dtype: torch.dtype | None = None,
    ) -> None:
        act_number("SqueezeExcite", act)
        check_choice("SqueezeExcite", "gate", gate, GATE_NUMBER)
        super().__init__()
        self.fc1 = nn.Conv2d(channels, squeeze_channels, 1, device=device, dtype=dtype)
        self.fc2 = nn.Conv2d(squeeze_channels, channels, 1, device=device, dtype=dtype)
        self.act: Activation = act
        self.gate: Gate = gate

    def forward(self, input: Tensor) -> Tensor:
        """Return the input, each channel times its gate."""
        fc1, fc2 = self.fc1, self.fc2
        return squeeze_excite(
            input, fc1.weight, fc1.bias, fc2.weight, fc2.bias, act=self.act, gate=self.gate
        )

    def extra_repr(self) -> str:
        """Return the activations."""
        return f"act={self.act}, gate={self.gate}"
