"""group_norm_act in elementary PyTorch operations, without torch's own group norm."""

from torch import Tensor

from fastcnn.common.activation import activation


def group_norm_act(
    x: Tensor,
    groups: int | None,
    weight: Tensor | None = None,
    bias: Tensor | None = None,
    eps: float = 1e-5,
    act: str = "relu",
) -> tuple[Tensor, Tensor, Tensor]:
    """Return y, mean and biased var of x [n, c, h, w]; with groups None those of each pixel."""
    n, c, h, w = x.shape
    # One row of values for each statistic, [n, groups, values]; for pixels [n, h * w, c].
    rows = x.reshape(n, c, h * w).mT if groups is None else x.reshape(n, groups, -1)
    mean = rows.mean(2, keepdim=True)
    var = (rows - mean).square().mean(2, keepdim=True)
    xhat = (rows - mean) / (var + eps).sqrt()
    z = (xhat.mT if groups is None else xhat).reshape(n, c, h, w)
    if weight is not None:
        z = z * weight[:, None, None]
    if bias is not None:
        z = z + bias[:, None, None]
    return activation(z, act), mean[..., 0], var[..., 0]
