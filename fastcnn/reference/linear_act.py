"""linear_act as a product of matrices."""

from torch import Tensor

from fastcnn.common.activation import activation


def linear_act(x: Tensor, weight: Tensor, bias: Tensor | None = None, act: str = "none") -> Tensor:
    """Return y [..., c_out] of x [..., c_in] and weight [c_out, c_in]."""
    z = (x[..., None, :] * weight).sum(-1)
    return activation(z if bias is None else z + bias, act)
