"""What a user gets wrong with augment: errors that name the argument, expected and got."""

import dataclasses
from typing import Any

import pytest
import torch

from fastcnn.functional import AugmentParameters, augment

IMAGES = torch.zeros(2, 3, 4, 5, dtype=torch.uint8)
MASKS = torch.zeros(2, 4, 5, dtype=torch.uint8)
P = AugmentParameters.identity(2, (4, 5))

# What replaces a good argument of augment, the error, and what its message names.
ERRORS: list[tuple[dict[str, Any], type[Exception], str]] = [
    ({"images": None}, TypeError, r"images: expected a Tensor, got NoneType"),
    ({"images": IMAGES.float()}, TypeError, r"images: expected uint8, got torch.float32"),
    ({"images": IMAGES[0]}, ValueError, r"images: expected 4 dimensions .*, got 3: \[3, 4, 5\]"),
    ({"images": IMAGES[:, :2]}, ValueError, r"images: expected 1 or 3 channels, got 2"),
    ({"images": IMAGES[..., ::2]}, ValueError, r"images: expected a dense .* call images.contig"),
    ({"images": IMAGES[..., :0]}, ValueError, r"images: expected images of at least one pixel"),
    ({"parameters": None}, TypeError, r"parameters: expected AugmentParameters, got NoneType"),
    ({"parameters": P[0]}, ValueError, r"parameters: expected those of 2 samples, got 1"),
    ({"masks": 1}, TypeError, r"masks: expected a Tensor, got int"),
    ({"masks": MASKS.float()}, TypeError, r"masks: expected uint8 or int64, got torch.float32"),
    ({"masks": MASKS[:1]}, ValueError, r"masks: expected sizes .*, got \[1, 4, 5\]"),
    ({"masks": MASKS[:, None].expand(2, 3, 4, 5)}, ValueError, r"masks: expected sizes"),
    ({"masks": MASKS.mT.contiguous().mT}, ValueError, r"masks: expected a dense tensor"),
    ({"masks": MASKS.to("meta")}, ValueError, r"masks: expected device cpu, got meta"),
    ({"masks": MASKS, "mask_fill": 256}, ValueError, r"mask_fill: expected a number that torch.ui"),
    ({"masks": MASKS, "mask_fill": -1}, ValueError, r"mask_fill: expected a number that torch.ui"),
    ({"mask_fill": 2**63}, ValueError, r"mask_fill: expected a number that torch.int64 holds, got"),
    ({"masks": MASKS, "mask_fill": 0.5}, TypeError, r"mask_fill: expected an int, got float"),
    ({"size": 4}, TypeError, r"size: expected a height and a width, got 4"),
    ({"size": (4, 5, 6)}, ValueError, r"size: expected a height and a width from 1"),
    ({"size": (4, 0)}, ValueError, r"size: expected a height and a width from 1"),
    ({"mean": (0.5, 0.5)}, ValueError, r"mean: expected 1 or 3 finite numbers, got \(0.5, 0.5\)"),
    ({"mean": float("nan")}, ValueError, r"mean: expected 1 or 3 finite numbers"),
    ({"std": (1, 0, 1)}, ValueError, r"std: expected numbers other than 0"),
    ({"fill": "black"}, TypeError, r"fill: expected numbers, got 'black'"),
    ({"fill": -1}, ValueError, r"fill: expected grey levels from 0 to 255, got -1"),
    ({"fill": (0, 0, 256)}, ValueError, r"fill: expected grey levels .*, got \(0, 0, 256\)"),
    ({"erase_value": (1,) * 4}, ValueError, r"erase_value: expected 1 or 3 finite numbers"),
    ({"dtype": torch.float64}, TypeError, r"dtype: expected float32, .*, got torch.float64"),
    ({"memory_format": torch.preserve_format}, ValueError, r"memory_format: expected torch.cont"),
]


@pytest.mark.parametrize(("bad", "error", "message"), ERRORS)
def test_augment(bad: dict[str, Any], error: type[Exception], message: str) -> None:
    with pytest.raises(error, match=f"^augment: {message}"):
        augment(**({"images": IMAGES, "parameters": P} | bad))


ONES = torch.ones(2)
# What replaces a field of good parameters.
FIELDS: list[tuple[str, Any, type[Exception], str]] = [
    ("angle", 1.0, TypeError, r"expected a Tensor, got float"),
    ("angle", ONES.double(), TypeError, r"expected torch.float32, got torch.float64"),
    ("scale", torch.ones(3), ValueError, r"expected sizes \[2\], got \[3\]"),
    ("shear", ONES, ValueError, r"expected sizes \[2, 2\], got \[2\]"),
    ("hue", ONES.to("meta"), ValueError, r"expected device cpu, got meta"),
    ("angle", ONES * float("inf"), ValueError, r"expected finite numbers"),
    ("scale", ONES * 0, ValueError, r"expected finite numbers above 0"),
    ("shear", torch.full((2, 2), 90.0), ValueError, r"expected angles between -90 and 90"),
    ("crop", torch.zeros(2, 4).long(), ValueError, r"expected top, left and a height and width"),
    ("brightness", -ONES, ValueError, r"expected finite numbers of at least 0"),
    ("contrast", ONES * float("nan"), ValueError, r"expected finite numbers of at least 0"),
    ("hue", ONES * 0.51, ValueError, r"expected numbers from -0.5 to 0.5"),
    ("noise", -ONES, ValueError, r"expected finite numbers of at least 0"),
    ("horizontal_flip", ONES, TypeError, r"expected torch.bool, got torch.float32"),
    ("brightness", ONES.clone().requires_grad_(), ValueError, r"expected .* not differentiable"),
    ("erase", torch.full((2, 4), -1), ValueError, r"expected numbers of at least 0"),
]


@pytest.mark.parametrize(("name", "bad", "error", "message"), FIELDS)
def test_parameters(name: str, bad: Any, error: type[Exception], message: str) -> None:
    with pytest.raises(error, match=f"^AugmentParameters: {name}: {message}"):
        dataclasses.replace(P, **{name: bad})


def test_a_crop_beside_the_image_is_fill() -> None:
    # No error: the crop may reach beyond the image, as torchvision's pads with 0.
    p = dataclasses.replace(P, crop=torch.tensor([[100, 0, 4, 5], [-2, 0, 4, 5]]))
    y = augment(IMAGES + 200, p, fill=51)
    # A level times 1 / 255: both are rounded.
    for part, level in ((y[0], 51), (y[1, :, :2], 51), (y[1, :, 2:], 200)):
        assert (part.double() - level / 255).abs().max() <= torch.finfo(y.dtype).eps
