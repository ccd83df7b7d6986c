"""upsample as two matrices in elementary PyTorch operations, without torch's own interpolate."""

import torch
from torch import Tensor

Scales = tuple[float | None, float | None]


def matrix(
    size: int,
    size_out: int,
    scale: float | None,
    mode: str,
    align_corners: bool = False,
    dtype: torch.dtype = torch.float64,
    device: torch.device | str = "cpu",
) -> Tensor:
    """Return the float64 shares [size_out, size] of one axis, of coordinates in `dtype`.

    Nearest modes have float32 coordinates, whatever the dtype.
    """
    o = torch.arange(size_out, device=device)
    bilinear = mode == "bilinear"
    if size == size_out and mode != "nearest-exact":
        return torch.eye(size, dtype=torch.float64, device=device)
    if mode == "nearest" and size_out == 2 * size:
        return torch.nn.functional.one_hot(o // 2, size).double()
    coordinate = dtype if bilinear else torch.float32

    def number(value: float) -> Tensor:
        return torch.tensor(value, dtype=coordinate, device=device)

    step = number(1 / scale) if scale else number(size) / number(size_out)
    if bilinear and align_corners:
        step = number(size - 1) / number(size_out - 1) if size_out > 1 else number(0)
        place = step * o.to(coordinate)
    elif bilinear:
        place = (step * (o.to(coordinate) + 0.5) - 0.5).clamp(min=0)
    else:
        place = (o.to(coordinate) + (0.5 if mode == "nearest-exact" else 0)) * step
    index = place.floor().long().clamp(max=size - 1)
    weight = (place - index).clamp(0, 1).double()[:, None] if bilinear else 0.0
    low = torch.nn.functional.one_hot(index, size).double()
    high = torch.nn.functional.one_hot((index + 1).clamp(max=size - 1), size).double()
    return low * (1 - weight) + high * weight


def upsample(
    x: Tensor,
    size: tuple[int, int],
    scales: Scales = (None, None),
    mode: str = "bilinear",
    align_corners: bool = False,
    skip: Tensor | None = None,
    skip_last: bool = False,
    dtype: torch.dtype = torch.float64,
) -> Tensor:
    """Return x [n, c, h, w] in float64, resized, behind the channels of skip or before them.

    dtype: in which the coordinates of bilinear sampling are computed.
    """
    rows, columns = (
        matrix(x.shape[2 + d], size[d], scales[d], mode, align_corners, dtype, x.device)
        for d in range(2)
    )
    y = rows @ x.double() @ columns.mT
    if skip is None:
        return y
    return torch.cat([y, skip.double()] if skip_last else [skip.double(), y], dim=1)
