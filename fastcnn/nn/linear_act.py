"""LinearAct."""

import torch
from torch import Tensor, nn

from fastcnn.common.activation import Activation, act_number
from fastcnn.functional import linear_act


class LinearAct(nn.Linear):
    """A linear layer with an activation.

    ``forward(x) = act(linear(x, weight, bias))``. It is a torch.nn.Linear, with its parameters and
    state_dict keys. Shapes, dtypes and errors are those of :func:`fastcnn.functional.linear_act`.

    Args:
        in_features: of torch.nn.Linear, as all up to bias.
        out_features: likewise.
        bias: whether there is one.
        act: as in :func:`fastcnn.functional.linear_act`.
        device: of the parameters.
        dtype: likewise.

    Example:
        >>> linear = fastcnn.nn.LinearAct(8, 32, act="gelu")
        >>> linear(torch.randn(2, 7, 8)).shape
        torch.Size([2, 7, 32])
        >>> list(linear.state_dict())
        ['weight', 'bias']
    """

    def __init__(
        self,
        in_features: int,
        out_features: int,
        bias: bool = True,
        act: Activation = "none",
        device: torch.device | str | None = None,
        dtype: torch.dtype | None = None,
    ) -> None:
        act_number("LinearAct", act)
        super().__init__(in_features, out_features, bias, device=device, dtype=dtype)
        self.act: Activation = act

    def forward(self, input: Tensor) -> Tensor:
        """Return the linear layer's output with the activation."""
        return linear_act(input, self.weight, self.bias, act=self.act)

    def extra_repr(self) -> str:
        """Return what nn.Linear shows, and the activation."""
        return f"{super().extra_repr()}, act={self.act}"
