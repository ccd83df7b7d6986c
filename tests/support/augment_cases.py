"""Images and parameters that the tests of augment share, and how exact a result must be."""

import dataclasses
from collections.abc import Iterator
from typing import Any

import torch
from support.seeds import seeded
from torch import Tensor

from fastcnn.augment import Augment
from fastcnn.functional import AugmentParameters
from fastcnn.ops.augment.pack import pack
from fastcnn.reference.augment import coordinates

SIZE = (37, 51)  # odd, and no whole number of vectors
EVERYTHING: dict[str, Any] = {
    "degrees": 30, "translate": (0.2, 0.1), "scale": (0.7, 1.4), "shear": (-10, 10, -5, 5),
    "crop_scale": (0.3, 1.0), "horizontal_flip": 0.5, "vertical_flip": 0.5, "brightness": 0.4,
    "contrast": (0.5, 1.5), "saturation": 0.5, "hue": 0.3, "noise": (0.0, 0.1), "erasing": 0.5,
}  # fmt: skip


def smooth_images(n: int, c: int, h: int, w: int) -> Tensor:
    """uint8, all levels, neighbours alike as in photographs."""
    g = seeded(n + c + h + w)
    coarse = torch.rand(n, c, -(-h // 4) + 1, -(-w // 4) + 1, generator=g)
    fine = torch.nn.functional.interpolate(coarse, size=(h, w), mode="bilinear")
    return (fine * 255.99).to(torch.uint8)


def draw_everything(n: int, size_in: tuple[int, int], size: tuple[int, int]) -> AugmentParameters:
    g = seeded(n)
    return Augment(size, **EVERYTHING).draw(n, size_in, g)


def resized(
    c: int, layout: torch.memory_format
) -> Iterator[tuple[Tensor, AugmentParameters, tuple[int, int], dict[str, Any]]]:
    """Images, parameters, size and options: everything, noise and resizing included, at sizes at
    the edges of vectors and from sources of one row or column."""
    sizes = [((1, 1), (5, 3)), ((1, 9), (4, 17)), ((9, 1), (16, 16)), ((33, 47), (47, 33))]
    for size_in, size in [*sizes, ((2, 2), (1, 1)), ((40, 30), (3, 100))]:
        images = smooth_images(5, c, *size_in).contiguous(memory_format=layout)
        options = {"mean": 0.3, "std": 0.5, "fill": 60.0, "erase_value": -1.0}
        yield images, draw_everything(5, size_in, size), size, options


def with_values(n: int, size: tuple[int, int], **values: Any) -> AugmentParameters:
    """Identity but for some fields, the same for all samples."""
    fields = dataclasses.asdict(AugmentParameters.identity(n, size))
    for name, value in values.items():
        fields[name] = torch.tensor([value] * n, dtype=fields[name].dtype)
    return AugmentParameters(**fields)


def level_limit(images: Tensor, extent: int = 64) -> float:
    """Of levels from 0 to 1. Coordinates of up to `extent` and the image's sides are rounded 8
    times in float32, and a pixel's neighbours may differ by all of 1; levels are rounded some 16
    times. Brightness, contrast, saturation and hue may each double an error."""
    eps = torch.finfo(torch.float32).eps
    return 16 * (8 * max(extent, *images.shape) + 16) * eps / 2


def extent_of(p: AugmentParameters, size_in: tuple[int, int], size: tuple[int, int]) -> float:
    """The largest term of a coordinate's sums, by how much the maps stretch the output's."""
    reals = pack(p, size_in, size)[0].double().abs()
    reach = max(*size, *size_in, *p.crop.flatten().abs().tolist())
    rows = [reals[:, 6 + 3 * i : 9 + 3 * i] for i in range(2)]
    return max([((r[:, 0] + r[:, 1]) * reach + r[:, 2]).max().item() for r in rows if len(r)] + [1])


def clear_of_ties(p: AugmentParameters, size_in: tuple[int, int], size: tuple[int, int]) -> Tensor:
    """Mark the output's pixels for which no rounding decides which source pixel is the nearest.

    A coordinate is a sum of three products of float32 numbers that are rounded themselves: at most
    8 roundings of its largest term, and as many in PyTorch's.
    """
    near = 8 * torch.finfo(torch.float32).eps * extent_of(p, size_in, size)
    at = torch.stack(coordinates(p, size_in, size)) + 0.5
    return ((at - at.round()).abs() > near).all(0)
