"""batch_norm_act in elementary PyTorch operations, without torch's own batch norm."""

from torch import Tensor

from fastcnn.common.activation import activation


def batch_norm_act(
    x: Tensor,
    weight: Tensor | None = None,
    bias: Tensor | None = None,
    mean: Tensor | None = None,
    var: Tensor | None = None,
    residual: Tensor | None = None,
    eps: float = 1e-5,
    act: str = "relu",
) -> tuple[Tensor, Tensor, Tensor]:
    """Return y, mean and biased var. Statistics that are not given are those of x [n, c, h, w]."""

    def column(t: Tensor) -> Tensor:
        return t[:, None, None]

    if mean is None or var is None:
        mean = x.mean((0, 2, 3))
        var = (x - column(mean)).square().mean((0, 2, 3))
    z = (x - column(mean)) / column((var + eps).sqrt())
    if weight is not None:
        z = z * column(weight)
    if bias is not None:
        z = z + column(bias)
    if residual is not None:
        z = z + residual
    return activation(z, act), mean, var
