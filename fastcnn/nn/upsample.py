"""Upsample."""

from collections.abc import Sequence
from typing import Any

import torch
from torch import Tensor

from fastcnn.functional import interpolate
from fastcnn.ops.upsample.arguments import sampling_number


class Upsample(torch.nn.Upsample):
    """Resizing of images, optionally straight into the buffer that also receives a skip.

    ``forward(x, concat=None) = cat([concat, interpolate(x)], dim=1)``. It is a torch.nn.Upsample,
    with its arguments. Shapes, dtypes and errors are those of
    :func:`fastcnn.functional.interpolate`.

    Args:
        size: the output's h and w, or one number for both.
        scale_factor: the factors of h and w, or one for both.
        mode: "nearest", "nearest-exact" or "bilinear".
        align_corners: bilinear alone: whether corner pixels' centres, and not images' edges, meet.
        recompute_scale_factor: whether coordinates are computed with the ratio of the sizes.

    Example:
        >>> up = fastcnn.nn.Upsample(scale_factor=2, mode="bilinear")
        >>> up(torch.randn(2, 8, 4, 4), concat=torch.randn(2, 3, 8, 8)).shape
        torch.Size([2, 11, 8, 8])
    """

    def __init__(
        self,
        size: int | Sequence[int] | None = None,
        scale_factor: float | Sequence[float] | None = None,
        mode: str = "nearest",
        align_corners: bool | None = None,
        recompute_scale_factor: bool | None = None,
    ) -> None:
        sizes: Any = size  # torch.nn.Upsample annotates tuples alone, and takes what they hold
        factors: Any = tuple(scale_factor) if isinstance(scale_factor, Sequence) else scale_factor
        super().__init__(sizes, factors, mode, align_corners, recompute_scale_factor)
        sampling_number("Upsample", mode, align_corners)

    def forward(self, input: Tensor, concat: Tensor | None = None) -> Tensor:
        """Return the resized input, behind the channels of concat."""
        size: Any = self.size
        factors: Any = self.scale_factor
        mode: Any = self.mode
        return interpolate(
            input,
            size,
            factors,
            mode,
            self.align_corners,
            self.recompute_scale_factor,
            concat=concat,
        )
