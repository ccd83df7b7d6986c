"""augment where every pixel of the output is one of the image: flips and crops, no colour.

Such rows have a way of their own through the CPU kernel, by layout. y is one multiplication and one
addition of a level: expected in float64, within the roundings of both and of their factors.
"""

import itertools

import pytest
import torch
from support.augment_cases import smooth_images, with_values
from support.shapes import LAYOUTS

from fastcnn.functional import augment

MEAN, STD, ERASED = 0.4, 0.25, -7.0


@pytest.mark.parametrize(
    "w", [1, 15, 16, 33, 64]
)  # less than, and whole and odd numbers of vectors
@pytest.mark.parametrize("c", [3, 1], ids=["rgb", "grey"])
def test_copied_pixels_are_normalised_alone(c: int, w: int) -> None:
    images = smooth_images(3, c, 21, 70)
    for across, down, inside in itertools.product([False, True], repeat=3):
        top, left = (2, 5) if inside else (0, 70 - w)  # the last bytes of a row are not passed
        p = with_values(
            3,
            (21, 70),
            crop=[top, left, 19, w],
            horizontal_flip=across,
            vertical_flip=down,
            erase=[4, w // 3, 6, max(1, w // 2)],
        )
        levels = images[:, :, top : top + 19, left : left + w].double()
        levels = levels.flip([d for d, on in ((3, across), (2, down)) if on])
        expected = (levels / 255 - MEAN) / STD
        expected[:, :, 4:10, w // 3 : w // 3 + max(1, w // 2)] = ERASED
        first = None
        for given, wanted in itertools.product(LAYOUTS.values(), repeat=2):
            y = augment(
                images.contiguous(memory_format=given), p, size=(19, w), mean=MEAN, std=STD,
                erase_value=ERASED, memory_format=wanted,
            )  # fmt: skip
            first = y if first is None else first
            assert torch.equal(y, first)
        assert first is not None
        # Scale, shift, product and sum are rounded, of numbers below 255 / 255 / STD.
        limit = 4 * torch.finfo(torch.float32).eps / STD
        assert (first - expected).abs().max() <= limit
        for dtype in (torch.bfloat16, torch.float16):
            half = augment(
                images, p, size=(19, w), mean=MEAN, std=STD, erase_value=ERASED, dtype=dtype
            )
            assert torch.equal(half, first.to(dtype))
